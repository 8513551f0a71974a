// Teaching a subject: images, subject, base, aim, and a summary beside them that says what will be.

import * as api from "./api.js";
import { button, h, icon, id, replace, replaceIfNew } from "./dom.js";
import { Images } from "./images.js";
import { attempt, clearFaults, confirmed, dialog, fault, field, progress, say } from "./parts.js";
import { settingsForm } from "./settings.js";
import { bytes, number, t } from "./texts.js";

const DRAFT = "draft";
const LIVE = ["queued", "running", "stopping"];
const EMPTY = { word: "sks", what: "", base: "embedded", aims: { subject: "object", file: "small", effort: "good" }, settings: {} };

export function draft() {
  try {
    const known = JSON.parse(localStorage.getItem(DRAFT));
    return { ...structuredClone(EMPTY), ...known, aims: { ...EMPTY.aims, ...known?.aims }, settings: known?.settings ?? {} };
  } catch {
    return structuredClone(EMPTY);
  }
}

export function keepDraft(values) {
  localStorage.setItem(DRAFT, JSON.stringify(values));
}

export async function trainPage(content) {
  const [told, bases, queue] = await Promise.all([api.get("/api/train"), api.get("/api/bases"), api.get("/api/queue")]);
  const page = new TrainPage(told, bases, draft());
  await page.images.open(); // before anybody can press what needs them
  const fetching = queue.find((job) => job.kind === "fetch" && job.own);
  if (fetching) page.followFetch(fetching.id);
  replace(content, page.element);
  return () => page.leave();
}

class TrainPage {
  constructor(told, bases, values) {
    this.told = told;
    this.bases = bases;
    this.values = values;
    this.images = new Images(() => this.look(), () => this.phrase());
    this.remarks = h("div", { class: "remarks" });
    this.sentence = h("p", { class: "sentence" });
    this.start = button(t("start_training"), { class: "primary big", onclick: () => this.begin() }, "spark");
    this.element = h("form", { class: "train-form", onsubmit: (event) => event.preventDefault(), novalidate: true },
      h("header", { class: "intro" }, h("h1", {}, t("train_title")), h("p", {}, t("train_text"))),
      h("div", { class: "columns" },
        h("div", { class: "steps" }, this.imagesStep(), this.subjectStep(), this.baseStep(), this.aimStep(), this.advancedStep()),
        h("aside", { class: "summary" }, h("h2", {}, t("summary")), this.sentence, this.start, this.remarks)));
    this.filled();
  }

  leave() {
    clearTimeout(this.timer);
    this.watching?.();
    this.fetchWatch?.();
    this.left = true;
  }

  phrase() {
    return `${this.values.word} ${this.values.what}`.trim();
  }

  step(n, title, text, ...children) {
    const heading = h("h2", { id: id("step") }, h("span", { class: "n", "aria-hidden": "true" }, n), title);
    return h("section", { class: "step", "aria-labelledby": heading.id }, heading, text && h("p", { class: "lead" }, text), children);
  }

  imagesStep() {
    const sample = button(t("try_sample"), { class: "quiet small", onclick: () => this.sample() }, "image");
    const another = button(t("new_images"), { class: "quiet small", onclick: () => attempt(() => this.images.another()) }, "plus");
    this.outline = button(t("find_masks"), { class: "quiet small", onclick: () => this.findMasks() }, "brush");
    if (this.told.captioner) this.images.helper.append(h("div", { class: "row" }, button(t("describe"), { class: "small quiet", onclick: () => this.describe() }, "spark")));
    this.cut = this.told.rembg ? button(t("cut_out"), { class: "quiet small", onclick: () => this.cutOut() }, "brush") : null;
    return this.step(1, t("images"), t("images_text"), this.images.element, h("div", { class: "row" }, sample, this.outline, this.cut, another));
  }

  subjectStep() {
    const word = h("input", { type: "text", value: this.values.word, autocomplete: "off", spellcheck: "false", oninput: () => this.set("word", word.value) });
    const what = h("input", { type: "text", value: this.values.what, autocomplete: "off", oninput: () => this.set("what", what.value) });
    this.inputs = { word, what };
    this.everyday = h("p", { class: "note doubt", hidden: true }, t("everyday"));
    return this.step(2, t("subject"), t("subject_text"),
      h("div", { class: "pair-fields" }, field("word", t("word"), word, t("word_help")), field("what", t("what"), what, t("what_help"))), this.everyday);
  }

