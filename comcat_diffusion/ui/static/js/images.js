// The first step: images as they are brought, with all that is said of each; cut, captioned and masked one by one.

import * as api from "./api.js";
import { button, h, icon, iconButton, id, replace, replaceIfNew } from "./dom.js";
import { attempt, confirmed, dialog, say } from "./parts.js";
import { number, t } from "./texts.js";
import { Painter } from "./painter.js";

const TEXTS = /\.(txt|caption)$/i;
const MASK = /mask/i;

export class Images {
  constructor(changed, subject) {
    this.changed = changed; // called after the set has changed
    this.subject = subject; // () => "sks dog"
    this.pictures = [];
    this.remarks = new Map(); // sentences of the check by number
    this.busy = [];
    this.list = h("ul", { class: "images" });
    this.pick = h("input", { type: "file", multiple: true, class: "hidden-file", id: id("files"), accept: "image/*,.heic,.heif,.avif,.txt,.caption",
      onchange: () => { this.add([...this.pick.files]); this.pick.value = ""; } });
    this.drop = h("label", { class: "drop", for: this.pick.id }, icon("image"), h("b", {}, t("drop_title")), h("span", {}, t("drop_text")));
    this.template = h("input", { type: "text", id: id("template"), value: t("template_start") });
    this.helper = h("details", { class: "helper" }, h("summary", {}, t("captions_helper")),
      h("p", { class: "help" }, t("captions_why")),
      h("div", { class: "row" }, h("label", { for: this.template.id, class: "sr" }, t("template")), this.template,
        button(t("fill_empty"), { class: "small", onclick: () => this.write(false) }), button(t("fill_all"), { class: "small quiet", onclick: () => this.write(true) })));
    this.outline = button(t("find_masks"), { class: "small quiet" }, "spark");
    this.element = h("div", { class: "image-step" }, h("div", { class: "drop-zone" }, this.pick, this.drop), this.list, this.helper);
    for (const name of ["dragover", "drop"]) {
      this.element.addEventListener(name, (event) => {
        event.preventDefault();
        this.drop.classList.toggle("over", name === "dragover");
        if (name === "drop") this.add([...event.dataTransfer.files]);
      });
    }
    this.element.addEventListener("dragleave", () => this.drop.classList.remove("over"));
  }

  async open() {
    const known = localStorage.getItem("images");
    try {
      if (!known) throw new Error();
      this.take(await api.get(`/api/images/${known}`));
    } catch {
      this.take(await api.post("/api/images"));
    }
  }

  take(told) {
    this.set = told.id;
    localStorage.setItem("images", told.id);
    this.pictures = told.pictures;
    this.draw();
    this.changed();
  }

  async another() {
    this.take(await api.post("/api/images"));
  }

  async reload() {
    this.take(await api.get(`/api/images/${this.set}`));
  }

  async sample() {
    this.take(await api.post(`/api/images/${this.set}/sample`));
  }

  // Images first, then the masks and captions that belong to them.
  async add(files) {
    const order = (file) => (TEXTS.test(file.name) ? 2 : MASK.test(file.name) ? 1 : 0);
    const sorted = files.sort((a, b) => order(a) - order(b) || a.name.localeCompare(b.name, undefined, { numeric: true }));
    this.busy.push(...sorted);
    this.draw();
    for (const file of sorted) {
      const told = await attempt(() => api.put(`/api/images/${this.set}?name=${encodeURIComponent(file.name)}`, file));
      this.busy = this.busy.filter((one) => one !== file);
      told ? this.take(told) : this.draw();
    }
  }

  async change(one, value) {
    const told = await attempt(() => api.patch(`/api/images/${this.set}/${one.number}`, value));
    if (told) this.take(told);
  }

  async write(all) {
    for (const one of this.usable()) {
      if (all || !one.caption) await this.change(one, { caption: this.template.value.replaceAll("{subject}", this.subject()) });
    }
    this.draw();
  }

  usable() {
    return this.pictures.filter((one) => !one.problem && !one.left_out);
  }

  say(remarks) {
    this.remarks = remarks;
    this.draw();
  }

  draw() {
    const waiting = this.busy.map((file) => h("li", { class: "image waiting" }, h("div", { class: "thumb" }, h("span", { class: "spin", "aria-hidden": "true" })), h("p", { class: "name" }, file.name)));
    this.helper.hidden = !this.pictures.length;
    this.drop.classList.toggle("less", Boolean(this.pictures.length));
    const seen = new Map([...this.list.children].map((item) => [item.dataset.number, item]));
    replace(this.list, this.pictures.map((one) => this.card(one, seen.get(String(one.number)))), waiting);
  }

  // The card of an image; one that says the same as before stays, with the caret in its caption.
  card(one, before) {
    const remarks = this.remarks.get(one.number) || [];
    const { caption, ...rest } = one;
    const key = JSON.stringify([rest, remarks]);
    if (before?.dataset.key === key) {
      const field = before.querySelector("textarea");
      if (field && document.activeElement !== field) field.value = caption;
      return before;
    }
    return h("li", { class: `image${one.left_out || one.problem ? " out" : ""}`, data: { number: one.number, key } }, ...this.inside(one, remarks));
  }

