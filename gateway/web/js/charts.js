// Curves over training steps.

import uPlot from "../vendor/uplot/uPlot.js";
import { h, setText } from "./dom.js";
import { number, percent } from "./format.js";

const GRID_ALPHA = 0.55;
const SMOOTHING = 0.85;
const RANGE_PADDING = 0.1;
const NOTHING = 1e-24;
const MOST_ENGINES = 4;

/** Which metrics a chart shows; one whose metrics are not there says how to get them. */
export const CHARTS = [
  { id: "reward", title: "Reward", series: [["rollout/raw_reward", "training"]], evaluations: true, wide: true },
  { id: "kl", title: "KL divergence", series: [["train/ppo_kl", "old policy to new"], ["train/train_rollout_kl", "engine to trainer"], ["train/kl_loss", "to the reference"]] },
  { id: "difference", title: "Log-prob difference", series: [["train/train_rollout_logprob_abs_diff", "mean |trainer − engine|"]] },
  { id: "entropy", title: "Entropy", series: [["train/entropy_loss", "of the policy, in nats"]], hint: "Not measured: submit with observe_training_entropy." },
  { id: "staleness", title: "Staleness", series: [["rollout/fully_async/avg_staleness", "mean"], ["rollout/fully_async/max_staleness", "oldest"]], unit: "versions" },
  { id: "speed", title: "Tokens per second", series: [["tokens_per_s", "trained on"]] },
  { id: "time", title: "Time of a step", shares: [["perf/rollout_time", "waiting for samples"], ["perf/actor_train_time", "training"], ["perf/update_weights_time", "weights"]], total: "perf/step_time" },
  { id: "acceptance", title: "Tokens per verification", engines: "speculative/accept_length", unit: "tokens", hint: "Engines measure it that draft (sglang_speculative_algorithm)." },
  { id: "length", title: "Response length", series: [["rollout/response_len/mean", "mean"], ["rollout/response_len/max", "longest"]], unit: "tokens" },
  { id: "loss", title: "Loss", series: [["train/loss", "all"], ["train/pg_loss", "policy"]] },
  { id: "gradient", title: "Gradient norm", series: [["train/grad_norm", "before clipping"]] },
];

/** The metrics that charts are made of, as the gateway is asked for them. */
export const NAMES = [...new Set([...CHARTS.flatMap((chart) => [...(chart.series ?? []), ...(chart.shares ?? [])].map(([name]) => name)), ...CHARTS.flatMap((chart) => (chart.engines ? [`${chart.engines}*`] : [])), "perf/step_time", "perf/tokens_per_gpu_per_sec", "eval/*"])].filter((name) => name.includes("/"));

/** Values by name and step of one job. */
export class Curves {
  constructor(ranks = 1) {
    this.ranks = ranks;
    this.values = new Map();
    this.newest = -1;
    this.changed = true;
  }

  add(name, step, value) {
    if (name === "perf/tokens_per_gpu_per_sec") this.add("tokens_per_s", step, value === null ? null : value * this.ranks);
    if (!this.values.has(name)) this.values.set(name, new Map());
    this.values.get(name).set(step, value);
    this.newest = Math.max(this.newest, step);
    this.changed = true;
  }

  /** A job that was resumed from an earlier checkpoint takes later steps again. */
  clear() {
    this.values.clear();
    this.newest = -1;
  }

  has(name) {
    return this.values.has(name);
  }

  latest(name) {
    const values = this.values.get(name);
    return values ? values.get(Math.max(...values.keys())) : undefined;
  }

  /** Mean of the newest values. */
  recent(name, count) {
    const values = this.values.get(name);
    const newest = values ? [...values.keys()].sort((a, b) => b - a).slice(0, count) : [];
    return newest.length ? newest.reduce((sum, step) => sum + values.get(step), 0) / newest.length : undefined;
  }

  first(name) {
    const values = this.values.get(name);
    return values ? values.get(Math.min(...values.keys())) : undefined;
  }