  baseStep() {
    this.baseList = h("div", { class: "choices bases", role: "radiogroup", "aria-label": t("base") });
    const hub = h("input", { type: "text", placeholder: "stable-diffusion-v1-5/stable-diffusion-v1-5", autocomplete: "off", spellcheck: "false" });
    this.fetching = h("div", {});
    const fetch = button(t("download"), { class: "small", onclick: () => this.fetchBase(hub.value.trim()) }, "down");
    this.drawBases();
    return this.step(3, t("base"), t("base_text"), h("div", { data: { field: "base" } }, this.baseList),
      h("details", { class: "helper" }, h("summary", {}, t("hub_title")), field("hub", t("hub_name"), hub, t("hub_help"), h("div", { class: "row" }, hub, fetch))), this.fetching);
  }

  drawBases() {
    const group = id("base");
    replace(this.baseList, this.bases.map((base) => {
      const own = id("base");
      const size = [base.family, base.bytes ? bytes(base.bytes) : "", base.license].filter(Boolean).join(" · ");
      return h("div", { class: "choice" }, h("input", { type: "radio", name: group, id: own, value: base.id, checked: base.id === this.values.base, disabled: !base.usable,
        onchange: () => this.set("base", base.id) }), h("label", { for: own }, h("b", {}, base.id === "embedded" ? t("embedded") : base.name),
        h("span", {}, base.usable ? size : t("unknown_family")), base.id === "embedded" ? h("span", {}, t("embedded_text")) : null));
    }));
  }

  aimStep() {
    this.aimGroups = h("div", {});
    this.drawAims();
    return this.step(4, t("aim"), t("aim_text"), this.aimGroups);
  }

  drawAims() {
    replace(this.aimGroups, Object.entries(this.told.presets).map(([kind, presets]) => {
      const group = id("aim");
      return h("fieldset", { class: "choices aims", data: { field: kind } }, h("legend", {}, t(`aim_${kind}`)), presets.map((preset) => {
        const own = id("aim");
        return h("div", { class: "choice" }, h("input", { type: "radio", name: group, id: own, checked: this.values.aims[kind] === preset.name,
          onchange: () => { this.values.aims[kind] = preset.name; this.set("aims", this.values.aims); this.filled(); } }),
          h("label", { for: own }, h("b", {}, t(`preset_${preset.name}`)), h("span", {}, t(`preset_${preset.name}_text`))));
      }));
    }), h("button", { type: "button", class: "link", onclick: () => this.showPresets() }, t("show_presets")));
  }

  showPresets() {
    const chosen = Object.entries(this.told.presets).map(([kind, presets]) => presets.find((one) => one.name === this.values.aims[kind]));
    dialog(t("show_presets"), h("div", {}, h("p", { class: "help" }, t("presets_text")), chosen.map((one) =>
      h("figure", {}, h("figcaption", {}, `${one.name}.toml`), h("pre", { tabindex: 0 }, one.toml)))));
  }

  advancedStep() {
    this.form = settingsForm(this.told.groups, this.values.settings, () => { keepDraft(this.values); this.look(); });
    const reset = button(t("all_defaults"), { class: "quiet small", onclick: () => {
      Object.keys(this.values.settings).forEach((name) => delete this.values.settings[name]);
      keepDraft(this.values);
      this.filled();
      this.look();
    } }, "again");
    return h("details", { class: "step advanced" }, h("summary", {}, h("h2", {}, t("advanced")), h("span", {}, t("advanced_text"))), this.form.element, h("div", { class: "row" }, reset));
  }

  filled() {
    const presets = Object.entries(this.told.presets).flatMap(([kind, all]) => all.filter((one) => one.name === this.values.aims[kind]));
    this.form.fill(Object.assign({}, ...presets.map((one) => one.settings)));
  }

  set(name, value) {
    this.values[name] = value;
    keepDraft(this.values);
    this.look();
  }

  async sample() {
    await attempt(() => this.images.sample());
    this.inputs.word.value = "sks";
    this.inputs.what.value = "teddy";
    this.values.word = "sks";
    this.set("what", "teddy");
  }

  asked() {
    const { word, what, base, aims, settings } = this.values;
    return { images: this.images.set, word, what, base, aims, settings };
  }

  // What `comcat validate` says of all this, a moment after the last change.
  look() {
    clearTimeout(this.timer);
    for (const one of [this.outline, this.cut].filter(Boolean)) one.disabled = !this.images.usable().length;
    const some = this.images.usable().length > 0;
    this.start.disabled = !some || !this.values.word.trim();
    const phrase = this.phrase();
    replace(this.sentence, h("span", {}, t("sentence_lead")), h("q", {}, this.values.aims.subject === "style" ? `a picture in ${phrase}` : `a photo of ${phrase}`));
    if (!some || !this.values.word.trim()) {
      replace(this.remarks, h("p", { class: "help" }, t(some ? "needs_word" : "needs_images")));
      return;
    }
    this.timer = setTimeout(() => this.check(), 500);
  }

