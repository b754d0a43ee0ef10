// What each worker does now and did before: a lane a worker, and in words what it waits for and since when.

import { get, job as path } from "./api.js";
import { h, reconcile, setText, svg } from "./dom.js";
import { clock, duration, number, since } from "./format.js";
import { empty, segments } from "./parts.js";

const WINDOWS = [[30, "30 s"], [120, "2 min"], [600, "10 min"], [3600, "1 h"], [0, "All"]];
const ACTIVITIES = {
  generate: "generating", score: "scoring", train: "training", export: "handing over weights", activate: "bringing weights to engines",
  load: "loading the model", save: "saving a checkpoint",
};
const LONG_S = 60;
const TICKS = 6;
const MOST = 5000;

export class Lanes {
  constructor(jobId) {
    this.jobId = jobId;
    this.window = 120;
    this.spans = new Map();
    this.newestEnd = 0;
    this.rows = h("div", { class: "lanes" });
    this.axis = h("div", { class: "lane-axis num", "aria-hidden": "true" });
    this.legend = h("ul", { class: "legend" });
    this.none = empty("Nobody is at work", "Lanes come with the first worker that does something for this job.");
    this.element = h("section", { class: "card", id: "timeline", "aria-label": "What each worker does" },
      h("header", {}, h("h2", {}, "Workers over time"), h("span", { class: "grow" }), this.legend,
        segments("Length of time", WINDOWS, this.window, (value) => { this.window = value; this.draw(); })),
      h("div", { class: "lanes-box" }, this.rows, this.axis), this.none);
  }

  async load() {
    const after = this.newestEnd ? this.newestEnd - 2 : 0;
    const { spans } = await get(path(this.jobId, "/timeline"), { after_unix_s: after, limit: MOST });
    for (const span of spans) {
      if (!span.worker) continue;
      this.spans.set(`${span.worker} ${span.start_unix_s} ${span.activity}`, span);
      this.newestEnd = Math.max(this.newestEnd, span.end_unix_s);
    }
    while (this.spans.size > MOST) this.spans.delete(this.spans.keys().next().value);
  }

  /** `status` is that of the run, `workers` all workers, `ended` when the job has (seconds since 1970), if it has. */
  update(status, workers, ended) {
    this.status = status;
    this.workers = new Map(workers.map((worker) => [worker.id, worker]));
    this.ended = ended;
    this.draw();
  }

  range() {
    const end = this.ended ? Math.max(this.newestEnd, Math.min(this.ended, this.newestEnd + 5)) : Date.now() / 1000;
    if (this.window) return [end - this.window, end];
    const first = Math.min(end - 10, ...[...this.spans.values()].map((span) => span.start_unix_s));
    return [first, end];
  }

  draw() {
    const doing = new Map((this.status?.workers ?? []).map((worker) => [worker.worker, worker]));
    const byWorker = Map.groupBy ? Map.groupBy(this.spans.values(), (span) => span.worker) : groupBy(this.spans.values());
    const names = [...new Set([...doing.keys(), ...byWorker.keys()])].sort(byKind);
    const [from, to] = this.range();
    this.none.hidden = names.length > 0;
    this.element.querySelector(".lanes-box").hidden = !names.length;
    reconcile(this.rows, names, (name) => name, makeLane, (lane, name) => {
      this.describe(lane, name, doing.get(name));
      const current = doing.get(name);
      const open = current?.activity ? [{ activity: current.activity, start_unix_s: Date.parse(current.since) / 1000, end_unix_s: to, step: this.status.step, open: true }] : [];
      drawSpans(lane.track, [...(byWorker.get(name) ?? []), ...open], from, to);
    });
    const used = [...new Set([...this.spans.values()].map((span) => span.activity))].sort();
    reconcile(this.legend, used, (name) => name, (name) => h("li", {}, h("i", { class: `swatch a-${name}` }), h("span", {}, name)));
    reconcile(this.axis, Array.from({ length: TICKS }, (_, i) => i), (i) => i, () => h("span", {}), (tick, i) => {
      setText(tick, clock((from + ((to - from) * i) / (TICKS - 1)) * 1000));
    });
  }

  describe(lane, name, doing) {
    const worker = this.workers.get(name);
    setText(lane.name, name);
    const lost = worker?.health === "lost";
    let text = "not attached";
    if (this.ended) text = "the job has ended";
    else if (lost) text = `lost: no sign of life for ${duration(since(worker.last_seen_at))}`;
    else if (doing?.activity) text = `${ACTIVITIES[doing.activity] ?? doing.activity}, for ${duration(since(doing.since))}`;
    else if (doing) text = `waits for ${doing.waiting_for ?? "work"}, for ${duration(since(doing.since))}`;
    setText(lane.now, text);
    lane.dataset.tone = lost || worker?.health === "quarantined" ? "bad" : worker?.health === "stuck" || (!this.ended && doing?.waiting_for && since(doing.since) > LONG_S) ? "warn" : doing?.activity ? "live" : "";
    setText(lane.load, worker && !this.ended ? loadText(worker) : "");
  }
}

const KINDS = ["trainer", "draft-trainer", "rollout", "reward", "weightsync"];
function byKind(a, b) {
  const rank = (name) => KINDS.findIndex((kind) => name.startsWith(kind));
  return rank(a) - rank(b) || a.localeCompare(b, "en", { numeric: true });
}

function groupBy(spans) {
  const groups = new Map();
  for (const span of spans) groups.set(span.worker, [...(groups.get(span.worker) ?? []), span]);
  return groups;
}

function loadText(worker) {
  const { running_requests: running, waiting_requests: waiting, running_samples: scoring } = worker.load;
  if (running !== undefined) return `${number(running)} running, ${number(waiting)} waiting`;
  return scoring !== undefined ? `${number(scoring)} being scored` : "";
}

function makeLane() {
  const lane = h("div", { class: "lane" });
  lane.name = h("b", { class: "lane-name" });
  lane.now = h("span", { class: "lane-now" });
  lane.load = h("span", { class: "lane-load dim" });
  lane.track = svg("svg", { class: "lane-track", preserveAspectRatio: "none", viewBox: "0 0 1000 20", "aria-hidden": "true" });
  lane.append(h("div", { class: "lane-text" }, lane.name, lane.now, lane.load), lane.track);
  return lane;
}

function drawSpans(track, spans, from, to) {
  const scale = 1000 / (to - from);
  const shapes = [];
  for (const span of spans) {
    if (span.end_unix_s < from || span.start_unix_s > to) continue;
    const x = Math.max(0, (span.start_unix_s - from) * scale);
    const width = Math.max(0.8, Math.min(1000, (span.end_unix_s - from) * scale) - x);
    const shape = svg("rect", { x: x.toFixed(2), y: 0, width: width.toFixed(2), height: 20, class: `a-${span.activity}${span.open ? " open" : ""}` });
    const title = svg("title");
    title.textContent = `${span.activity}, step ${span.step}, ${duration(span.end_unix_s - span.start_unix_s)}`;
    shape.append(title);
    shapes.push(shape);
  }
  track.replaceChildren(...shapes);
}
