// Adapters: a card for each, and a page for taking one away.

import * as api from "./api.js";
import { button, h, icon, id, replace } from "./dom.js";
import { attempt, empty, field, say } from "./parts.js";
import { bytes, number, t } from "./texts.js";

export async function adaptersPage(content) {
  const list = h("div", {});
  const pick = h("input", { type: "file", accept: ".safetensors", class: "hidden-file", id: id("adapter"), onchange: async () => {
    const [file] = pick.files;
    const told = file && (await attempt(() => api.put(`/api/adapters?name=${encodeURIComponent(file.name)}`, file)));
    pick.value = "";
    if (told) { say(t("brought", { name: file.name })); await draw(); }
  } });
  const draw = async () => {
    const cards = await api.get("/api/adapters");
    replace(list, cards.length ? h("ul", { class: "cards" }, cards.map((card) => h("li", {}, h("a", { class: "adapter", href: `#/adapters/${encodeURIComponent(card.id)}` }, inside(card)))))
      : empty(t("no_adapters"), t("no_adapters_text"), h("a", { class: "button primary", href: "#/train" }, t("start_one"))));
  };
  replace(content, h("header", { class: "intro" }, h("h1", {}, t("nav_adapters")), h("p", {}, t("adapters_text")),
    h("div", { class: "row" }, pick, h("label", { for: pick.id, class: "button quiet" }, icon("plus"), h("span", {}, t("bring_adapter"))))), list);
  await draw();
}

// What a card shows, here and where one is chosen to draw with.
export function inside(card) {
  return [card.picture ? h("img", { src: `${api.adapterPath(card.id)}/picture`, alt: "", loading: "lazy" }) : h("span", { class: "blank", "aria-hidden": "true" }),
    h("span", { class: "what" }, h("b", {}, card.phrase || card.name), h("span", {}, `${bytes(card.bytes)} · ${card.base || t("unknown_base")}`))];
}

export async function adapterPage(content, name) {
  const [cards, told] = await Promise.all([api.get("/api/adapters"), attempt(() => api.get(`${api.adapterPath(name)}/programs`))]);
  const card = cards.find((one) => one.id === name);
  if (!card || !told) {
    replace(content, empty(t("no_such_adapter"), "", h("a", { class: "button", href: "#/adapters" }, t("nav_adapters"))));
    return undefined;
  }
  const file = `${api.adapterPath(card.id)}/file`;
  const results = h("div", { class: "results", role: "status" });
  let watching = () => {};
  const facts = [[t("trigger"), card.trigger], [t("what"), card.what], [t("base"), card.base], [t("size"), bytes(card.bytes)], [t("kind"), `${card.kind}, ${t("rank")} ${card.rank}`], [t("steps"), card.training.steps ? number(card.training.steps) : ""]].filter(([, value]) => value);
  const lines = (key) => h("ol", { class: "lines" }, [1, 2, 3].map((n) => h("li", {}, t(`use_${key}_${n}`, { file: card.name, phrase: card.phrase || card.name, base: card.base }))));

  const program = (key) => h("details", { class: "program" }, h("summary", {}, h("b", {}, t(`program_${key}`))), lines(key.replace("-", "_")));
  const lora = (one) => h("details", { class: "program" }, h("summary", {}, h("b", {}, one.name)), lines(`lora_${one.client}`),
    button(t(told.exact ? "make_lora" : "make_closest"), { class: "small", onclick: () => make(one.client) }, "down"));

  const make = async (client) => {
    const made = await attempt(() => api.post(`${api.adapterPath(card.id)}/export`, { client }));
    if (made) follow(made.id, (job) => [h("p", {}, t("made")), h("ul", { class: "files" }, job.result.files.map((one) => h("li", {}, h("a", { class: "button primary", href: `${api.fileOf(job.id, one)}?keep=1`, download: one }, icon("down"), one)))),
      h("ul", { class: "said" }, job.result.said.map((line) => h("li", {}, line)))]);
  };
  const follow = (jobId, done) => {
    watching();
    watching = api.watch(`/api/jobs/${jobId}`, (job) => {
      if (!job) return true;
      if (job.state === "done") replace(results, h("div", { class: "card" }, done(job)));
      else if (job.state === "failed") replace(results, h("p", { class: "note error", role: "alert" }, job.message));
      else replace(results, h("p", { class: "help" }, h("span", { class: "spin small", "aria-hidden": "true" }), job.position ? t("position", { n: job.position }) : t("working")));
      if (job.state === "done" || job.state === "failed") results.scrollIntoView({ block: "nearest", behavior: "smooth" });
      return job.state === "done" || job.state === "failed";
    }, 1);
  };

  const repo = h("input", { type: "text", placeholder: "me/my-dog", autocomplete: "off", spellcheck: "false" });
  const hidden = h("input", { type: "checkbox", id: id("private"), checked: true });
  const share = h("form", { class: "share", novalidate: true, onsubmit: async (event) => {
    event.preventDefault();
    const made = await attempt(() => api.post(`${api.adapterPath(card.id)}/push`, { repo_id: repo.value.trim(), private: hidden.checked }), share);
    if (made) follow(made.id, (job) => job.result.said.map((line) => h("p", {}, line)));
  } }, field("repo_id", t("repo"), repo, t("repo_help")), h("div", { class: "inline" }, hidden, h("label", { for: hidden.id }, t("private"))), h("button", { type: "submit", class: "button" }, icon("share"), h("span", {}, t("push"))));

  replace(content, h("header", { class: "intro" }, h("p", { class: "crumb" }, h("a", { href: "#/adapters" }, t("nav_adapters"))), h("h1", {}, card.phrase || card.name)),
    h("div", { class: "columns take" },
      h("section", { class: "card portrait" }, card.picture ? h("img", { src: `${api.adapterPath(card.id)}/picture`, alt: card.phrase }) : null, h("dl", { class: "facts" }, facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, String(value))))),
        h("div", { class: "row" }, h("a", { class: "button primary", href: file, download: `${card.name}.safetensors` }, icon("down"), h("span", {}, t("download"))),
          h("a", { class: "button", href: "#/generate", onclick: () => sessionStorage.setItem("chosen", JSON.stringify([card.id])) }, t("generate_with_it")))),
      h("div", { class: "steps" },
        h("section", { class: "card" }, h("h2", {}, t("as_it_is")), h("p", { class: "help" }, t("as_it_is_text")), told.as_it_is.map(program)),
        h("section", { class: "card" }, h("h2", {}, t("as_lora")), h("p", { class: told.exact ? "help" : "note doubt" }, told.able ? t(told.exact ? "lora_exact" : "lora_closest") : told.why), told.able ? told.loras.map(lora) : null, results),
        told.push ? h("section", { class: "card" }, h("h2", {}, t("on_the_hub")), h("p", { class: "help" }, t("hub_push_text")), share) : null)));
  return () => watching();
}
