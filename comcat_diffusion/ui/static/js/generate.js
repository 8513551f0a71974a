// Drawing: which adapters and how strong, what to draw, and what came of it, beside what the base draws of that seed.

import { inside } from "./adapters.js";
import * as api from "./api.js";
import { button, h, icon, id, replace, replaceIfNew } from "./dom.js";
import { show } from "./gallery.js";
import { Painter } from "./painter.js";
import { attempt, divider, empty, fault, field, progress, say, whole } from "./parts.js";
import { control, settingsForm } from "./settings.js";
import { about, number, t } from "./texts.js";

const COLOURS = ["#6246ea", "#d9730d", "#0f7b6c", "#c4286b"];
const LIVE = ["queued", "running", "stopping"];
const KEPT = "drawing";
const SHAPES = ["1:1", "5:4", "4:3", "3:2", "16:9", "4:5", "3:4", "2:3", "9:16"]; // width to height

export async function generatePage(content) {
  const [told, cards] = await Promise.all([api.get("/api/draw"), api.get("/api/adapters")]);
  const page = new GeneratePage(told, cards);
  replace(content, page.element);
  await page.recall();
  return () => page.leave();
}

class GeneratePage {
  constructor(told, cards) {
    this.told = told;
    this.cards = cards;
    this.values = {}; // settings that were typed in
    this.chosen = new Map(); // scale by the id of an adapter
    this.cardList = h("ul", { class: "cards small" });
    this.scales = h("div", { class: "scales" });
    this.regions = h("div", { class: "regions", data: { field: "region" } });
    this.result = h("section", { class: "result", "aria-live": "polite", "aria-label": t("result") });
    this.element = h("form", { class: "generate-form", novalidate: true, onsubmit: (event) => { event.preventDefault(); this.draw(); } },
      h("header", { class: "intro" }, h("h1", {}, t("nav_generate")), h("p", {}, t("generate_text"))),
      h("div", { class: "columns" }, h("div", { class: "controls" }, this.adapterPart(), this.promptPart(), this.sizePart(), this.advancedPart()), this.result));
    for (const name of ["dragover", "drop"]) {
      this.element.addEventListener(name, (event) => {
        event.preventDefault();
        if (name === "drop" && event.dataTransfer.files[0]) this.readBack(event.dataTransfer.files[0]);
      });
    }
    this.drawCards();
    this.showNothing();
  }

  leave() {
    clearTimeout(this.timer);
    this.watching?.();
  }

  // What was chosen elsewhere, what was being drawn, or what was typed the last time.
  async recall() {
    const chosen = take("chosen");
    const again = take("again");
    const kept = JSON.parse(localStorage.getItem(KEPT) || "null");
    this.recalled = true;
    if (kept) await this.fill(kept, false);
    if (again) await this.fill(again, true);
    else if (chosen) { this.chosen = new Map(chosen.map((one) => [one, 1])); this.prompt.value = ""; this.drawCards(true); }
    if (!this.chosen.size && this.cards.length && !again) { this.chosen.set(this.cards[0].id, 1); this.drawCards(true); }
    if (kept?.job && !again && !chosen) this.follow(kept.job);
  }

  adapterPart() {
    const hint = this.cards.length ? null : h("p", { class: "help" }, t("no_adapters_here"), about.teaches ? h("a", { href: "#/train" }, t("start_one")) : null);
    return h("fieldset", { class: "card part", data: { field: "adapters" } }, h("legend", {}, t("adapters")), hint, this.cardList, this.scales, this.regions);
  }

  drawCards(prompt = false) {
    for (const one of this.chosen.keys()) if (!this.cards.some((card) => card.id === one)) this.chosen.delete(one);
    replace(this.cardList, this.cards.map((card) => {
      const own = id("card");
      return h("li", {}, h("input", { type: "checkbox", id: own, checked: this.chosen.has(card.id), onchange: (event) => {
        event.target.checked ? this.chosen.set(card.id, 1) : this.chosen.delete(card.id);
        this.chosenChanged(true);
      } }), h("label", { for: own, class: "adapter" }, inside(card)));
    }));
    this.chosenChanged(prompt);
  }

