// What was and is being taught: a list, and a page for each run, which shows all that its folder knows.

import * as api from "./api.js";
import { chart } from "./chart.js";
import { button, h, icon, replace, replaceIfNew } from "./dom.js";
import { attempt, confirmed, dialog, divider, doing, empty, field, progress, say, state, whole } from "./parts.js";
import { bytes, duration, number, t, when } from "./texts.js";
import { draft, keepDraft } from "./train.js";

const LIVE = ["queued", "running", "stopping"];
const PHASES = ["loading", "encoding", "training", "saving", "proving"];

export async function runsPage(content) {
  const list = h("div", {});
  replace(content, h("header", { class: "intro" }, h("h1", {}, t("nav_runs")), h("p", {}, t("runs_text"))), list);
  return api.watch("/api/jobs/runs", (runs) => {
    const key = runs.map((run) => [run.id, run.title, run.state, run.position, run.done, run.thumb, Math.round(run.seconds_left || 0)]);
    replaceIfNew(list, key, () => runs.length ? h("ul", { class: "runs" }, runs.map(row))
      : empty(t("no_runs"), t("no_runs_text"), h("a", { class: "button primary", href: "#/train" }, t("start_one"))));
  }, 2);
}

function row(run) {
  return h("li", {}, h("a", { class: "run", href: `#/${run.id}` },
    run.thumb ? h("img", { src: api.fileOf(run.id, run.thumb), alt: "", loading: "lazy" }) : h("span", { class: "blank", "aria-hidden": "true" }),
    h("span", { class: "what" }, h("b", {}, run.title), h("span", {}, [when(run.number), run.own ? "" : t("somebody_else")].filter(Boolean).join(" · "))),
    h("span", { class: "how" }, LIVE.includes(run.state) ? doing(run) : run.result?.steps ? t("steps_and_size", { steps: number(run.result.steps), size: bytes(run.result.bytes) }) : ""), state(run)));
}

export async function runPage(content, name) {
  const path = `/api/jobs/runs/${encodeURIComponent(name)}`;
  const page = new RunPage(path, `runs/${name}`);
  replace(content, page.element);
  return api.watch(() => `${path}?from=${page.last}`, (run) => page.show(run), 1);
}

class RunPage {
  constructor(path, id) {
    Object.assign(this, { path, id, last: 0, losses: [] });
    const part = (name) => (this[name] = h("div", { class: name }));
    this.element = h("div", { class: "run-page" }, part("head"), part("now"), part("hero"), part("strip"), part("curve"), part("more"));
  }

  show(run) {
    if (!run) {
      replace(this.element, empty(t("no_such_run"), "", h("a", { class: "button", href: "#/runs" }, t("nav_runs"))));
      return true;
    }
    if (run.losses.length) this.losses = this.losses.filter((one) => one.step < run.losses[0].step).concat(run.losses);
    this.last = this.losses.at(-1)?.step ?? 0;
    const total = run.total || Number(/max_train_steps = (\d+)/.exec(run.settings)?.[1]) || this.last;
    replaceIfNew(this.head, [run.title, run.state, run.own, run.can_go_on, run.position], () => this.title(run));
    this.doing(run);
    replaceIfNew(this.hero, [run.state, run.samples.map((one) => one.file), run.adapters], () => this.result(run));
    replaceIfNew(this.strip, [run.samples, LIVE.includes(run.state)], () => this.samples(run));
    replaceIfNew(this.curve, [this.last, this.losses.length], () => h("section", { class: "card" }, h("h2", {}, t("loss_title")), chart(this.losses, total)));
    this.details(run);
    return !LIVE.includes(run.state) && run.state !== "queued";
  }

