// The loss of a run: a smooth line over a faint one, and what held-out images say, as dots.

import { h, svg } from "./dom.js";
import { number, t } from "./texts.js";

const HEIGHT = 240;
const EDGE = { left: 48, right: 12, top: 12, bottom: 28 };
const MOST_POINTS = 400;

// Exponential mean over about a tenth of the run, without the pull of the first value.
export function smoothed(values) {
  const keep = Math.max(0, 1 - 1 / Math.max(2, Math.min(40, values.length / 10)));
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return sum / weight;
  });
}

export function chart(losses, total) {
  const own = losses.filter((one) => one.loss !== undefined);
  const held = losses.filter((one) => one.held_out_loss !== undefined);
  if (own.length < 2) return h("p", { class: "help" }, t("no_losses"));
  const WIDTH = Math.max(300, Math.min(1180, document.documentElement.clientWidth - 96)); // so that its letters are the page's
  const smooth = smoothed(own.map((one) => one.loss));
  const every = Math.ceil(own.length / MOST_POINTS);
  const kept = own.map((one, n) => n).filter((n) => n % every === 0 || n === own.length - 1);
  const all = [...smooth, ...held.map((one) => one.held_out_loss)];
  const sorted = own.map((one) => one.loss).sort((a, b) => a - b);
  const top = Math.max(...all, sorted[Math.floor(sorted.length * 0.95)]) * 1.05;
  const x = (step) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * step) / Math.max(total, 1);
  const y = (loss) => HEIGHT - EDGE.bottom - (HEIGHT - EDGE.top - EDGE.bottom) * Math.min(loss / top, 1);
  const path = (points) => points.map(([a, b], n) => `${n ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  const ticks = [0, 0.5, 1].map((share) => share * top);
  const last = smooth.at(-1);
  const label = t("loss_now", { loss: number(last, 4), step: number(own.at(-1).step) });
  return h("figure", { class: "chart" }, svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    ticks.map((value) => svg("g", {}, svg("line", { x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, top < 0.1 ? 3 : 2)))),
    [0, 0.5, 1].map((share) => svg("text", { x: x(share * total), y: HEIGHT - 8, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, number(Math.round(share * total)))),
    svg("path", { d: path(kept.map((n) => [x(own[n].step), y(own[n].loss)])), class: "raw" }),
    svg("path", { d: path(kept.map((n) => [x(own[n].step), y(smooth[n])])), class: "smooth" }),
    held.length ? svg("path", { d: path(held.map((one) => [x(one.step), y(one.held_out_loss)])), class: "held" }) : null,
    held.map((one) => svg("circle", { cx: x(one.step), cy: y(one.held_out_loss), r: 4, class: "held" }))),
  h("figcaption", {}, h("span", { class: "key smooth" }, t("loss")), held.length ? h("span", { class: "key held" }, t("held_out")) : null, h("span", { class: "now" }, label)));
}