  chosenChanged(prompt) {
    const cards = this.chosenCards();
    replace(this.scales, cards.map((card) => {
      const own = id("scale");
      const shown = h("output", { for: own }, number(this.chosen.get(card.id), 2));
      const range = h("input", { type: "range", id: own, min: 0, max: 1.5, step: 0.05, value: this.chosen.get(card.id),
        oninput: () => { this.chosen.set(card.id, Number(range.value)); shown.textContent = number(Number(range.value), 2); this.keep(); },
        onchange: () => { if (this.live.checked) this.draw(true); } });
      return h("div", { class: "scale", data: { field: "scale" } }, h("label", { for: own }, cards.length > 1 ? t("strength_of", { name: card.phrase || card.name }) : t("strength")), range, shown);
    }));
    if (prompt && (!this.prompt.value.trim() || this.prompt.value === this.proposed)) {
      this.proposed = cards.length === 1 ? cards[0].prompt : cards.length ? `a photo of ${cards.map((card) => card.phrase).filter(Boolean).join(" and ")}` : "";
      this.prompt.value = this.proposed;
    }
    this.sized();
    const style = cards.length > 0 && cards.every((card) => card.style);
    this.form?.fill(style ? { keep_background: false } : {});
    this.styled = style;
    this.drawRegions(cards);
    this.keep();
  }

  chosenCards() {
    return [...this.chosen.keys()].map((one) => this.cards.find((card) => card.id === one)).filter(Boolean);
  }

  drawRegions(cards) {
    const [width, height] = this.size();
    const key = JSON.stringify([cards.map((card) => card.id), width / height]);
    if (this.regionsFor === key) return;
    const painted = this.painter && JSON.parse(this.regionsFor)[0].join() === cards.map((card) => card.id).join() ? this.painter : null;
    this.regionsFor = key;
    this.painter = null;
    if (cards.length < 2) { replace(this.regions); return; }
    this.painter = new Painter({ width, height, from: painted, label: t("regions"), layers: cards.map((card, n) => ({ name: card.phrase || card.name, colour: COLOURS[n % COLOURS.length] })) });
    replace(this.regions, h("details", { class: "helper", open: Boolean(this.regions.querySelector("details")?.open) }, h("summary", {}, t("regions")), h("p", { class: "help" }, t("regions_text")), this.painter.element));
  }

  promptPart() {
    this.prompt = h("textarea", { rows: 3, oninput: () => this.keep() });
    this.negative = h("input", { type: "text", autocomplete: "off", oninput: () => { put(this.values, "negative_prompt", this.negative.value.trim()); this.keep(); } });
    return h("div", { class: "card part" }, field("prompt", t("prompt"), this.prompt, t("prompt_help")),
      about.teaches ? field("negative_prompt", t("negative"), this.negative, t("negative_help")) : null, this.goPart());
  }