  title(run) {
    const live = LIVE.includes(run.state);
    const act = (verb) => () => attempt(async () => { await api.post(`${this.path}/${verb}`); this.again(); });
    const tools = [];
    if (run.own && live) {
      if (run.state !== "stopping") tools.push(button(t("stop"), { onclick: act("stop"), title: t("stop_text") }, "stop"));
      tools.push(button(t("cancel"), { class: "quiet", onclick: async () => { if (await confirmed(t("cancel_question"), t("cancel"))) act("cancel")(); } }, "close"));
    }
    if (run.own && !live) {
      if (run.can_go_on) tools.push(button(t("go_on"), { class: "primary", onclick: act("resume") }, "again"));
      tools.push(button(t("use_again"), { class: "quiet", onclick: () => this.useAgain(run) }, "again"));
      tools.push(button(t("rename"), { class: "quiet", onclick: () => this.rename(run) }, "pen"));
      tools.push(button(t("delete"), { class: "quiet", onclick: () => this.remove() }, "trash"));
    }
    return h("header", { class: "intro run-head" }, h("div", {}, h("p", { class: "crumb" }, h("a", { href: "#/runs" }, t("nav_runs"))), h("h1", {}, run.title, " ", state(run)),
      run.own ? null : h("p", { class: "help" }, t("somebody_elses"))), h("div", { class: "row" }, tools));
  }

  doing(run) {
    const live = LIVE.includes(run.state);
    if (!live) {
      replaceIfNew(this.now, [run.state, run.message], () => run.state === "failed" ? h("p", { class: "note error", role: "alert" }, run.message)
        : run.state === "stopped" ? h("p", { class: "note fact" }, t("stopped_text"))
        : run.state === "cancelled" ? h("p", { class: "note fact" }, t("cancelled_text")) : null);
      return;
    }
    replaceIfNew(this.now, [run.state, run.phase, run.done, run.position, Math.round(run.seconds_left || 0), Math.round((run.share || 0) * 300)], () => {
      const at = PHASES.indexOf(run.phase === "sampling" ? (run.done >= run.total && run.total ? "saving" : "training") : run.phase);
      return h("section", { class: "card now-card" }, progress(run), h("ol", { class: "phases" }, PHASES.map((name, n) =>
        h("li", { class: run.state === "queued" || n > at ? "" : n < at ? "over" : "here", "aria-current": n === at ? "step" : null }, t(`phase_${name}`)))));
    });
  }

  result(run) {
    if (!run.adapters.length || LIVE.includes(run.state)) return null;
    const { before, after } = ends(run.samples);
    const adapter = run.adapters.find((name) => !name.endsWith("-best.safetensors")) || run.adapters[0];
    const best = run.adapters.find((name) => name.endsWith("-best.safetensors"));
    const to = `${this.id.split("/")[1]}/${adapter}`;
    return h("section", { class: "card hero-card" },
      before && after ? divider(api.fileOf(run.id, before.file), api.fileOf(run.id, after.file), run.prompt) : null,
      h("div", { class: "told" }, h("h2", {}, t("it_knows", { title: run.title })), h("p", {}, t("it_weighs", { size: bytes(run.result?.bytes || 0), steps: number(run.result?.steps || 0) })),
        best ? h("p", { class: "help" }, t("best_kept", { name: best }), " ", h("a", { href: `#/adapters/${encodeURIComponent(`${this.id.split("/")[1]}/${best}`)}` }, t("take_best"))) : null,
        h("div", { class: "row" }, h("a", { class: "button primary", href: "#/generate", onclick: () => sessionStorage.setItem("chosen", JSON.stringify([to])) }, t("generate_with_it")),
          h("a", { class: "button", href: `#/adapters/${encodeURIComponent(to)}` }, t("take_it_away")),
          run.sheet ? h("a", { class: "button quiet", href: `${api.fileOf(run.id, run.sheet)}?keep=1`, download: "" }, icon("image"), h("span", {}, t("sheet"))) : null)));
  }

