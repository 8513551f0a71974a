// Everything that was drawn, with what drew it.

import * as api from "./api.js";
import { button, h, replace, replaceIfNew } from "./dom.js";
import { attempt, confirmed, dialog, divider, empty, whole } from "./parts.js";
import { about, number, t, when } from "./texts.js";

export async function galleryPage(content) {
  const list = h("div", {});
  replace(content, h("header", { class: "intro" }, h("h1", {}, t("nav_gallery")), h("p", {}, t("gallery_text"))), list);
  return api.watch("/api/pictures", (drawn) => {
    const pictures = drawn.flatMap((job) => job.pictures.map((one) => ({ ...one, job })));
    replaceIfNew(list, pictures.map((one) => [one.job.id, one.file]), () => pictures.length
      ? h("ul", { class: "gallery" }, pictures.map((one) => h("li", {}, h("button", { type: "button", class: "picture", onclick: () => show(one) },
        h("img", { src: api.fileOf(one.job.id, one.file), alt: `${one.prompt}, ${t("seed_n", { n: one.seed })}`, loading: "lazy" })))))
      : empty(t("no_pictures"), t("no_pictures_text"), h("a", { class: "button primary", href: "#/generate" }, t("nav_generate"))));
  }, 4);
}

// One picture, large, with what drew it and what can be done with it. `ask` fills the form with its settings.
export function show(one, ask = null) {
  const { job } = one;
  const own = api.fileOf(job.id, one.file);
  const scales = job.request.adapters.map((adapter) => `${adapter.id.split("/").at(-1).replace(".safetensors", "")} × ${number(adapter.scale * one.strength, 2)}`).join(", ");
  const rows = [[t("prompt"), one.prompt], [t("seed"), one.seed], [t("adapters"), scales], ...Object.entries(job.request.typed).filter(([name]) => name !== "seed").map(([name, value]) => [about.labels[name] ?? name, name === "scheduler" ? job.request.sampler : value]), [t("asked_on"), when(job.number)]].filter(([, value]) => value !== "");
  const again = (seed) => {
    const { prompt, typed, adapters } = job.request;
    const wanted = { prompt, typed: { ...typed, ...(seed ? { seed: one.seed } : {}) }, adapters: adapters.map(({ id, scale, region }, n) => ({ id, scale: scale * one.strength, region: region ? api.fileOf(job.id, `region-${n}.png`) : null })), num_images: seed ? 1 : job.request.num_images };
    box.close();
    if (ask) ask(wanted);
    else { sessionStorage.setItem("again", JSON.stringify(wanted)); location.hash = "#/generate"; }
  };
  const box = dialog(one.prompt, h("div", { class: "one-picture" }, one.base ? divider(api.fileOf(job.id, one.base), own, one.prompt) : whole(own, one.prompt),
    h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))))), [
    job.own ? button(t("delete"), { class: "quiet", onclick: async () => {
      if (!(await confirmed(t("delete_pictures", { n: job.pictures.length }), t("delete")))) return;
      if (await attempt(() => api.remove(`/api/jobs/${job.id}`))) { box.close(); window.dispatchEvent(new HashChangeEvent("hashchange")); }
    } }, "trash") : null,
    h("a", { class: "button quiet", href: `${own}?keep=1`, download: "" }, t("download")),
    button(t("use_settings"), { onclick: () => again(false) }), button(t("again_seed"), { class: "primary", onclick: () => again(true) }, "again")], true);
}
