// A job's events, and the logs of the processes that serve it.

import { get, job as path, key } from "./api.js";
import { every, h, reconcile, setText } from "./dom.js";
import { bytes, clock, moment } from "./format.js";
import { empty, segments } from "./parts.js";

const MOST_EVENTS = 1000;
const MOST_LOG_CHARS = 400_000;

export function recordsTab(panel, data) {
  let filter = "all";
  const list = h("ol", { class: "events" });
  const none = empty("Nothing has happened yet", "State changes, warnings and what the controller says show here.");
  const older = h("button", { class: "quiet", onclick: () => loadAll() }, "Everything from the beginning");
  panel.append(h("section", { class: "card", "aria-label": "Events" },
    h("header", {}, h("h2", {}, "Events"), h("span", { class: "grow" }), older,
      segments("Which events", [["all", "All"], ["state", "States"], ["trouble", "Warnings and errors"]], filter, (value) => { filter = value; update(); })),
    list, none));

  async function loadAll() {
    const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
    const answer = await fetch(path(data.id, "/events?follow=false"), { headers });
    if (!answer.ok) return;
    const blocks = (await answer.text()).split("\n\n").map((block) => block.split("\n").find((line) => line.startsWith("data: ")));
    const events = blocks.filter(Boolean).map((line) => JSON.parse(line.slice(6))).filter((event) => event.type === "state" || event.type === "log");
    const known = new Set(events.map((event) => event.id));
    data.events = [...events, ...data.events.filter((event) => !known.has(event.id))];
    older.hidden = true;
    update();
  }

  function update() {
    const shown = data.events.filter((event) => filter === "all" || (filter === "state" ? event.type === "state" : event.level === "warning" || event.level === "error" || event.state === "failed" || event.state === "recovering"));
    none.hidden = shown.length > 0;
    reconcile(list, shown.slice(-MOST_EVENTS).reverse(), (event) => event.id, (event) => {
      const what = event.type === "state" ? event.state : event.level === "info" ? event.source : event.level;
      const tone = event.type === "state" ? "state" : event.level;
      return h("li", { data: { tone } }, h("time", { dateTime: event.time, class: "num dim", title: event.time }, clock(event.time)), h("b", {}, what), h("span", {}, event.reason ?? event.text));
    });
  }

  data.addEventListener("events", update);
  update();
  return { go: update };
}

export function logsTab(panel, data) {
  const choice = h("select", { id: "log-name", onchange: () => open(choice.value) });
  const text = h("pre", { class: "log", tabIndex: 0, role: "region", "aria-label": "Lines of the log" });
  const size = h("span", { class: "dim small num" });
  const follow = h("input", { type: "checkbox", checked: true });
  let name = "";
  let offset = null;
  panel.append(h("section", { class: "card", "aria-label": "Logs" },
    h("header", {}, h("label", { class: "row", htmlFor: "log-name" }, h("span", {}, "Process"), choice), size, h("span", { class: "grow" }), h("label", { class: "check" }, follow, "Follow")),
    text));

  function open(wanted) {
    name = wanted;
    offset = null;
    text.replaceChildren();
  }

  async function turn() {
    if (panel.hidden) return;
    const { logs } = await get(path(data.id, "/logs"));
    reconcile(choice, logs, (log) => log.name, (log) => h("option", { value: log.name }, log.name));
    if (!name && logs.length) open(logs[0].name);
    if (!name) {
      setText(text, "No process has written anything for this job yet.");
      return;
    }
    choice.value = name;
    const wanted = name;
    const piece = await get(path(data.id, `/logs/${encodeURIComponent(name)}`), { offset, limit: 262144 });
    if (wanted !== name) return;
    const log = logs.find((each) => each.name === name);
    setText(size, `${bytes(piece.size_bytes)}, written ${log ? moment(log.modified_at) : ""}`);
    if (!piece.text) return;
    if (offset === null) text.replaceChildren();
    offset = piece.next_offset;
    text.append(piece.text);
    while (text.textContent.length > MOST_LOG_CHARS && text.childNodes.length > 1) text.firstChild.remove();
    if (follow.checked) text.scrollTop = text.scrollHeight;
  }

  const stop = every(1500, turn);
  return { close: stop };
}
