// The words of the page, in the language of whoever reads it; numbers, times and sizes as that language writes them.

let words = {};
export let language = "en";
export let about = {};

export function speak(told) {
  words = told.page;
  language = told.language;
  about = told;
  document.documentElement.lang = language;
}

export function t(key, values = {}) {
  const text = words[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

export const has = (key) => key in words;

export function number(value, digits = 0) {
  return new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
}

export function duration(seconds) {
  if (seconds < 10) return t("seconds", { n: number(Math.max(1, Math.round(seconds))) });
  if (seconds < 90) return t("seconds", { n: number(Math.round(seconds / 5) * 5) });
  if (seconds < 5400) return t("minutes", { n: number(Math.round(seconds / 60)) });
  return t("hours", { n: number(seconds / 3600, 1) });
}

export function bytes(count) {
  if (count < 1e6) return `${number(count / 1e3, count < 1e5 ? 1 : 0)} kB`;
  if (count < 1e9) return `${number(count / 1e6, 1)} MB`;
  return `${number(count / 1e9, 1)} GB`;
}

export function when(nanoseconds) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" }).format(new Date(nanoseconds / 1e6));
}