  inside(one, remarks) {
    const view = (kind) => `/api/images/${this.set}/${one.number}/${kind}`;
    const notes = [...one.notes.map((note) => [note, "fact"]), ...remarks.map((note) => [note, "doubt"])];
    if (one.problem) notes.unshift([one.problem, "error"]);
    const thumb = h("div", { class: "thumb" },
      one.problem ? icon("warn") : h("img", { src: view("small"), alt: one.called, loading: "lazy" }),
      one.mask ? h("img", { src: `${view("mask")}?${Date.now()}`, alt: "", class: "mask" }) : null,
      !one.problem && (one.crop || one.size[0] !== one.size[1]) ? cropFrame(one) : null);
    const name = h("p", { class: "name", title: one.called }, one.called);
    const size = one.problem ? null : h("p", { class: "size" }, `${number(one.size[0])} × ${number(one.size[1])}${one.mask ? ` · ${t(`mask_${one.mask}`)}` : ""}`);
    const tools = h("div", { class: "tools" },
      one.problem ? null : h("button", { type: "button", class: "link", onclick: () => this.edit(one) }, t("crop_and_mask")),
      one.problem ? null : h("button", { type: "button", class: "link", "aria-pressed": String(one.left_out), onclick: () => this.change(one, { left_out: !one.left_out }) }, t(one.left_out ? "take_in" : "leave_out")),
      iconButton(t("remove_image", { name: one.called }), "trash", { onclick: async () => this.take(await api.remove(`/api/images/${this.set}/${one.number}`)) }));
    const own = id("caption");
    const caption = one.problem ? null : h("textarea", { id: own, rows: 3, placeholder: t("caption_hint"), onchange: (event) => this.change(one, { caption: event.target.value }) });
    if (caption) caption.value = one.caption;
    return [thumb, name, size, notes.length ? h("ul", { class: "notes" }, notes.map(([text, kind]) => h("li", { class: kind }, text))) : null,
      caption && h("label", { class: "sr", for: own }, t("caption_of", { name: one.called })), caption, tools];
  }

  edit(one) {
    const [width, height] = one.size;
    const painter = new Painter({ picture: `/api/images/${this.set}/${one.number}/large`, width, height, layers: [{ name: t("mask"), colour: "#6246ea" }], label: t("mask_of", { name: one.called }) });
    if (one.mask) painter.load(`/api/images/${this.set}/${one.number}/mask?${Date.now()}`);
    const crop = new Crop(one);
    painter.element.querySelector(".sheet").append(crop.frame);
    const keep = async () => {
      const told = await attempt(async () => {
        let last = await api.patch(`/api/images/${this.set}/${one.number}`, { crop: crop.value });
        if (painter.touched && painter.isEmpty()) last = await api.patch(`/api/images/${this.set}/${one.number}`, { mask: "" });
        else if (painter.touched) {
          const blob = await new Promise((done) => painter.mask().toBlob(done, "image/png"));
          last = await api.put(`/api/images/${this.set}/${one.number}/mask`, blob);
        }
        return last;
      });
      if (told) { box.close(); this.take(told); }
    };
    const box = dialog(one.called, h("div", { class: "editor" }, h("p", { class: "help" }, t("mask_help")), painter.element, crop.tools), [
      button(t("cancel_edit"), { class: "quiet", onclick: () => box.close() }), button(t("keep"), { class: "primary", onclick: keep }, "check")], true);
  }
}

// The square of the middle, as the training cuts it if nobody moves it.
function middle([width, height]) {
  const side = Math.min(width, height);
  return [Math.floor((width - side) / 2), Math.floor((height - side) / 2), side];
}

function cropFrame(one) {
  const [left, top, side] = one.crop || middle(one.size);
  const [width, height] = one.size;
  const square = Math.max(width, height); // the thumbnail shows the whole picture inside a square
  const part = (value) => `${(value / square) * 100}%`;
  return h("span", { class: "crop", "aria-hidden": "true", style: {
    left: part(left + (square - width) / 2), top: part(top + (square - height) / 2), width: part(side), height: part(side) } });
}

// Which square of an image is trained on: its middle, unless it is moved or made smaller.
class Crop {
  constructor(one) {
    [this.width, this.height] = one.size;
    const side = Math.min(this.width, this.height);
    this.middle = middle(one.size);
    this.box = one.crop ? [...one.crop] : [...this.middle];
    this.frame = h("span", { class: "crop-frame", "aria-hidden": "true" });
    const slider = (key, n, most) => h("input", { type: "range", id: id(key), min: n === 2 ? Math.min(64, side) : 0, max: most, value: this.box[n],
      oninput: (event) => { this.box[n] = Number(event.target.value); this.place(); } });
    this.sliders = [slider("left", 0, this.width), slider("top", 1, this.height), slider("side", 2, side)];
    const labels = ["crop_left", "crop_top", "crop_side"];
    this.tools = h("fieldset", { class: "crop-tools" }, h("legend", {}, t("crop")), [2, 0, 1].map((n) => h("span", { class: "inline" }, h("label", { for: this.sliders[n].id }, t(labels[n])), this.sliders[n])),
      button(t("crop_middle"), { class: "quiet small", onclick: () => { this.box = [...this.middle]; this.place(); } }));
    this.place();
  }

  get value() {
    return this.box.every((part, n) => part === this.middle[n]) ? null : this.box;
  }

  place() {
    const [left, top, side] = this.box;
    this.box = [Math.min(left, this.width - side), Math.min(top, this.height - side), side];
    this.sliders[0].max = this.width - side;
    this.sliders[1].max = this.height - side;
    this.sliders.forEach((slider, n) => { slider.value = this.box[n]; });
    const part = (value, of) => `${(value / of) * 100}%`;
    Object.entries({ left: part(this.box[0], this.width), top: part(this.box[1], this.height), width: part(side, this.width), height: part(side, this.height) })
      .forEach(([name, value]) => this.frame.style.setProperty(name, value));
  }
}
