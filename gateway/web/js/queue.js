// Where the prompt groups are, and which version each engine holds.

import { job as path, post } from "./api.js";
import { h, reconcile, setText, toast } from "./dom.js";
import { duration, number, percent, plural, since } from "./format.js";
import { empty, tableBox } from "./parts.js";

const MOST_CELLS = 256;
const MOST_VERSIONS = 8;

export function queueTab(panel, data) {
  const summary = h("p", { class: "dim" });
  const cells = h("div", { class: "cells", "aria-hidden": "true" });
  const holds = h("p", { class: "notice", data: { tone: "warn" }, hidden: true });
  const running = h("tbody");
  const runningTable = tableBox("Groups being generated", ["Group", "Worker", "#Attempt", "#Since", "#For"], running);
  const idle = empty("Nothing is being generated", "Groups show here while a worker has them.");
  const versions = h("tbody");
  const versionsTable = tableBox("Versions held by engines", ["Worker", "Weights", "State", "#Version", "#Behind", "Last failure"], versions);
  const noEngines = empty("No engine holds weights", "Versions show here while the job runs.");
  const drafts = h("tbody");
  const draftsTable = tableBox("Drafts of engines", ["Engine", "#Draft", "#Steps", "#Tokens per verification", "#Accepted", "#Speed-up", "Why not more"], drafts);
  const accepted = h("tbody");
  const speculation = h("section", { class: "card", "aria-label": "Speculative decoding", hidden: true }, h("header", {}, h("h2", {}, "Speculative decoding")),
    draftsTable, tableBox("Accepted drafts by version", ["Policy", "#Draft", "#Tokens per verification", "#Accepted", "#Verifications"], accepted));
  const published = h("span", { class: "dim small num" });
  const compare = h("button", { class: "quiet", onclick: check }, "Compare with the trainer's");
  panel.append(h("div", { class: "stack" },
    h("section", { class: "card", "aria-label": "Queue" }, h("header", {}, h("h2", {}, "Queue"), summary),
      h("div", { class: "pad stack" }, holds, cells, legend())),
    h("section", { class: "card", "aria-label": "Versions" }, h("header", {}, h("h2", {}, "Versions held by engines"), published, h("span", { class: "grow" }), compare), versionsTable, noEngines),
    speculation,
    h("section", { class: "card", "aria-label": "Being generated" }, h("header", {}, h("h2", {}, "Being generated")), runningTable, idle)));

  function update() {
    const run = data.status;
    if (!run || panel.hidden) return;
    const training = run.running.filter((group) => !group.evaluation);
    setText(summary, summaryText(run, training.length));
    holds.hidden = !run.holds.length;
    setText(holds, `No group is handed out: ${run.holds.join("; ")}`);
    drawCells(cells, run, training);
    runningTable.hidden = !run.running.length;
    idle.hidden = run.running.length > 0;
    reconcile(running, run.running, (group) => `${group.evaluation}${group.group_id}`, groupRow, (row, group) => {
      setText(row.children[1], group.worker);
      setText(row.children[2], group.attempt & 0xffff);
      setText(row.children[3], group.since ? new Date(group.since).toLocaleTimeString("en-GB") : "–");
      setText(row.children[4], group.since ? duration(since(group.since)) : "–");
    });
    updateVersions(run);
    updateDrafts(run.speculation);
  }

  function updateDrafts(engines) {
    const byVersion = (data.job?.summary.acceptance ?? []).slice(-MOST_VERSIONS).reverse();
    speculation.hidden = !engines.length && !byVersion.length;
    draftsTable.hidden = !engines.length;
    reconcile(drafts, engines, (engine) => engine.engine, () => draftRow(7), (row, engine) => {
      const newest = engine.acceptance.at(-1);
      const texts = [engine.engine, engine.draft_version ?? "–", engine.num_steps || "off", ...acceptedTexts(newest), engine.speedup ? `${number(engine.speedup)} ×` : "–", engine.reason ?? ""];
      texts.forEach((text, i) => setText(row.children[i], text));
    });
    reconcile(accepted, byVersion, (each) => `${each.policy_version} ${each.draft_version}`, () => draftRow(5), (row, each) => {
      const texts = [each.policy_version, each.draft_version ?? "–", ...acceptedTexts(each), each.verifications.toLocaleString("en")];
      texts.forEach((text, i) => setText(row.children[i], text));
    });
  }

  /** Have engines compare the bytes they serve with what the trainer sent. */
  async function check() {
    compare.disabled = true;
    try {
      const found = await post(path(data.id, "/versions/check"));
      const verdict = `version ${found.version}: ${plural(found.equal, "engine")} equal to the trainer's weights`;
      toast(found.quarantined ? `${verdict}, ${found.quarantined} quarantined` : verdict, found.quarantined ? "bad" : "");
    } catch (problem) {
      toast(problem.message, "bad");
    } finally {
      compare.disabled = false;
    }
  }

  function updateVersions(run) {
    const held = data.ended || run.phase === "queued" ? [] : data.workers.flatMap((worker) => worker.versions.map((version) => ({ worker, version })));
    const newest = newestVersion(run, held.map(({ version }) => version));
    versionsTable.hidden = !held.length;
    noEngines.hidden = held.length > 0;
    compare.hidden = !held.length;
    setText(published, run.active_version === null ? "" : `active ${run.active_version}, newest ${newest}`);
    reconcile(versions, held, ({ worker, version }) => `${worker.id} ${version.stream}`, () => h("tr", {}, h("th", { scope: "row" }), h("td"), h("td"), h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "dim" })), (row, { worker, version }) => {
      const texts = [worker.id, version.stream, version.state, version.version ?? "–", versionsBehind(run, newest, version), version.last_error ?? ""];
      texts.forEach((text, i) => setText(row.children[i], text));
    });
  }

  data.addEventListener("status", update);
  data.addEventListener("workers", update);
  update();
  return { go: update };
}