  sizePart() {
    const fields = this.told.fields;
    this.count = h("input", { type: "number", min: 1, max: 16, value: 4, oninput: () => this.keep() });
    this.compare = h("input", { type: "checkbox", role: "switch", id: id("compare"), checked: true, onchange: () => this.keep() });
    this.live = h("input", { type: "checkbox", role: "switch", id: id("live") });
    this.grid = h("input", { type: "text", autocomplete: "off", placeholder: "0.4, 0.7, 1", oninput: () => this.keep() });
    this.parts = [];
    const part = (name, more = {}) => {
      if (!fields[name]) return null;
      const made = control({ ...fields[name], ...more }, this.values, () => { if (name === "width" || name === "height") this.typed(); this.keep(); });
      this.parts.push(made);
      return made.element;
    };
    const samplers = { kind: "text", choices: this.told.schedulers.map((one) => one.value), names: Object.fromEntries(this.told.schedulers.map((one) => [one.value, one.name])) };
    const seed = part("seed") || field("seed", t("seed"), h("input", { type: "number", min: 0, step: 1, oninput: (event) => { put(this.values, "seed", event.target.value === "" ? null : Number(event.target.value)); this.keep(); } }));
    const box = h("div", { class: "card part" }, h("div", { class: "pair-fields" }, field("num_images", t("how_many"), this.count), seed), this.shapePart(part),
      part("num_inference_steps"), part("guidance_scale"), part("scheduler", samplers),
      h("div", { class: "field switch" }, this.compare, h("label", { for: this.compare.id }, t("compare")), h("p", { class: "help" }, t("compare_help"))),
      h("div", { class: "field switch" }, this.live, h("label", { for: this.live.id }, t("live")), h("p", { class: "help" }, t("live_help"))),
      field("strengths", t("grid"), this.grid, t("grid_help")));
    this.parts.forEach((one) => one.fill({}));
    return box;
  }

  // The shape, and under it the sides in pixels that it makes with the area of the base's own square.
  shapePart(part) {
    if (!this.told.fields.width) return null;
    this.shape = h("select", { onchange: () => { this.reshape(); this.keep(); } }, SHAPES.map((one) => h("option", { value: one }, one === "1:1" ? t("square") : one.replace(":", " : "))), h("option", { value: "" }, t("shape_own")));
    this.sides = ["width", "height"].map((name) => part(name));
    return h("div", { class: "shape" }, field("shape", t("shape"), this.shape, t("shape_help")), h("div", { class: "pair-fields" }, this.sides));
  }

  // A side was typed: the shape that is shown is that of both.
  typed() {
    this.shape.value = this.shapeOf(this.size());
    this.drawRegions(this.chosenCards());
  }

  // [side, step] in pixels of the base that is drawn with.
  steps() {
    return this.chosenCards()[0]?.steps ?? this.told.steps;
  }

  size() {
    const [side] = this.steps();
    return [this.values.width || side, this.values.height || side];
  }

  // The sides, multiples of the step, that are nearest to a shape and to the area of the square; the shape counts twice.
  sidesOf(shape) {
    const [side, step] = this.steps();
    const [wide, high] = shape.split(":").map(Number);
    const near = (length) => [-1, 0, 1].map((n) => step * Math.max(1, Math.round(length / step) + n));
    const far = ([w, h]) => 2 * Math.abs(Math.log((w * high) / (h * wide))) + Math.abs(Math.log((w * h) / (side * side)));
    const all = near(side * Math.sqrt(wide / high)).flatMap((w) => near(side * Math.sqrt(high / wide)).map((h) => [w, h]));
    return all.sort((one, other) => far(one) - far(other))[0];
  }

  // The shape of the sides that are there: the one that is chosen, if it is of these, else the first.
  shapeOf([width, height]) {
    const known = [this.shape.value, ...SHAPES].filter(Boolean);
    return known.find((one) => String(this.sidesOf(one)) === String([width, height])) ?? "";
  }

  // Fill in the sides of the shape that is chosen; a square is what is drawn where none are given.
  reshape() {
    const shape = this.shape.value;
    if (!shape) return;
    const [width, height] = shape === "1:1" ? [null, null] : this.sidesOf(shape);
    put(this.values, "width", width);
    put(this.values, "height", height);
    this.sized();
  }

  // Show the sides, and the shape that they are of; another base has other sides of that shape.
  sized() {
    if (!this.shape) return;
    const [side, step] = this.steps();
    if (this.sizedFor && this.sizedFor !== String([side, step]) && this.shape.value && this.shape.value !== "1:1") {
      this.sizedFor = String([side, step]);
      this.reshape();
      return;
    }
    this.sizedFor = String([side, step]);
    for (const input of this.element.querySelectorAll('[data-field="width"] input, [data-field="height"] input')) Object.assign(input, { min: step, step });
    this.parts.forEach((one) => one.fill({ width: side, height: side }));
    this.shape.value = this.shapeOf(this.size());
    this.drawRegions(this.chosenCards());
  }

