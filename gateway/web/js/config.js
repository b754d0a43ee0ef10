// The job's settings, results and checkpoints.

import { download, get, job as path } from "./api.js";
import { every, h, reconcile, setText, toast } from "./dom.js";
import { bytes, moment } from "./format.js";
import { defaults } from "./schema.js";
import { empty, tableBox } from "./parts.js";

export function configTab(panel, data) {
  const filter = h("input", { type: "search", id: "config-filter", placeholder: "Find a setting", "aria-label": "Find a setting", data: { filter: "" }, oninput: () => update() });
  const changed = h("input", { type: "checkbox", checked: true, onchange: () => update() });
  const settings = h("tbody");
  const checkpoints = h("tbody");
  const none = empty("No checkpoint yet", "Save one with the button above, or with save_interval.");
  const results = h("pre", { class: "results", tabIndex: 0, role: "region", "aria-label": "Numbers of the results" });
  const saved = tableBox("Checkpoints", ["#Step", "Saved", "#State", "Hugging Face export"], checkpoints);
  let known = {};
  panel.append(h("div", { class: "stack two" },
    h("section", { class: "card", "aria-label": "Settings" },
      h("header", {}, h("h2", {}, "Settings"), h("span", { class: "grow" }), h("label", { class: "check" }, changed, "Only those that differ from defaults"), h("div", { class: "filter" }, filter)),
      tableBox("Settings", ["Setting", "Value"], settings, "settings")),
    h("div", { class: "stack" },
      h("section", { class: "card", "aria-label": "Checkpoints" }, h("header", {}, h("h2", {}, "Checkpoints")),
        saved, none),
      h("section", { class: "card", "aria-label": "Results" }, h("header", {}, h("h2", {}, "Results so far")), results))));

  function update() {
    if (!data.job || panel.hidden) return;
    const wanted = filter.value.trim().toLowerCase();
    const rows = Object.entries(data.job.config)
      .filter(([name, value]) => (!changed.checked || (name in known && !isDefault(known[name], value))) && (!wanted || name.includes(wanted)))
      .sort(([a], [b]) => a.localeCompare(b));
    reconcile(settings, rows, ([name]) => name, ([name]) => h("tr", {}, h("th", { scope: "row", class: "mono" }, name), h("td", { class: "mono" })), (row, [name, value]) => {
      setText(row.children[1], typeof value === "string" ? value : JSON.stringify(value));
      row.title = known[name]?.description ?? "";
    });
    setText(results, JSON.stringify(data.job.summary, null, 2));
  }

  async function loadCheckpoints() {
    if (panel.hidden) return;
    const { checkpoints: found } = await get(path(data.id, "/checkpoints"));
    none.hidden = found.length > 0;
    saved.hidden = !found.length;
    reconcile(checkpoints, found, (checkpoint) => `${checkpoint.step} ${checkpoint.hf_files.length}`, (checkpoint) => {
      const size = checkpoint.hf_files.reduce((sum, file) => sum + file.size_bytes, 0);
      const name = `${data.id}-step${checkpoint.step}.tar`;
      const save = () => download(path(data.id, `/checkpoints/${checkpoint.step}/download`), name).catch((problem) => toast(problem.message, "bad"));
      return h("tr", {}, h("th", { scope: "row", class: "num" }, checkpoint.step), h("td", { class: "dim" }, moment(checkpoint.saved_at)),
        h("td", { class: "num" }, checkpoint.state_bytes ? bytes(checkpoint.state_bytes) : "–"),
        h("td", {}, checkpoint.hf_files.length ? h("button", { onclick: save }, `Download ${bytes(size)}`) : "–"));
    });
  }

  defaults().then((found) => { known = found; update(); }).catch(() => undefined);
  data.addEventListener("status", update);
  const stop = every(3000, loadCheckpoints);
  return { go: update, close: stop };
}

function isDefault(setting, value) {
  if (value === null || (Array.isArray(value) && !value.length)) return true;
  return setting !== undefined && "default" in setting && JSON.stringify(setting.default) === JSON.stringify(value);
}