  async check() {
    const asked = (this.checked = this.asked());
    replace(this.remarks, h("p", { class: "help" }, h("span", { class: "spin small", "aria-hidden": "true" }), t("looking")));
    let told;
    try {
      told = await api.post("/api/check", asked);
    } catch (error) {
      if (this.checked !== asked || this.left) return;
      clearFaults(this.element);
      this.quietFault(error);
      replace(this.remarks, this.remarkList([{ message: error.message }], "error"));
      return;
    }
    if (this.checked !== asked || this.left) return;
    clearFaults(this.element);
    this.everyday.hidden = !told.everyday;
    const by = new Map();
    for (const one of told.doubts) for (const n of one.images) by.set(n, [...(by.get(n) || []), one.message]);
    this.images.say(by);
    told.errors.forEach((error) => this.quietFault(error));
    replace(this.remarks, this.remarkList(told.errors, "error"), this.remarkList(told.doubts, "doubt"), this.remarkList(told.facts, "fact"));
  }

  // A sentence at the field that it is about, without taking the focus from where somebody is typing.
  quietFault(error) {
    const here = document.activeElement;
    const at = error.field && this.element.querySelector(`[data-field="${CSS.escape(error.field)}"]`);
    if (!at) return;
    const [x, y] = [window.scrollX, window.scrollY];
    fault(this.element, error.field, error.message);
    here?.focus?.({ preventScroll: true });
    window.scrollTo(x, y);
  }

  remarkList(lines, kind) {
    if (!lines.length) return null;
    const list = h("ul", { class: `notes ${kind}s` }, lines.map((one) => h("li", { class: kind }, icon(kind === "fact" ? "info" : "warn"), h("span", {}, one.message))));
    return kind === "fact" ? h("details", {}, h("summary", {}, t("facts", { n: lines.length })), list) : list;
  }

  findMasks() {
    return this.work("outline", { base: this.values.base }, t("finding_masks"));
  }

  // rembg downloads its model when it is first used: only whoever is told of that and says yes has it do so.
  async cutOut() {
    const { model, megabytes } = this.told.rembg;
    const download = !model;
    if (download && !(await confirmed(t("cut_out_question"), t("download"), t("cut_out_download", { n: megabytes }), false))) return;
    this.told.rembg.model = true;
    await this.work("cutout", { download }, t("cutting_out"));
  }

  describe() {
    return this.work("caption", { aim: this.values.aims.subject }, t("describing"));
  }

  // Something that takes a while is done to the images: they are shown anew when it is.
  async work(what, more, said) {
    const told = await attempt(() => api.post(`/api/images/${this.images.set}/${what}`, { word: this.values.word, what: this.values.what, ...more }), this.element);
    if (!told) return;
    say(said);
    this.watching = api.watch(`/api/jobs/${told.id}`, async (job) => {
      if (!job || ["queued", "running", "stopping"].includes(job.state)) return !job;
      if (job.state === "failed") say(job.message, "bad");
      await this.images.reload();
      return true;
    }, 1);
  }

  async fetchBase(name) {
    const told = await attempt(() => api.post("/api/bases", { hub: name }), this.element);
    if (!told) return;
    this.followFetch(told.id);
  }

  // How much of a base is here, also after the page was left and came back.
  followFetch(id) {
    this.fetchWatch?.();
    this.fetchWatch = api.watch(`/api/jobs/${id}`, async (job) => {
      if (!job) { replace(this.fetching); return true; }
      if (LIVE.includes(job.state)) {
        replaceIfNew(this.fetching, [job.state, job.done, job.position, Math.round(job.seconds_left || 0)], () => h("div", { class: "fetching" },
          h("p", {}, h("b", {}, job.title)), progress(job),
          job.own ? button(t("cancel"), { class: "quiet small", onclick: () => attempt(() => api.post(`/api/jobs/${id}/cancel`)) }, "close") : null));
        return false;
      }
      if (job.state === "done") {
        this.bases = await api.get("/api/bases");
        this.drawBases();
      }
      replaceIfNew(this.fetching, job.state, () => h("p", { class: `note ${job.state === "failed" ? "error" : "fact"}`, role: "status" },
        job.state === "done" ? t("downloaded") : job.message || t(`state_${job.state}`)));
      return true;
    }, 1);
  }

  async begin() {
    clearTimeout(this.timer);
    this.start.disabled = true;
    const told = await attempt(() => api.post("/api/train", this.asked()), this.element);
    this.start.disabled = false;
    if (told) location.hash = `#/${told.id}`;
  }
}
