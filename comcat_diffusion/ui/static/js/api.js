// Asking the server, and the sentence that it answers with when it refuses.

export class Refused extends Error {
  constructor(message, field, status) {
    super(message);
    this.field = field;
    this.status = status;
  }
}

async function ask(method, path, body, type) {
  let answer;
  try {
    const headers = { "x-studio": "page", ...(type ? { "content-type": type } : {}) };
    answer = await fetch(path, { method, body, headers, cache: "no-store" });
  } catch {
    throw new Refused(ask.gone, null, 0);
  }
  const told = answer.headers.get("content-type")?.includes("json") ? await answer.json() : {};
  const status = Number(answer.headers.get("x-status")) || answer.status; // a refusal is no fault for a browser to write down
  if (status >= 400) throw new Refused(told.message || `${status} ${answer.statusText}`, told.field ?? null, status);
  return told;
}

// Says that the server is away for as long as it is.
function lost(away) {
  const bar = document.getElementById("lost");
  if (bar.hidden === away) {
    bar.hidden = !away;
    bar.textContent = away ? ask.gone : "";
  }
}

export const gone = (sentence) => { ask.gone = sentence; };
export const get = (path) => ask("GET", path);
export const post = (path, value = {}) => ask("POST", path, JSON.stringify(value), "application/json");
export const patch = (path, value) => ask("PATCH", path, JSON.stringify(value), "application/json");
export const remove = (path) => ask("DELETE", path);
export const put = (path, file) => ask("PUT", path, file, "application/octet-stream");
export const postFile = (path, file) => ask("POST", path, file, "application/octet-stream");

export const fileOf = (id, name) => `/api/jobs/${id}/files/${name.split("/").map(encodeURIComponent).join("/")}`;
export const adapterPath = (id) => `/api/adapters/${id.split("/").map(encodeURIComponent).join("/")}`;

// Calls `told` with what a path answers, again and again, until it says that it is enough or the page is left.
export function watch(path, told, seconds = 1) {
  let ended = false;
  let timer = 0;
  async function look() {
    if (ended) return;
    try {
      if (document.visibilityState === "visible" || !look.seen) {
        const enough = await told(await get(typeof path === "function" ? path() : path));
        look.seen = true;
        if (enough) ended = true;
      }
      lost(false);
    } catch (error) {
      if (error.status === 0) lost(true);
      if (error.status === 404) { ended = true; told(null); }
    }
    if (!ended) timer = setTimeout(look, seconds * 1000);
  }
  look();
  return () => { ended = true; clearTimeout(timer); };
}
