// Elements out of words: text is always text, so no name, caption or message of anybody becomes markup.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (["value", "checked", "disabled", "selected", "indeterminate"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
}

// The same children again leave the page as it is: what has the focus keeps it, and what moves goes on moving.
export function replaceIfNew(parent, key, make) {
  const told = JSON.stringify(key);
  if (parent.dataset.shown === told) return;
  parent.dataset.shown = told;
  replace(parent, make());
}

let count = 0;
export function id(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

const ICONS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  check: "M5 12.5l4.5 4.5L19 7",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15.5 9.5h.01",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12",
  brush: "M14 4l6 6-8 8-6-6zM6 12c-2 1-2 5-3 7 2 0 6 0 8-2",
  down: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  warn: "M12 4l9 16H3zM12 10v4M12 17h.01",
  info: "M12 11v6M12 7.5h.01M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z",
  spark: "M12 3l1.8 5.4L19 10l-5.2 1.6L12 17l-1.8-5.4L5 10l5.2-1.6zM19 16l.8 2.2L22 19l-2.2.8L19 22l-.8-2.2L16 19l2.2-.8z",
  again: "M4 12a8 8 0 1 0 2.4-5.7M4 4v4h4",
  stop: "M7 7h10v10H7z",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  share: "M12 15V4M8 8l4-4 4 4M5 12v8h14v-8",
  pen: "M4 20l4-1L19 8l-3-3L5 16z",
};

export function icon(name) {
  const path = svg("path", { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": "1.8",
    "stroke-linecap": "round", "stroke-linejoin": "round" });
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, path);
}

export function button(label, props = {}, iconName = "") {
  return h("button", { type: "button", ...props, class: `button ${props.class || ""}` }, iconName && icon(iconName), h("span", {}, label));
}

export function iconButton(label, iconName, props = {}) {
  return h("button", { type: "button", title: label, "aria-label": label, ...props, class: `icon-button ${props.class || ""}` }, icon(iconName));
}
