// One job: its head with what it does now, and tabs.

import { follow, get, job as path, post } from "./api.js";
import { confirm } from "./dialogs.js";
import { Curves, NAMES } from "./charts.js";
import { configTab } from "./config.js";
import { announce, every, h, reconcile, setText, toast } from "./dom.js";
import { ENDED, duration, moment, number, signed, since, waitText } from "./format.js";
import { overviewTab } from "./overview.js";
import { stateBadge, tabs, updateBadge } from "./parts.js";
import { queueTab } from "./queue.js";
import { logsTab, recordsTab } from "./records.js";
import { samplesTab } from "./samples.js";

const HISTORY_S = 900;
const MOST_POINTS = 2000;
const LONG_S = 60;
const STEPS_FOR_TIME = 20;
const LIVE = ["starting", "running", "recovering"];
const ACTIONS = [
  ["pause", "Pause", LIVE], ["resume", "Resume", ["paused", "failed", "stopped"]], ["checkpoint", "Checkpoint", [...LIVE, "paused"]],
  ["stop", "Save and stop", ["queued", ...LIVE, "paused"]], ["cancel", "Cancel", ["queued", ...LIVE, "paused"]],
];
const QUESTIONS = {
  stop: ["Save and stop the job?", "It saves a checkpoint and ends. It can be resumed from there.", "Save and stop"],
  cancel: ["Cancel the job?", "It ends now, without saving, and cannot be resumed. What was saved before is kept.", "Cancel the job"],
};
const DONE = {
  pause: "The job pauses once what runs has ended.", resume: "The job goes on.", stop: "The job saves and stops.",
  cancel: "The job is being cancelled.", checkpoint: "A checkpoint is saved after the current step, or now when the job is paused.",
};

/** What all tabs of a job share: its record, status, workers, curves and events, and who wants to know. */
class JobData extends EventTarget {
  constructor(id) {
    super();
    this.id = id;
    this.job = null;
    this.status = null;
    this.workers = [];
    this.curves = new Curves();
    this.events = [];
  }

  tell(what) {
    this.dispatchEvent(new Event(what));
  }

  get ended() {
    return this.job !== null && ENDED.has(this.job.state);
  }
}

export function jobView(main, rest) {
  const data = new JobData(rest[0]);
  const life = new AbortController();
  const head = makeHead(data, refresh);
  const parts = tabs("Parts of the job", [
    { id: "overview", title: "Overview", make: (panel) => overviewTab(panel, data) },
    { id: "queue", title: "Queue and versions", make: (panel) => queueTab(panel, data) },
    { id: "samples", title: "Samples", make: (panel) => samplesTab(panel, data) },
    { id: "events", title: "Events", make: (panel) => recordsTab(panel, data) },
    { id: "logs", title: "Logs", make: (panel) => logsTab(panel, data) },
    { id: "config", title: "Configuration", make: (panel) => configTab(panel, data) },
  ], (id) => { location.hash = `#/jobs/${encodeURIComponent(data.id)}/${id}`; });
  const names = ["overview", "queue", "samples", "events", "logs", "config"];
  main.append(head.element, h("div", { class: "tabs" }, parts.element));
  go(rest);

  function go([, tab = "overview", ...deeper]) {
    parts.show(names.includes(tab) ? tab : "overview")?.go?.(deeper);
  }

  async function refresh() {
    try {
      const [job, status] = await Promise.all([get(path(data.id)), get(path(data.id, "/status"))]);
      const before = data.job?.state;
      Object.assign(data, { job, status });
      data.curves.ranks = (job.config.actor_num_nodes || 1) * (job.config.actor_num_gpus_per_node || 1);
      if (before && before !== job.state) announce(`job ${job.name} is ${job.state}`);
      head.update();
      data.tell("status");
      if (!before) await begin();
      if (before && ENDED.has(before) && !data.ended) follow(data.id, newestId(), onEvent, life.signal);
    } catch (problem) {
      head.fail(problem);
    }
  }

  async function begin() {
    const step = Math.max(1, Math.ceil(data.job.policy_version / MOST_POINTS));
    const { series } = await get(path(data.id, "/metrics"), { name: NAMES, step });
    for (const each of series) each.steps.forEach((at, i) => data.curves.add(each.name, at, each.values[i]));
    data.tell("curves");
    const end = data.job.ended_at ? Date.parse(data.job.ended_at) : Date.now();
    const from = Math.max(Date.parse(data.job.submitted_at) - 1000, end - HISTORY_S * 1000);
    follow(data.id, `${Math.floor(from)}-0`, onEvent, life.signal).then(() => refresh());
  }

  const newestId = () => data.events.at(-1)?.id ?? "";

  function onEvent(event) {
    if (event.type === "metrics") {
      for (const [name, value] of Object.entries(event.values)) data.curves.add(name, event.step, value);
      data.tell("curves");
    } else {
      data.events.push(event);
      data.tell("events");
      if (event.type === "log" && event.level === "error") toast(event.text, "bad");
    }
  }

  const stops = [
    every(1000, refresh),
    every(2000, async () => {
      const { workers } = await get("/v1/workers");
      data.workers = workers;
      data.tell("workers");
    }),
  ];
  return {
    go,
    close() {
      life.abort();
      for (const stop of stops) stop();
      for (const tab of parts.made()) tab.close?.();
    },
    onKey(key) {
      const tab = names[Number(key) - 1];
      if (tab) location.hash = `#/jobs/${encodeURIComponent(data.id)}/${tab}`;
      else if (key === "/") return focusFilter();
      return Boolean(tab);
    },
  };
}

