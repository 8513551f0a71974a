// The frame around the pages: where one is, what is running, language and colours; and which page an address shows.

import * as api from "./api.js";
import { h, id, icon, replace, replaceIfNew } from "./dom.js";
import { about, speak, t } from "./texts.js";
import { trainPage } from "./train.js";
import { runPage, runsPage } from "./runs.js";
import { generatePage } from "./generate.js";
import { galleryPage } from "./gallery.js";
import { adapterPage, adaptersPage } from "./adapters.js";

const THEMES = ["auto", "light", "dark"];
const PAGES = { train: trainPage, runs: runsPage, generate: generatePage, gallery: galleryPage, adapters: adaptersPage };
const ONE = { runs: runPage, adapters: adapterPage };
let leave = () => {};

async function show() {
  const [, name, ...rest] = location.hash.split("/").map(decodeURIComponent);
  const start = about.teaches ? "train" : "generate";
  const known = about.teaches ? PAGES : { generate: generatePage, gallery: galleryPage };
  const place = name in known ? name : start;
  const page = rest.length && ONE[place] ? ONE[place] : known[place];
  leave();
  leave = () => {};
  document.querySelectorAll("dialog").forEach((one) => one.close());
  document.querySelectorAll("nav a").forEach((link) => {
    const here = link.dataset.place === place;
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  });
  const main = document.getElementById("main");
  const asked = location.hash;
  const content = h("div", { class: `page of-${place}` });
  replace(main, content);
  document.title = `${t(`nav_${place}`)} · COMCAT studio`;
  window.scrollTo(0, 0);
  const left = await page(content, rest.join("/"));
  if (location.hash !== asked) return left?.();
  leave = left || (() => {});
  if (show.again) main.focus({ preventScroll: true });
  show.again = true;
}

function frame() {
  const places = about.teaches ? Object.keys(PAGES) : ["generate", "gallery"];
  const links = places.map((name) => h("a", { href: `#/${name}`, data: { place: name } }, t(`nav_${name}`)));
  const language = h("select", { id: id("language"), "aria-label": t("language"), onchange: () => {
    const where = window.top === window ? "SameSite=Lax" : "SameSite=None; Secure; Partitioned"; // else a frame forgets it
    document.cookie = `studio_language=${language.value}; path=/; ${where}; max-age=31536000`;
    location.reload();
  } }, about.languages.map((one) => h("option", { value: one, selected: one === about.language }, one.toUpperCase())));
  const theme = h("button", { type: "button", class: "icon-button", onclick: () => {
    setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("theme") || "auto") + 1) % THEMES.length]);
    theme.setAttribute("aria-label", t(`theme_${localStorage.getItem("theme")}`));
    theme.title = theme.getAttribute("aria-label");
  }, "aria-label": t(`theme_${localStorage.getItem("theme") || "auto"}`), title: t(`theme_${localStorage.getItem("theme") || "auto"}`) }, icon("moon"));
  const queue = h("div", { class: "queue" });
  document.getElementById("skip").textContent = t("skip");
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  replace(document.getElementById("bar"),
    h("a", { class: "mark", href: about.teaches ? "#/train" : "#/generate" }, h("img", { src: "/static/mark.svg", alt: "", width: 28, height: 28 }),
      h("span", {}, "COMCAT", h("b", {}, " studio"))),
    h("nav", { "aria-label": t("pages") }, links), h("div", { class: "tools" }, queue, theme, language));
  api.watch("/api/queue", (jobs) => {
    const running = jobs.filter((job) => job.state !== "queued").length;
    replaceIfNew(queue, [running, jobs.length, jobs[0]?.id], () => jobs.length ? h("a", { class: "pill", href: linkOf(jobs[0]) },
      h("span", { class: "dot", "aria-hidden": "true" }), t(jobs.length > running ? "busy" : "busy_alone", { running, waiting: jobs.length - running })) : null);
  }, 2);
}

function linkOf(job) {
  return job.kind === "train" ? `#/${job.id}` : job.kind === "draw" ? "#/generate" : ["export", "push"].includes(job.kind) ? "#/adapters" : "#/train";
}

function setTheme(name) {
  localStorage.setItem("theme", name);
  name === "auto" ? delete document.documentElement.dataset.theme : (document.documentElement.dataset.theme = name);
}

async function start() {
  setTheme(localStorage.getItem("theme") || "auto");
  speak(await api.get("/api/texts"));
  api.gone(t("gone"));
  frame();
  window.addEventListener("hashchange", show);
  await show();
}

start();
