// A form of settings: folded groups, sliders beside numbers, and nothing sent of what was left as it is.

import { h, id } from "./dom.js";
import { field } from "./parts.js";
import { t } from "./texts.js";

// `values` holds what was typed in, by name; `changed` is called after every change. Returns {element, fill(defaults)}.
export function settingsForm(groups, values, changed) {
  const made = [];
  const element = h("div", { class: "settings" }, groups.map((group) =>
    h("details", { class: "group" }, h("summary", {}, group.title),
      h("div", { class: "fields" }, group.fields.map((one) => { const m = control(one, values, changed); made.push(m); return m.element; })))));
  return { element, fill: (defaults) => made.forEach((one) => one.fill(defaults)) };
}

export function control(one, values, changed) {
  const kinds = { switch: toggle, whole: numeric, number: numeric, several: lines, text: one.choices.length ? choice : line };
  return kinds[one.kind](one, values, (value) => {
    if (value === "" || value === null || value === undefined || (Array.isArray(value) && !value.length)) delete values[one.name];
    else values[one.name] = value;
    changed(one.name);
  });
}

const shownDefault = (one, defaults) => defaults[one.name] ?? one.default;

function told(value) {
  if (value === null || value === undefined || (Array.isArray(value) && !value.length)) return t("default_auto");
  return t("default_is", { value: Array.isArray(value) ? value.join(", ") : String(value) });
}

const NO_NUMBER = "?"; // what is sent of a field in which there are no digits: the server says that it is no number

function numeric(one, values, set) {
  const [least, most, step] = one.slider || [];
  const input = h("input", { type: "number", step: "any", inputmode: one.kind === "whole" ? "numeric" : "decimal", value: values[one.name] ?? "" });
  const range = one.slider && h("input", { type: "range", min: least, max: most, step, "aria-label": t("slider_of", { label: one.label }) });
  const read = () => (input.validity.badInput ? NO_NUMBER : input.value === "" ? null : Number(input.value));
  let fallback = one.default;
  const follow = () => { if (range) { range.value = Number(read() ?? fallback ?? least) || least; range.classList.toggle("default", read() === null); } };
  input.addEventListener("input", () => { follow(); set(read()); });
  range && range.addEventListener("input", () => { input.value = range.value; range.classList.remove("default"); set(read()); });
  const element = field(one.name, one.label, input, one.help, range ? h("div", { class: "pair" }, range, input) : null);
  return { element, fill: (defaults) => {
    fallback = shownDefault(one, defaults);
    input.placeholder = told(fallback);
    if (values[one.name] === NO_NUMBER) delete values[one.name]; // of which the field shows nothing any more
    input.value = values[one.name] ?? "";
    follow();
  } };
}

function toggle(one, values, set) {
  const input = h("input", { type: "checkbox", role: "switch", id: id(one.name) });
  let fallback = one.default;
  input.addEventListener("change", () => set(input.checked === fallback ? null : input.checked));
  const help = h("p", { class: "help", id: `${input.id}-help` }, one.help);
  input.setAttribute("aria-describedby", help.id);
  const element = h("div", { class: "field switch", data: { field: one.name } }, input, h("label", { for: input.id }, one.label), help);
  return { element, fill: (defaults) => { fallback = shownDefault(one, defaults); input.checked = values[one.name] ?? fallback; } };
}

function choice(one, values, set) {
  const first = h("option", { value: "" });
  const input = h("select", {}, first, one.choices.map((value) => h("option", { value }, one.names?.[value] ?? value)));
  input.addEventListener("change", () => set(input.value));
  const element = field(one.name, one.label, input, one.help);
  return { element, fill: (defaults) => { first.textContent = told(shownDefault(one, defaults)); input.value = values[one.name] ?? ""; } };
}

function line(one, values, set) {
  const input = h("input", { type: "text", value: values[one.name] ?? "", autocomplete: "off" });
  input.addEventListener("input", () => set(input.value));
  const element = field(one.name, one.label, input, one.help);
  return { element, fill: (defaults) => { input.placeholder = told(shownDefault(one, defaults)); input.value = values[one.name] ?? ""; } };
}

function lines(one, values, set) {
  const input = h("textarea", { rows: 2 });
  input.addEventListener("input", () => set(input.value.split("\n").map((text) => text.trim()).filter(Boolean)));
  const element = field(one.name, one.label, input, `${one.help} ${t("one_a_line")}`);
  return { element, fill: (defaults) => { input.placeholder = told(shownDefault(one, defaults)); input.value = (values[one.name] ?? []).join("\n"); } };
}
