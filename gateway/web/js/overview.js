// Curves and what workers do.

import { CHARTS, Chart } from "./charts.js";
import { every, h, setText } from "./dom.js";
import { Lanes } from "./lanes.js";

export function overviewTab(panel, data) {
  const charts = CHARTS.map((definition) => new Chart(definition, data.curves));
  const lanes = new Lanes(data.id);
  const types = h("p", { class: "dim small", id: "number-types", hidden: true });
  let waiting = false;
  const smooth = h("input", { type: "checkbox", onchange: () => { for (const chart of charts) { chart.smooth = smooth.checked; chart.update(); } } });
  panel.append(h("div", { class: "stack" },
    lanes.element,
    types,
    h("div", { class: "row" }, h("h2", {}, "Curves"), h("span", { class: "dim small" }, "over training steps; drag to zoom, double-click for all"), h("span", { class: "grow" }),
      h("label", { class: "check" }, smooth, "Smooth")),
    h("div", { class: "charts" }, charts.map((chart) => chart.element))));

  const draw = () => {
    waiting = false;
    if (panel.hidden) return;
    for (const chart of charts) chart.update();
  };
  const drawSoon = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  const recolour = () => charts.forEach((chart) => chart.recolour());
  data.addEventListener("curves", drawSoon);
  addEventListener("miles-theme", recolour);
  const updateLanes = () => {
    if (panel.hidden || !data.job) return;
    lanes.update(data.status, data.workers, data.ended && data.job.ended_at ? Date.parse(data.job.ended_at) / 1000 : null);
  };
  const showTypes = () => {
    const chosen = data.job?.summary?.number_types;
    types.hidden = !chosen;
    if (chosen) setText(types, `The trainer computes in ${chosen.train_dtype}, engines in ${chosen.rollout_dtype}: ${chosen.reason}.`);
  };
  data.addEventListener("status", showTypes);
  const stops = [every(1500, () => (panel.hidden ? Promise.resolve() : lanes.load())), every(500, async () => updateLanes())];
  drawSoon();
  showTypes();
  return {
    go: drawSoon,
    close() {
      removeEventListener("miles-theme", recolour);
      data.removeEventListener("status", showTypes);
      for (const stop of stops) stop();
      for (const chart of charts) chart.close();
    },
  };
}