  advancedPart() {
    this.form = this.told.groups.length ? settingsForm(this.told.groups, this.values, () => this.keep()) : null;
    this.form?.fill({});
    return this.form ? h("details", { class: "card part advanced" }, h("summary", {}, h("h2", {}, t("advanced"))), this.form.element) : h("div", {});
  }

  goPart() {
    const read = h("input", { type: "file", accept: "image/png", class: "hidden-file", id: id("png"), onchange: () => { this.readBack(read.files[0]); read.value = ""; } });
    return h("div", { class: "go" }, h("button", { type: "submit", class: "button primary big" }, icon("spark"), h("span", {}, t("generate"))),
      about.teaches ? [read, h("label", { for: read.id, class: "button quiet small" }, icon("image"), h("span", {}, t("read_png")))] : null);
  }

  showNothing() {
    replace(this.result, empty(t("nothing_drawn"), t("nothing_drawn_text")));
  }

  keep() {
    if (!this.recalled) return; // what was kept is not read yet
    localStorage.setItem(KEPT, JSON.stringify({ prompt: this.prompt?.value, typed: this.values, adapters: [...this.chosen].map(([one, scale]) => ({ id: one, scale })), num_images: Number(this.count?.value) || 4, job: this.jobId }));
  }

  async fill(wanted, start) {
    this.chosen = new Map((wanted.adapters || []).map((one) => [one.id, one.scale]));
    this.jobId = wanted.job;
    Object.keys(this.values).forEach((name) => delete this.values[name]);
    const { resolution, ...typed } = wanted.typed || {};
    Object.assign(this.values, resolution ? { width: resolution, height: resolution } : {}, typed);
    this.prompt.value = wanted.prompt || "";
    if (this.negative) this.negative.value = this.values.negative_prompt || "";
    if (wanted.num_images) this.count.value = wanted.num_images;
    this.parts.forEach((one) => one.fill({}));
    this.sizedFor = null; // these sides are meant as they are
    this.drawCards();
    await this.paint((wanted.adapters || []).map((one) => one.region));
    if (start) await this.draw();
  }

  // What was painted for each adapter, from pictures of an earlier drawing.
  async paint(regions) {
    if (!this.painter) return;
    this.painter.fill(false);
    if (!regions.some(Boolean) || regions.length !== this.painter.layers.length) return;
    await Promise.all(regions.map((region, n) => region && this.painter.load(region, n)));
    this.regions.querySelector("details").open = true;
  }

  async readBack(file) {
    const told = file && (await attempt(() => api.postFile("/api/pictures/read", file), this.element));
    if (!told) return;
    await this.fill({ ...told, num_images: 1 }, false);
    say(told.missing.length ? t("read_but_missing", { names: told.missing.join(", ") }) : t(told.painted ? "read_but_painted" : "read_back"));
  }

  async asked(one) {
    const cards = this.chosenCards();
    const painted = this.painter && cards.length > 1 && cards.some((card, n) => !this.painter.isEmpty(n));
    const adapters = cards.map((card, n) => ({ id: card.id, scale: this.chosen.get(card.id), region: painted ? this.painter.mask(n).toDataURL("image/png") : null }));
    const strengths = this.grid.value.split(/[,;\s]+/).filter(Boolean).map((text) => Number(text.replace(",", ".")));
    const settings = { ...this.values };
    if (this.styled && settings.keep_background === undefined && about.teaches) settings.keep_background = false;
    return { prompt: this.prompt.value, adapters, settings, strengths: one || !strengths.length ? [1] : strengths, num_images: one ? 1 : Number(this.count.value), compare: this.compare.checked };
  }

