// A brush on a picture, for masks and regions: by mouse, pen, finger, or arrow keys and the space bar.

import { button, h, id } from "./dom.js";
import { t } from "./texts.js";

const SIDE = 768; // longest side of a painting in pixels

// `layers` are {name, colour}; one is painted at a time, and what one has no other has. `picture` may be none; `from` is a
// painter of another shape whose layers are taken over.
export class Painter {
  constructor({ picture, width, height, layers, label, from = null }) {
    const scale = SIDE / Math.max(width, height);
    this.width = Math.round(width * scale);
    this.height = Math.round(height * scale);
    this.layers = layers.map((layer) => ({ ...layer, canvas: this.canvas() }));
    from?.layers.forEach((layer, n) => this.layers[n].canvas.getContext("2d").drawImage(layer.canvas, 0, 0, this.width, this.height));
    this.current = 0;
    this.erasing = false;
    this.size = Math.round(SIDE / 8);
    this.cursor = [this.width / 2, this.height / 2];
    this.touched = false;
    this.shown = this.canvas({ tabindex: 0, role: "img", "aria-label": `${label} ${t("paint_keys")}` });
    this.listen();
    this.element = h("div", { class: "painter" },
      h("div", { class: "sheet" }, picture ? h("img", { src: picture, alt: "" }) : null, this.shown), this.tools());
    this.draw();
  }

  canvas(props = {}) {
    const made = h("canvas", props);
    made.width = this.width;
    made.height = this.height;
    return made;
  }

  tools() {
    const size = h("input", { type: "range", min: 10, max: SIDE / 3, value: this.size, id: id("brush"), oninput: () => { this.size = Number(size.value); this.draw(); } });
    const erase = h("input", { type: "checkbox", id: id("erase"), onchange: () => { this.erasing = erase.checked; } });
    const choose = this.layers.length > 1 && h("fieldset", { class: "layers" }, h("legend", {}, t("paint_for")),
      this.layers.map((layer, n) => { const own = id("layer"); return h("span", {}, h("input", { type: "radio", name: "layer", id: own, checked: n === 0,
        onchange: () => { this.current = n; } }), h("label", { for: own }, h("span", { class: "swatch", style: { background: layer.colour } }), layer.name)); }));
    return h("div", { class: "tools" }, choose,
      h("span", { class: "inline" }, h("label", { for: size.id }, t("brush_size")), size),
      h("span", { class: "inline" }, erase, h("label", { for: erase.id }, t("erase"))),
      button(t("clear"), { class: "quiet small", onclick: () => this.fill(false) }),
      this.layers.length === 1 ? button(t("invert"), { class: "quiet small", onclick: () => this.invert() }) : null);
  }

  listen() {
    let last = null;
    const at = (event) => {
      const box = this.shown.getBoundingClientRect();
      return [(event.clientX - box.left) * this.width / box.width, (event.clientY - box.top) * this.height / box.height];
    };
    this.shown.addEventListener("pointerdown", (event) => {
      this.shown.setPointerCapture(event.pointerId);
      last = at(event);
      this.stroke(last, last);
    });
    this.shown.addEventListener("pointermove", (event) => {
      this.cursor = at(event);
      if (last) { this.stroke(last, this.cursor); last = this.cursor; } else this.draw();
    });
    for (const name of ["pointerup", "pointercancel"]) this.shown.addEventListener(name, () => { last = null; });
    this.shown.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 64 : 16;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (event.key === " ") this.stroke(this.cursor, this.cursor);
      else if (moves[event.key]) {
        const [x, y] = moves[event.key];
        this.cursor = [Math.min(Math.max(this.cursor[0] + x, 0), this.width), Math.min(Math.max(this.cursor[1] + y, 0), this.height)];
        this.draw();
      } else return;
      event.preventDefault();
    });
  }

  stroke([x0, y0], [x1, y1]) {
    this.touched = true;
    this.layers.forEach((layer, n) => {
      const pen = layer.canvas.getContext("2d");
      pen.globalCompositeOperation = n === this.current && !this.erasing ? "source-over" : "destination-out";
      pen.strokeStyle = pen.fillStyle = "white";
      pen.lineWidth = this.size;
      pen.lineCap = "round";
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.lineTo(x1 + 0.01, y1);
      pen.stroke();
    });
    this.draw();
  }

  fill(white) {
    this.touched = true;
    for (const layer of this.layers) {
      const pen = layer.canvas.getContext("2d");
      pen.globalCompositeOperation = "source-over";
      pen.clearRect(0, 0, this.width, this.height);
      if (white) { pen.fillStyle = "white"; pen.fillRect(0, 0, this.width, this.height); }
    }
    this.draw();
  }

  invert() {
    this.touched = true;
    const pen = this.layers[0].canvas.getContext("2d");
    const pixels = pen.getImageData(0, 0, this.width, this.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = 255 - pixels.data[i + 3];
      pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 255;
    }
    pen.putImageData(pixels, 0, 0);
    this.draw();
  }

  // A grey picture, white where it is painted, as a starting point.
  load(source, n = 0) {
    return new Promise((done) => {
      const image = new Image();
      image.onload = () => {
        const pen = this.layers[n].canvas.getContext("2d");
        pen.drawImage(image, 0, 0, this.width, this.height);
        const pixels = pen.getImageData(0, 0, this.width, this.height);
        for (let i = 0; i < pixels.data.length; i += 4) {
          pixels.data[i + 3] = pixels.data[i];
          pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 255;
        }
        pen.putImageData(pixels, 0, 0);
        this.draw();
        done();
      };
      image.onerror = done;
      image.src = source;
    });
  }

  draw() {
    const pen = this.shown.getContext("2d");
    pen.clearRect(0, 0, this.width, this.height);
    for (const layer of this.layers) {
      const tinted = this.canvas();
      const own = tinted.getContext("2d");
      own.drawImage(layer.canvas, 0, 0);
      own.globalCompositeOperation = "source-in";
      own.fillStyle = layer.colour;
      own.fillRect(0, 0, this.width, this.height);
      pen.globalAlpha = 0.55;
      pen.drawImage(tinted, 0, 0);
      pen.globalAlpha = 1;
    }
    pen.beginPath();
    pen.arc(...this.cursor, this.size / 2, 0, 7);
    pen.lineWidth = 3;
    pen.strokeStyle = "rgba(0, 0, 0, 0.7)";
    pen.stroke();
    pen.lineWidth = 1.5;
    pen.strokeStyle = "white";
    pen.stroke();
  }

  isEmpty(n = 0) {
    const pixels = this.layers[n].canvas.getContext("2d").getImageData(0, 0, this.width, this.height).data;
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i] > 40) return false;
    return true;
  }

  // A layer as a black and white PNG canvas.
  mask(n = 0) {
    const made = this.canvas();
    const pen = made.getContext("2d");
    pen.fillStyle = "black";
    pen.fillRect(0, 0, this.width, this.height);
    pen.drawImage(this.layers[n].canvas, 0, 0);
    return made;
  }
}