function focusFilter() {
  const filter = [...document.querySelectorAll("[data-filter]")].find((input) => input.offsetParent);
  filter?.focus();
  return Boolean(filter);
}

function makeHead(data, refresh) {
  const title = h("h1", {}, data.id);
  const badge = stateBadge("…");
  const about = h("p", { class: "dim small" });
  const now = h("p", { class: "now", hidden: true });
  const waits = h("ul", { class: "waits small dim", "aria-label": "What the job waits for", hidden: true });
  const trouble = h("p", { class: "notice", data: { tone: "bad" }, hidden: true });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  const figures = h("dl", { class: "figures" });
  const buttons = new Map(ACTIONS.map(([action, label]) =>
    [action, h("button", { class: action === "cancel" ? "danger" : "", onclick: () => act(action), hidden: true }, label)]));
  const copy = h("a", { class: "button", href: `#/submit/${encodeURIComponent(data.id)}` }, "Submit a copy");
  const element = h("div", { class: "head" },
    h("nav", { class: "small", "aria-label": "Where this is" }, h("a", { href: "#/jobs" }, "Jobs"), " / ", h("span", { class: "dim mono" }, data.id)),
    h("div", { class: "row" }, title, badge, h("span", { class: "grow" }), h("div", { class: "buttons" }, [...buttons.values()], copy)),
    about, trouble, now, waits, bar, figures);

  async function act(action) {
    if (QUESTIONS[action] && !(await confirm(...QUESTIONS[action], { danger: action === "cancel" }))) return;
    try {
      data.job = await post(path(data.id, `/${action}`));
      toast(DONE[action]);
      await refresh();
    } catch (problem) {
      toast(problem.message, "bad");
    }
  }

  function update() {
    const { job, status, curves } = data;
    setText(title, job.name);
    document.title = `${job.name} · ${job.state} · miles`;
    updateBadge(badge, job.state);
    for (const [action, , states] of ACTIONS) buttons.get(action).hidden = !states.includes(job.state);
    setText(about, aboutText(job));
    trouble.hidden = !job.error;
    setText(trouble, job.error);
    bar.max = Math.max(1, job.num_rollout);
    bar.value = job.policy_version;
    now.hidden = data.ended;
    const waitsFor = status.waiting_for ? `, waits for ${status.waiting_for}` : "";
    const seconds = since(status.since);
    const slow = Boolean(status.waiting_for) && seconds > LONG_S;
    now.dataset.tone = slow ? "warn" : "";
    setText(now, `${status.phase}${waitsFor}, for ${duration(seconds)}`);
    const others = data.ended ? [] : status.waits.filter((wait) => wait.detail || wait.what !== status.waiting_for);
    waits.hidden = !others.length;
    reconcile(waits, others, (wait) => wait.what, () => h("li", {}), (row, wait) => setText(row, waitText(wait)));
    const shown = figureTexts(job, curves);
    if (figures.children.length !== shown.length) figures.replaceChildren(...shown.map(([name]) => h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, h("b", {}), h("small", {})))));
    shown.forEach(([name, value, note], i) => {
      const [dt, dd] = figures.children[i].children;
      setText(dt, name);
      setText(dd.firstElementChild, value);
      setText(dd.lastElementChild, note);
    });
  }

  function fail(problem) {
    if (problem.status === 401) return;
    setText(trouble, problem.message);
    trouble.hidden = false;
  }

  return { element, update, fail };
}

function aboutText(job) {
  const who = job.submitted_by ? ` by ${job.submitted_by}` : "";
  const began = job.started_at ? `, began ${moment(job.started_at)}` : "";
  const ended = job.ended_at ? `, ended ${moment(job.ended_at)}` : "";
  return `Submitted ${moment(job.submitted_at)}${who}${began}${ended}`;
}

function figureTexts(job, curves) {
  const reward = curves.latest("rollout/raw_reward");
  const gain = reward === undefined ? "" : `${signed(reward - curves.first("rollout/raw_reward"))} since the first step`;
  const step = curves.recent("perf/step_time", STEPS_FOR_TIME);
  const left = job.num_rollout - job.policy_version;
  const end = job.ended_at ? Date.parse(job.ended_at) / 1000 : Date.now() / 1000;
  const took = job.started_at ? duration(end - Date.parse(job.started_at) / 1000) : "–";
  const difference = curves.latest("train/train_rollout_logprob_abs_diff");
  return [
    ["Steps", `${job.policy_version} / ${job.num_rollout || "?"}`, step && left > 0 && !job.ended_at ? `${duration(step * left)} left` : ""],
    ["Reward", number(reward), gain],
    ["Tokens per second", number(curves.recent("tokens_per_s", STEPS_FOR_TIME)), "trained on"],
    ["Step", step === undefined ? "–" : duration(step), `${took} in all`],
    ["Staleness", number(curves.latest("rollout/fully_async/avg_staleness")), `at most ${number(curves.latest("rollout/fully_async/max_staleness"))} versions`],
    ["Log-prob difference", number(difference), difference === 0 ? "equal to the bit" : "engine to trainer"],
  ];
}
