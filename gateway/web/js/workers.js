// All workers of the installation, whatever job they serve.

import { get } from "./api.js";
import { every, h, reconcile, setText } from "./dom.js";
import { duration, number, since } from "./format.js";
import { empty, tableBox } from "./parts.js";

const TONES = { good: "good", stuck: "warn", quarantined: "bad", lost: "bad" };

export function workersView(main) {
  document.title = "Workers · miles";
  const body = h("tbody");
  const columns = ["Worker", "Health", "Activity", "#Unchanged for", "Load", "#Version", "Address", "Process"];
  const table = h("div", { class: "card" }, tableBox("Workers", columns, body));
  const none = h("div", { class: "card", hidden: true }, empty("No workers are attached", "Start services with miles serve, or train.py."));
  const trouble = h("p", { class: "notice", data: { tone: "bad" }, hidden: true });
  main.append(h("div", { class: "stack" }, h("h1", {}, "Workers"), trouble, table, none));

  async function refresh() {
    try {
      const { workers } = await get("/v1/workers");
      trouble.hidden = true;
      table.hidden = !workers.length;
      none.hidden = workers.length > 0;
      reconcile(body, workers, (worker) => worker.id, makeRow, updateRow);
    } catch (problem) {
      setText(trouble, problem.message);
      trouble.hidden = problem.status === 401;
    }
  }

  return { close: every(1500, refresh) };
}

function makeRow() {
  const row = h("tr", {}, h("th", { scope: "row" }), h("td"), h("td"), h("td", { class: "num" }), h("td", { class: "dim" }), h("td", { class: "num" }), h("td", { class: "mono dim" }), h("td", { class: "dim" }));
  row.badge = h("span", { class: "badge" });
  row.children[1].append(row.badge);
  return row;
}

function updateRow(row, worker) {
  row.badge.dataset.tone = TONES[worker.health] ?? "";
  setText(row.badge, worker.health);
  const load = Object.entries(worker.load).map(([name, value]) => `${name.replaceAll("_", " ")} ${number(value)}`).join(", ");
  const changed = worker.health === "lost" ? worker.last_seen_at : worker.progress_at;
  const process = [worker.info.host, worker.info.pid ? `pid ${worker.info.pid}` : ""].filter(Boolean).join(", ");
  const texts = [worker.id, null, worker.activity || "–", changed ? duration(since(changed)) : "–", load || "–", worker.version ?? "–", worker.address, process];
  texts.forEach((text, i) => text !== null && setText(row.children[i], text));
}
