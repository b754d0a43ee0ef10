// The list of jobs.

import { get, job as path } from "./api.js";
import { announce, every, h, reconcile, setText, svg } from "./dom.js";
import { ENDED, duration, moment, number, plural, since, waitText } from "./format.js";
import { empty, segments, stateBadge, tableBox, updateBadge } from "./parts.js";

const FILTERS = {
  all: [],
  active: ["queued", "starting", "running", "paused", "recovering"],
  ended: [...ENDED],
};
const CURVES = 15;
const LONG_S = 60;

export function jobsView(main) {
  let filter = "all";
  let pages = 1;
  const states = new Map();
  const curves = new Map();

  const body = h("tbody");
  const table = h("div", { class: "card" }, tableBox("Jobs, newest first", ["Job", "State", "Progress", "Reward", "Submitted", "#Took", "By"], body, "jobs"));
  const none = h("div", { class: "card", hidden: true },
    empty("No jobs yet", "Submit one here, with curl, or with the miles command.",
      h("p", {}, h("a", { class: "button", href: "#/submit" }, "Submit a job"))));
  const more = h("button", { hidden: true, onclick: () => { pages += 1; refresh(); } }, "Older jobs");
  const counted = h("span", { class: "dim" });
  const trouble = h("p", { class: "notice", data: { tone: "bad" }, hidden: true });
  main.append(h("div", { class: "stack" },
    h("div", { class: "row" }, h("h1", {}, "Jobs"), counted, h("span", { class: "grow" }),
      segments("Which jobs", [["all", "All"], ["active", "Active"], ["ended", "Ended"]], filter, (value) => { filter = value; pages = 1; refresh(); }),
      h("a", { class: "button", href: "#/submit" }, "Submit a job")),
    trouble, table, none, h("div", { class: "row" }, more)));
  document.title = "Jobs · miles";

  async function refresh() {
    let jobs = [];
    let cursor = "";
    try {
      for (let page = 0; page < pages && cursor !== null; page += 1) {
        const answer = await get("/v1/jobs", { state: FILTERS[filter], limit: 50, cursor });
        jobs = jobs.concat(answer.jobs);
        cursor = answer.next_cursor;
      }
      trouble.hidden = true;
    } catch (problem) {
      setText(trouble, problem.message);
      trouble.hidden = false;
      return;
    }
    setText(counted, jobs.length ? plural(jobs.length, "job") + (cursor ? " and more" : "") : "");
    table.hidden = !jobs.length;
    none.hidden = jobs.length > 0;
    more.hidden = cursor === null;
    reconcile(body, jobs, (job) => job.id, makeRow, updateRow);
    for (const job of jobs) {
      if (states.has(job.id) && states.get(job.id) !== job.state) announce(`job ${job.name} is ${job.state}`);
      states.set(job.id, job.state);
    }
    await drawCurves(jobs.slice(0, CURVES));
  }

  async function drawCurves(jobs) {
    for (const job of jobs) {
      const known = curves.get(job.id);
      if (!job.policy_version || (known && known === job.policy_version)) continue;
      curves.set(job.id, job.policy_version);
      const step = Math.max(1, Math.ceil(job.policy_version / 60));
      const { series } = await get(path(job.id, "/metrics"), { name: "rollout/raw_reward", step });
      const row = body.kept?.get(job.id);
      if (row && series.length) row.curve.replaceChildren(sparkline(series[0].values), h("span", { class: "num" }, number(series[0].values.at(-1))));
    }
  }

  function makeRow(job) {
    const row = h("tr", { class: "open-able", onclick: (event) => { if (!event.target.closest("a")) location.hash = `#/jobs/${job.id}`; } });
    row.state = stateBadge(job.state);
    row.bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of ${job.name}` });
    row.steps = h("span", { class: "small dim num" });
    row.waits = h("div", { class: "small dim", hidden: true });
    row.curve = h("div", { class: "sparkline" });
    row.took = h("td", { class: "num dim" });
    row.append(
      h("td", {}, h("a", { class: "job-name", href: `#/jobs/${job.id}` }, job.name), h("div", { class: "small dim mono" }, job.id), row.waits),
      h("td", {}, row.state),
      h("td", { class: "progress-cell" }, row.bar, row.steps),
      h("td", {}, row.curve),
      h("td", { class: "dim" }, moment(job.submitted_at)),
      row.took,
      h("td", { class: "dim" }, job.submitted_by || "command line"),
    );
    return row;
  }

  function updateRow(row, job) {
    updateBadge(row.state, job.state);
    row.bar.max = Math.max(1, job.num_rollout);
    row.bar.value = job.policy_version;
    setText(row.steps, job.num_rollout ? `${job.policy_version} of ${job.num_rollout} steps` : "not started");
    const told = toldWaits(job);
    row.waits.hidden = !told.length;
    setText(row.waits, told.length ? `waits for ${told[0].what}` : "");
    const end = job.ended_at ? Date.parse(job.ended_at) / 1000 : Date.now() / 1000;
    setText(row.took, job.started_at ? duration(end - Date.parse(job.started_at) / 1000) : ENDED.has(job.state) ? "–" : `waits ${duration(since(job.submitted_at))}`);
    row.title = job.error ?? told.map((wait) => waitText(wait)).join("\n");
  }

  const stop = every(2000, refresh);
  return { close: stop };
}

/** What a queued job waits for at once, and what any other has waited for unusually long. */
function toldWaits(job) {
  return job.waits.filter((wait) => job.state === "queued" || since(wait.since) > LONG_S);
}

function sparkline(values) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(...known);
  const range = Math.max(...known) - low || 1;
  const points = values.map((value, i) => (value === null ? null : `${(i / Math.max(1, values.length - 1)) * 88 + 2},${24 - ((value - low) / range) * 20}`));
  const line = svg("polyline", { points: points.filter(Boolean).join(" ") });
  return svg("svg", { viewBox: "0 0 92 28", "aria-hidden": "true" }, line);
}
