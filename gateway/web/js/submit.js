// Submit a job: the settings as text, the most important ones as fields beside it, and every fault where it belongs.

import { get, job as path, post } from "./api.js";
import { announce, h, reconcile, setText, toast } from "./dom.js";
import { plural } from "./format.js";
import { defaults } from "./schema.js";
import { change, parse, write } from "./yaml.js";

const STORED = "miles.draft";
const FIELDS = [
  "name", "hf_checkpoint", "prompt_data", "input_key", "label_key", "rm_type", "rollout_batch_size", "n_samples_per_prompt",
  "rollout_max_response_len", "num_rollout", "lr",
];
const EXAMPLE = `# One setting a line, named as on the command line; JSON works too.
name: sums
hf_checkpoint: models/smollm2
prompt_data: data/train.jsonl
input_key: prompt
label_key: label
rm_type: math
rollout_batch_size: 16
n_samples_per_prompt: 8
rollout_max_response_len: 128
num_rollout: 100
lr: 1e-6
`;
const CHECK_MS = 700;

export function submitView(main, rest) {
  document.title = "Submit a job · miles";
  let known = {};
  let faults = [];
  let timer = 0;
  let idempotencyKey = "";
  const text = h("textarea", { id: "config-text", spellcheck: false, autocomplete: "off", wrap: "off", "aria-label": "Configuration", "aria-describedby": "faults-title", oninput: () => changed(true), onscroll: () => { gutter.scrollTop = text.scrollTop; } });
  const gutter = h("div", { class: "gutter num", "aria-hidden": "true" });
  const fields = new Map(FIELDS.map((name) => [name, makeField(name)]));
  const title = h("h2", { id: "faults-title", "aria-live": "polite" }, "");
  const list = h("ol", { class: "faults" });
  const submit = h("button", { class: "primary" }, "Submit the job");
  const search = h("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting", data: { filter: "" }, oninput: showSettings });
  const settings = h("div", { class: "setting-list" });
  main.append(h("form", { class: "stack", noValidate: true, onsubmit: (event) => { event.preventDefault(); send(); } },
    h("div", { class: "row" }, h("h1", {}, "Submit a job"), h("span", { class: "grow" }),
      h("button", { type: "button", onclick: () => load(EXAMPLE) }, "Start from the example"), h("button", { type: "button", onclick: () => check(true) }, "Check"), submit),
    h("div", { class: "submit" },
      h("section", { class: "card", "aria-label": "Configuration as text" }, h("header", {}, h("h2", {}, "Configuration"), h("span", { class: "dim small" }, "YAML or JSON")), h("div", { class: "editor" }, gutter, text)),
      h("div", { class: "stack" },
        h("section", { class: "card", id: "faults", "aria-label": "Faults" }, h("header", {}, title), list),
        h("section", { class: "card", "aria-label": "The most important settings" }, h("header", {}, h("h2", {}, "The most important settings")), h("div", { class: "pad fields" }, [...fields.values()].map((field) => field.element))),
        h("section", { class: "card", "aria-label": "All settings" }, h("header", {}, h("h2", {}, "All settings"), h("span", { class: "grow" }), h("div", { class: "filter" }, search)), settings)))));

  function makeField(name) {
    const input = h("input", { id: `field-${name}`, autocomplete: "off", spellcheck: false, "aria-describedby": `fault-${name}`, onchange: () => {
      const value = input.value.trim();
      load(change(text.value, name, value === "" ? undefined : parse(`${name}: ${value}`).values[name]));
    } });
    const fault = h("span", { class: "fault", id: `fault-${name}` });
    return { input, fault, element: h("div", {}, h("label", { htmlFor: input.id }, h("code", {}, name)), input, fault) };
  }

  function load(content) {
    text.value = content;
    changed(false);
  }

  function changed(typed) {
    sessionStorage.setItem(STORED, text.value);
    idempotencyKey = "";
    const { values } = parse(text.value);
    for (const [name, { input }] of fields) if (document.activeElement !== input || !typed) input.value = name in values && values[name] !== null ? (typeof values[name] === "string" ? values[name] : write(values[name])) : "";
    clearTimeout(timer);
    timer = setTimeout(() => check(false), typed ? CHECK_MS : 0);
    showFaults(faults);
  }

  /** Have the gateway look at it; resolves to whether it can be submitted. */
  async function check(told) {
    const content = text.value;
    const { values, faults: unread, lines } = parse(content);
    if (unread.length) {
      showFaults(unread.map(([line, problem]) => ({ field: `line ${line + 1}`, line, problem, remedy: "" })));
      if (told) announce(title.textContent);
      return false;
    }
    try {
      await post("/v1/jobs", values, { query: { dry_run: true } });
      if (content === text.value) showFaults([], true);
      if (told) announce("no faults");
      return true;
    } catch (problem) {
      if (content !== text.value) return false;
      showFaults(problem.faults.length ? problem.faults : [{ field: "", problem: problem.message, remedy: "" }]);
      if (told) announce(title.textContent);
      return false;
    } finally {
      void lines;
    }
  }

  function showFaults(found, fine = false) {
    faults = found;
    const { lines } = parse(text.value);
    setText(title, found.length ? plural(found.length, "fault") : fine ? "No faults: it can be submitted" : text.value.trim() ? "Checking" : "Nothing to check yet");
    title.dataset.tone = found.length ? "bad" : fine ? "good" : "";
    const place = (fault) => fault.line ?? lines[fault.field];
    const marked = new Map(found.map((fault) => [place(fault), fault]));
    list.replaceChildren(...found.map((fault) => h("li", {},
      place(fault) === undefined ? h("b", { class: "mono" }, fault.field) : h("button", { type: "button", class: "quiet mono", onclick: () => goTo(place(fault)) }, fault.field),
      h("span", {}, fault.problem), fault.remedy ? h("span", { class: "dim" }, `; ${fault.remedy}`) : null)));
    for (const [name, { input, fault }] of fields) {
      const own = found.find((each) => each.field === name);
      if (own) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
      setText(fault, own ? `${own.problem}; ${own.remedy}` : "");
    }
    const count = text.value.split("\n").length;
    gutter.replaceChildren(...Array.from({ length: count }, (_, i) => h("div", marked.has(i) ? { class: "bad", title: marked.get(i).problem } : {}, i + 1)));
    gutter.scrollTop = text.scrollTop;
  }

  function goTo(line) {
    const rows = text.value.split("\n");
    const start = rows.slice(0, line).reduce((sum, row) => sum + row.length + 1, 0);
    text.focus();
    text.setSelectionRange(start, start + rows[line].length);
  }

  async function send() {
    submit.disabled = true;
    try {
      if (!(await check(true))) {
        list.querySelector("button")?.focus();
        return;
      }
      idempotencyKey ||= crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
      const job = await post("/v1/jobs", parse(text.value).values, { idempotencyKey });
      sessionStorage.removeItem(STORED);
      toast(`Job ${job.name} is submitted.`);
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    } catch (problem) {
      showFaults(problem.faults?.length ? problem.faults : [{ field: "", problem: problem.message, remedy: "" }]);
      toast(problem.message, "bad");
    } finally {
      submit.disabled = false;
    }
  }

  function showSettings() {
    const wanted = search.value.trim().toLowerCase().replaceAll("-", "_");
    const found = Object.entries(known).filter(([name, setting]) => !wanted || name.includes(wanted) || setting.description.toLowerCase().includes(wanted)).slice(0, 60);
    reconcile(settings, found, ([name]) => name, ([name, setting]) => h("div", { class: "setting" },
      h("div", {}, h("code", {}, name), h("span", { class: "dim small" }, ` ${typeText(setting)}`), h("p", { class: "small dim" }, setting.description)),
      h("button", { type: "button", "aria-label": `Add ${name}`, onclick: () => { load(change(text.value, name, setting.default ?? "")); goTo(parse(text.value).lines[name]); } }, "Add")));
  }

  async function begin() {
    try {
      known = await defaults();
      showSettings();
      if (rest[0]) load(copyOf(await get(path(rest[0])), known));
    } catch (problem) {
      toast(problem.message, "bad");
    }
  }

  load(rest[0] ? "" : sessionStorage.getItem(STORED) || EXAMPLE);
  begin();
  return { close: () => clearTimeout(timer), onKey: (key) => { if (key === "/") search.focus(); return key === "/"; } };
}

function typeText(setting) {
  const type = setting.enum ? setting.enum.filter(Boolean).join(" | ") : [setting.type].flat()[0];
  return "default" in setting ? `${type}, ${JSON.stringify(setting.default)}` : type;
}

/** The settings of a job that a new one is to have: those that differ from defaults, without what is the job's own. */
function copyOf(job, known) {
  const own = new Set(["run_dir", "load", "save"]);
  const rows = Object.entries(job.config).filter(([name, value]) => {
    if (!(name in known) || own.has(name) || value === null || (Array.isArray(value) && !value.length) || (typeof value === "object" && !Array.isArray(value))) return false;
    return !("default" in known[name]) || JSON.stringify(known[name].default) !== JSON.stringify(value);
  });
  return rows.map(([name, value]) => `${name}: ${write(value)}\n`).join("");
}