  async draw(one = false) {
    const asked = await this.asked(one);
    const told = await attempt(() => api.post("/api/draw", asked), this.element);
    if (!told) return;
    this.follow(told.id);
    this.result.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  follow(jobId) {
    this.watching?.();
    this.jobId = jobId;
    this.keep();
    this.watching = api.watch(`/api/jobs/${jobId}`, (job) => {
      if (!job) { this.jobId = null; this.keep(); this.showNothing(); return true; }
      const key = [job.state, job.phase, job.done, job.position, Math.round(job.seconds_left || 0)];
      replaceIfNew(this.result, key, () => this.shown(job));
      return !LIVE.includes(job.state);
    }, 0.7);
  }

  shown(job) {
    if (LIVE.includes(job.state)) {
      return h("div", { class: "card" }, progress(job), job.own ? button(t("cancel"), { class: "quiet small", onclick: () => attempt(() => api.post(`/api/jobs/${job.id}/cancel`)) }, "close") : null);
    }
    if (job.state === "failed" && job.field) fault(this.element, job.field, job.message);
    if (job.state !== "done") return h("p", { class: `note ${job.state === "failed" ? "error" : "fact"}`, role: "alert" }, job.message || t(`state_${job.state}`));
    return this.pictures(job, job.result.pictures);
  }

  pictures(job, pictures) {
    const large = h("div", { class: "large" });
    const told = async (one) => show({ ...one, job: (await api.get("/api/pictures")).find((other) => other.id === job.id) }, (wanted) => this.fill(wanted, true));
    const choose = (one) => {
      const own = api.fileOf(job.id, one.file);
      const label = `${one.prompt}, ${t("seed_n", { n: one.seed })}`;
      replace(large, one.base ? divider(api.fileOf(job.id, one.base), own, label) : whole(own, label),
        h("div", { class: "row" }, h("span", { class: "help" }, t("seed_n", { n: one.seed })), button(t("details"), { class: "small quiet", onclick: () => told(one) }, "info"),
          h("a", { class: "button small quiet", href: `${own}?keep=1`, download: "" }, icon("down"), h("span", {}, t("download")))));
      thumbs.querySelectorAll("button").forEach((thumb) => thumb.setAttribute("aria-pressed", String(thumb.dataset.file === one.file)));
    };
    const thumb = (one) => h("button", { type: "button", class: "picture", data: { file: one.file }, onclick: () => choose(one) },
      h("img", { src: api.fileOf(job.id, one.file), alt: `${t("seed_n", { n: one.seed })}, ${t("strength")} ${number(one.strength, 2)}` }));
    const strengths = [...new Set(pictures.map((one) => one.strength))];
    const seeds = [...new Set(pictures.map((one) => one.seed))];
    const thumbs = strengths.length > 1
      ? h("div", { class: "strip-scroll", tabindex: 0, role: "group", "aria-label": t("grid") }, h("table", { class: "samples" }, h("thead", {}, h("tr", {}, h("td", {}), seeds.map((seed) => h("th", { scope: "col" }, t("seed_n", { n: seed }))))),
        h("tbody", {}, strengths.map((strength) => h("tr", {}, h("th", { scope: "row" }, number(strength, 2)), seeds.map((seed) => h("td", {}, thumb(pictures.find((one) => one.seed === seed && one.strength === strength)))))))))
      : h("div", { class: "thumbs" }, pictures.map(thumb));
    choose(pictures[0]);
    return h("div", {}, large, pictures.length > 1 ? thumbs : null);
  }
}

function put(values, name, value) {
  if (value === "" || value === null) delete values[name];
  else values[name] = value;
}

function take(name) {
  const value = sessionStorage.getItem(name);
  sessionStorage.removeItem(name);
  return value ? JSON.parse(value) : null;
}
