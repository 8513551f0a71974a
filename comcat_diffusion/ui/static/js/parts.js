// Small things that several pages are made of: what is said in passing, dialogs, fields, progress, the divider.

import { h, id, icon, iconButton, replace } from "./dom.js";
import { bytes, duration, number, t } from "./texts.js";

export function say(message, kind = "info") {
  const toast = h("div", { class: `toast ${kind}` }, icon(kind === "bad" ? "warn" : "check"), h("span", {}, message));
  const place = document.getElementById("said");
  toast.append(iconButton(t("close"), "close", { onclick: () => toast.remove() }));
  place.append(toast);
  setTimeout(() => toast.remove(), kind === "bad" ? 12000 : 5000);
}

// Do what a button is for; a refusal is said beside the field that it is about, or in passing.
export async function attempt(work, form = null) {
  if (form) clearFaults(form);
  try {
    return await work();
  } catch (error) {
    if (!(form && error.field && fault(form, error.field, error.message))) say(error.message, "bad");
    return undefined;
  }
}

export function clearFaults(form) {
  form.querySelectorAll(".fault").forEach((one) => one.remove());
  form.querySelectorAll("[aria-invalid]").forEach((one) => {
    one.removeAttribute("aria-invalid");
    if (one.dataset.described) one.setAttribute("aria-describedby", one.dataset.described);
  });
}

export function fault(form, name, message) {
  const field = form.querySelector(`[data-field="${CSS.escape(name)}"]`);
  if (!field) return false;
  for (let one = field.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
  const control = field.querySelector("input:not([type=range]), select, textarea") || field;
  const said = h("p", { class: "fault", id: id("fault") }, message);
  field.append(said);
  control.dataset.described = control.getAttribute("aria-describedby") || "";
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", `${said.id} ${control.dataset.described}`.trim());
  control.focus({ preventScroll: true });
  field.scrollIntoView({ block: "center", behavior: "smooth" });
  return true;
}

// A label, a control, and what it is for. `control` gets an id that the label is for.
export function field(name, label, control, help = "", extra = null) {
  const own = control.id || id(name);
  const helper = help && h("p", { class: "help", id: `${own}-help` }, help);
  control.id = own;
  if (helper) control.setAttribute("aria-describedby", helper.id);
  return h("div", { class: "field", data: { field: name } }, h("label", { for: own }, label), extra || control, helper);
}

export function dialog(title, content, buttons = [], wide = false) {
  const heading = h("h2", { id: id("dialog") }, title);
  const box = h("dialog", { class: wide ? "wide" : "", "aria-labelledby": heading.id },
    h("header", {}, heading, iconButton(t("close"), "close", { onclick: () => box.close() })), content,
    buttons.length ? h("footer", {}, buttons) : null);
  box.addEventListener("close", () => box.remove());
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  document.body.append(box);
  box.showModal();
  return box;
}

export function confirmed(question, yes, text = t("no_way_back"), danger = true) {
  return new Promise((answer) => {
    let told = false;
    const box = dialog(question, h("p", {}, text), [
      h("button", { type: "button", class: "button", onclick: () => box.close() }, t("no")),
      h("button", { type: "button", class: `button ${danger ? "danger" : "primary"}`, onclick: () => { told = true; box.close(); } }, yes),
    ]);
    box.addEventListener("close", () => answer(told));
  });
}

// The state of a job as a bar and a line: what it is doing, how far it is, how long it will take.
export function progress(job) {
  const live = ["queued", "running", "stopping"].includes(job.state);
  if (!live) return h("span", {});
  const share = job.share;
  const bar = h("progress", { max: 1, "aria-label": t("progress") });
  if (share !== null && share !== undefined) bar.value = share;
  return h("div", { class: "progress" }, bar, h("p", { class: "doing" }, doing(job)));
}

export function doing(job) {
  if (job.state === "queued") return job.position ? t("position", { n: job.position }) : t("starting");
  const phase = job.state === "stopping" ? t("stopping") : t(`phase_${job.phase || "loading"}`);
  const parts = [phase];
  if (job.total && job.phase === "training") parts.push(t("step_of", { n: number(job.done), total: number(job.total) }));
  if (job.total && job.phase === "drawing") parts.push(t("n_of", { n: number(job.done), total: number(job.total) }));
  if (job.total && job.phase === "fetching") parts.push(t("n_of", { n: bytes(job.done), total: bytes(job.total) }));
  if (job.seconds_left !== null && job.seconds_left !== undefined) parts.push(t("left", { time: duration(job.seconds_left) }));
  return parts.join(" · ");
}

export function state(job) {
  return h("span", { class: `state ${job.state}` }, t(`state_${job.state}`));
}

// An element as wide to its height as a picture is.
function shape(element, picture) {
  element.style.setProperty("--shape", String(picture.naturalWidth / picture.naturalHeight));
}

// A picture as large as there is room.
export function whole(src, alt) {
  return h("img", { class: "whole", src, alt, onload: (event) => shape(event.target, event.target) });
}

// Two pictures of one seed, and a divider between them that a mouse, a finger or the arrow keys move.
export function divider(before, after, label, names = [t("base"), t("adapter")]) {
  const range = h("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": t("divider", { label }) });
  const box = h("div", { class: "divider" },
    h("img", { src: before, alt: `${names[0]}: ${label}`, onload: (event) => shape(box, event.target) }), h("img", { src: after, alt: `${names[1]}: ${label}`, class: "after" }),
    h("span", { class: "tag left", "aria-hidden": "true" }, names[0]), h("span", { class: "tag right", "aria-hidden": "true" }, names[1]),
    h("span", { class: "handle", "aria-hidden": "true" }), range);
  const place = () => box.style.setProperty("--at", `${range.value}%`);
  range.addEventListener("input", place);
  place();
  return box;
}

export function empty(title, text, action = null) {
  return h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text), action);
}

export function fresh(place, ...children) {
  replace(place, ...children);
}