  evaluations() {
    return [...this.values.keys()].filter((name) => /^eval\/[^/]+$/.test(name)).sort();
  }

  /** A metric over all engines, and of each or, of too many, the least and the most, as [name, label]. */
  engines(metric) {
    const of = [...this.values.keys()].filter((name) => name.startsWith(`${metric}/`)).sort();
    if (of.length < 2) return of.map((name) => [name, name.slice(metric.length + 1)]);
    const all = this.has(metric) ? [[metric, "all engines"]] : [];
    if (of.length <= MOST_ENGINES) return [...all, ...of.map((name) => [name, name.slice(metric.length + 1)])];
    const least = new Map();
    const most = new Map();
    for (const name of of) {
      for (const [step, value] of this.values.get(name)) {
        if (value === null) continue;
        least.set(step, Math.min(value, least.get(step) ?? value));
        most.set(step, Math.max(value, most.get(step) ?? value));
      }
    }
    this.values.set(`least of ${metric}`, least);
    this.values.set(`most of ${metric}`, most);
    return [...all, [`least of ${metric}`, "least"], [`most of ${metric}`, "most"]];
  }
}

/** A colour that the style sheet names, as the canvas wants it. */
function colour(name) {
  const probe = h("i", { hidden: true });
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export class Chart {
  constructor(definition, curves) {
    this.definition = definition;
    this.curves = curves;
    this.smooth = false;
    this.plot = null;
    this.shape = "";
    this.legend = h("ul", { class: "legend" });
    this.canvas = h("div", { class: "plot", role: "img", "aria-label": `${definition.title}: no values yet` });
    this.hint = h("p", { class: "plot-hint dim small", hidden: true });
    this.element = h("section", { class: `card chart${definition.wide ? " wide" : ""}`, id: `chart-${definition.id}`, "aria-label": definition.title },
      h("header", {}, h("h3", {}, definition.title), this.legend), this.canvas, this.hint);
    this.watcher = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.watcher.observe(this.canvas);
  }

  close() {
    this.watcher.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  size() {
    return { width: Math.max(160, this.canvas.clientWidth), height: Math.max(120, this.canvas.clientHeight) };
  }

  /** The lines there are, as [name, label, colour's name]. */
  lines() {
    const { series, shares, evaluations, engines } = this.definition;
    const there = engines ? this.curves.engines(engines) : (shares ?? series).filter(([name]) => this.curves.has(name));
    const found = there.map(([name, label], i) => [name, label, `s${i + 1}`]);
    if (evaluations) this.curves.evaluations().forEach((name, i) => found.push([name, name.replace("eval/", "evaluation "), `s${2 + (i % 4)}`]));
    return found;
  }

  update() {
    const lines = this.lines();
    this.hint.hidden = lines.length > 0;
    this.canvas.hidden = !lines.length;
    if (!lines.length) {
      setText(this.hint, !this.curves.has("perf/step_time") ? "Comes with the first step." : this.definition.hint ?? "Not measured by this job.");
      return;
    }
    const data = this.definition.shares ? this.stacked(lines) : this.plain(lines);
    const shape = `${lines.map(([name]) => name).join()}|${this.smooth}`;
    if (!this.plot || shape !== this.shape) this.build(lines, shape, data);
    else this.plot.setData(data);
    this.describe(lines);
  }

  plain(lines) {
    const steps = [...new Set(lines.flatMap(([name]) => [...this.curves.values.get(name).keys()]))].sort((a, b) => a - b);
    this.raw = lines.map(([name]) => steps.map((step) => this.curves.values.get(name).get(step) ?? null));
    const evaluation = (name) => name.startsWith("eval/");
    const shown = lines.map(([name], i) => (this.smooth && !evaluation(name) ? smoothed(this.raw[i]) : this.raw[i]));
    return [steps, ...shown];
  }

  /** Shares of the step's time, each on top of those before; the last is whatever is left. */
  stacked(lines) {
    const totals = this.curves.values.get(this.definition.total) ?? new Map();
    const steps = [...totals.keys()].sort((a, b) => a - b);
    this.raw = lines.map(([name]) => steps.map((step) => (this.curves.values.get(name).get(step) ?? 0) / (totals.get(step) || 1)));
    const shown = this.smooth ? this.raw.map(smoothed) : this.raw;
    const sums = steps.map(() => 0);
    return [steps, ...shown.map((share) => share.map((value, i) => (sums[i] = Math.min(1, sums[i] + value))))];
  }

  build(lines, shape, data) {
    this.plot?.destroy();
    this.shape = shape;
    const stack = Boolean(this.definition.shares);
    const font = "11.5px Inter, system-ui, sans-serif";
    const axis = { stroke: colour("dim"), font, ticks: { show: false }, grid: { stroke: withAlpha(colour("line"), GRID_ALPHA), width: 1 } };
    const series = lines.map(([name, , hue], i) => {
      const stroke = colour(hue);
      const evaluation = name.startsWith("eval/");
      return {
        stroke, width: evaluation ? 1.5 : 2, spanGaps: true, paths: stack ? undefined : uPlot.paths.linear(),
        fill: stack ? withAlpha(stroke, 0.5) : i === 0 ? withAlpha(stroke, 0.07) : undefined,
        points: evaluation ? { show: true, size: 7, fill: stroke } : { show: (plot) => plot.data[0].length < 2, size: 6 },
      };
    });
    const options = {
      ...this.size(), series: [{}, ...series], legend: { show: false }, padding: [10, 14, 0, 0],
      bands: stack ? lines.slice(1).map((_, i) => ({ series: [i + 2, i + 1] })) : [],
      scales: { x: { time: false, range: stepRange }, y: { range: stack ? [0, 1] : valueRange } },
      axes: [{ ...axis, size: 28, incrs: WHOLE }, { ...axis, size: 54, values: (_, ticks) => ticks.map((tick) => (stack ? percent(tick) : number(tick))) }],
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false }, points: { size: 7 } },
      hooks: { setCursor: [() => this.describe(lines)] },
    };
    this.canvas.replaceChildren();
    this.plot = new uPlot(options, data, this.canvas);
  }

  /** Values in the legend: those below the pointer, else the newest. */
  describe(lines) {
    const at = this.plot?.cursor.idx ?? null;
    const show = (value) => (value === null || value === undefined ? "–" : this.definition.shares ? percent(value) : number(value));
    const texts = lines.map((_, i) => show(at === null ? this.raw[i].findLast((value) => value !== null) : this.raw[i][at]));
    if (this.legend.children.length !== lines.length) {
      this.legend.replaceChildren(...lines.map(([, label, hue]) =>
        h("li", {}, h("i", { class: `swatch ${hue}` }), h("span", {}, label), h("b", { class: "num" }))));
    }
    lines.forEach((_, i) => setText(this.legend.children[i].lastElementChild, texts[i]));
    if (at === null) {
      const unit = this.definition.unit ? ` ${this.definition.unit}` : "";
      this.canvas.setAttribute("aria-label", `${this.definition.title} at step ${this.curves.newest}: ${lines.map(([, label], i) => `${label} ${texts[i]}${unit}`).join(", ")}`);
    }
  }

  recolour() {
    this.shape = "";
    this.update();
  }
}

function stepRange(plot, low, high) {
  const steps = plot.data[0];
  return steps.length < 2 ? [(steps[0] ?? 0) - 0.5, (steps[0] ?? 0) + 0.5] : [low, high];
}

/** The axis of values: 0 to 1 for a curve that is 0 throughout. */
export function valueRange(plot, low, high) {
  if (low === null || low === undefined) return [null, null];
  return Math.max(Math.abs(low), Math.abs(high)) < NOTHING ? [0, 1] : uPlot.rangeNum(low, high, RANGE_PADDING, true);
}

const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000];

function withAlpha(rgb, alpha) {
  const [r, g, b] = rgb.match(/[\d.]+/g);
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

/** Exponential moving average without the pull of its beginning. */
function smoothed(values) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return sum / weight;
  });
}
