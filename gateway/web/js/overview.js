// Curves and what workers do.

import { CHARTS, Chart } from "./charts.js";
import { every, h } from "./dom.js";
import { Lanes } from "./lanes.js";

export function overviewTab(panel, data) {
  const charts = CHARTS.map((definition) => new Chart(definition, data.curves));
  const lanes = new Lanes(data.id);
  let waiting = false;
  const smooth = h("input", { type: "checkbox", onchange: () => { for (const chart of charts) { chart.smooth = smooth.checked; chart.update(); } } });
  panel.append(h("div", { class: "stack" },
    lanes.element,
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
  const stops = [every(1500, () => (panel.hidden ? Promise.resolve() : lanes.load())), every(500, async () => updateLanes())];
  drawSoon();
  return {
    go: drawSoon,
    close() {
      removeEventListener("miles-theme", recolour);
      for (const stop of stops) stop();
      for (const chart of charts) chart.close();
    },
  };
}