  samples(run) {
    const steps = [...new Set(run.samples.map((one) => one.step))];
    const rows = [...new Map(run.samples.map((one) => [`${one.prompt}-${one.seed}`, one])).keys()];
    if (!steps.length) return LIVE.includes(run.state) ? h("section", { class: "card" }, h("h2", {}, t("samples")), h("p", { class: "help" }, t("samples_soon"))) : null;
    const find = (key, step) => run.samples.find((one) => `${one.prompt}-${one.seed}` === key && one.step === step);
    const cell = (key, step) => {
      const one = find(key, step);
      if (!one) return h("td", {});
      const base = find(key, 0);
      const label = step ? t("sample_of", { step: number(step), seed: one.seed }) : t("base_of_seed", { seed: one.seed });
      return h("td", {}, h("button", { type: "button", class: "picture", onclick: () => this.enlarge(run, base, one, label) }, h("img", { src: api.fileOf(run.id, one.file), alt: label, loading: "lazy" })));
    };
    return h("section", { class: "card" }, h("h2", {}, t("samples")), h("p", { class: "help" }, t("samples_text", { prompt: run.prompt })),
      h("div", { class: "strip-scroll", tabindex: 0, role: "group", "aria-label": t("samples") }, h("table", { class: "samples" },
        h("thead", {}, h("tr", {}, steps.map((step) => h("th", { scope: "col" }, step ? t("step_n", { n: number(step) }) : t("base"))))),
        h("tbody", {}, rows.map((key) => h("tr", {}, steps.map((step) => cell(key, step))))))));
  }

  enlarge(run, base, one, label) {
    const own = api.fileOf(run.id, one.file);
    dialog(label, base && one.step ? divider(api.fileOf(run.id, base.file), own, run.prompt, [t("base"), t("step_n", { n: one.step })]) : whole(own, label), [], true);
  }

  details(run) {
    this.log ??= h("pre", { tabindex: 0, class: "log" });
    this.settings ??= h("pre", { tabindex: 0 });
    this.facts ??= h("dl", { class: "facts" });
    if (!this.more.children.length) {
      replace(this.more, h("section", { class: "card" }, this.facts, h("details", {}, h("summary", {}, t("log")), this.log),
        h("details", {}, h("summary", {}, t("settings")), h("p", { class: "help" }, t("settings_text")), this.settings)));
    }
    const said = run.log.join("\n") || t("nothing_yet");
    if (this.log.textContent !== said) this.log.textContent = said;
    if (this.settings.textContent !== run.settings) this.settings.textContent = run.settings;
    const facts = [[t("memory"), run.peak_bytes ? bytes(run.peak_bytes) : ""], [t("time"), run.seconds ? duration(run.seconds) : ""], [t("asked_on"), when(run.number)]].filter(([, value]) => value);
    replaceIfNew(this.facts, facts, () => facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  again() {
    // A run that ended is not asked about any more; after a click it is.
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  }

  async useAgain(run) {
    const { aims, typed, images, base, word, what } = run.request;
    keepDraft({ ...draft(), aims, settings: typed, base, word, what });
    localStorage.setItem("images", images);
    location.hash = "#/train";
  }

  rename(run) {
    const input = h("input", { type: "text", value: run.title, maxlength: 100, autocomplete: "off" });
    const box = dialog(t("rename"), h("form", { onsubmit: (event) => { event.preventDefault(); keep(); } }, field("title", t("name"), input)),
      [button(t("keep"), { class: "primary", onclick: () => keep() }, "check")]);
    const keep = async () => {
      const told = await attempt(() => api.patch(this.path, { title: input.value }), box);
      if (told) { box.close(); this.again(); }
    };
    input.select();
  }

  async remove() {
    if (!(await confirmed(t("delete_question"), t("delete")))) return;
    const told = await attempt(() => api.remove(this.path));
    if (told) location.hash = "#/runs";
  }
}

// The base's picture and the last one of the first seed.
function ends(samples) {
  const before = samples.find((one) => one.step === 0);
  const same = samples.filter((one) => before && one.prompt === before.prompt && one.seed === before.seed && one.step);
  return { before, after: same.at(-1) };
}