/** The newest version there is: an engine may have been asked later than the run, and hold one that the run did not know. */
export function newestVersion(run, held) {
  const versions = held.filter((each) => each.stream === "policy" && each.version !== null).map((each) => each.version);
  return run.active_version === null ? run.newest_version : Math.max(run.newest_version, ...versions);
}

/** How many versions an engine is behind; before the first version is served, engines hold another job's, if any. */
export function versionsBehind(run, newest, held) {
  return held.version === null || held.stream !== "policy" || run.active_version === null ? "–" : newest - held.version;
}

function acceptedTexts(acceptance) {
  const known = (value, text) => (value === null || value === undefined ? "–" : text(value));
  return [known(acceptance?.accept_length, (value) => value.toFixed(2)), known(acceptance?.accept_rate, percent)];
}

function draftRow(columns) {
  return h("tr", {}, h("th", { scope: "row" }), ...Array.from({ length: columns - 1 }, (_, i) => h("td", { class: columns === 7 && i === 5 ? "dim" : "num" })));
}

function summaryText(run, running) {
  if (run.phase === "queued") return run.jobs_ahead ? `${plural(run.jobs_ahead, "job")} ahead of this one` : "next to run";
  if (run.phase === "ended") return "empty: the job has ended";
  const parts = [`${run.ready.length} of the ${run.batch_size} groups of step ${run.step} are ready`, `${running} are being generated`];
  if (run.pending) parts.push(`${run.pending} wait for a worker`);
  if (run.training) parts.push(`${run.training} are trained on`);
  return `${parts.join(", ")}; ${run.consumed.toLocaleString("en")} done`;
}

function groupRow(group) {
  return h("tr", {}, h("th", { scope: "row" }, `${group.evaluation ? "evaluation " : ""}${group.group_id}`), h("td"), h("td", { class: "num" }), h("td", { class: "num" }), h("td", { class: "num" }));
}

function legend() {
  return h("ul", { class: "legend" }, [["training", "trained on"], ["ready", "ready"], ["running", "being generated"], ["pending", "waits for a worker"], ["missing", "not begun"]].map(([kind, label]) =>
    h("li", {}, h("i", { class: `cell ${kind}` }), h("span", {}, label))));
}

function drawCells(cells, run, running) {
  const kinds = [
    ...Array(run.training).fill(["training", ""]),
    ...run.ready.map((group) => ["ready", `group ${group.group_id}, from version ${group.oldest_version}`]),
    ...running.map((group) => ["running", `group ${group.group_id} on ${group.worker}`]),
    ...Array(run.pending).fill(["pending", ""]),
  ];
  const next = run.training ? run.batch_size + run.training : run.batch_size;
  while (kinds.length < next && run.phase !== "ended" && run.phase !== "queued") kinds.push(["missing", ""]);
  cells.replaceChildren(...kinds.slice(0, MOST_CELLS).map(([kind, title]) => h("i", { class: `cell ${kind}`, title })));
}
