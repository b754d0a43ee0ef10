// Pieces that several views show.

import { h } from "./dom.js";
import { TONES } from "./format.js";

export function stateBadge(state) {
  return h("span", { class: "badge", data: { tone: TONES[state] ?? "" } }, state);
}

export function updateBadge(badge, state) {
  badge.dataset.tone = TONES[state] ?? "";
  badge.textContent = state;
}

export function empty(title, text, ...more) {
  return h("div", { class: "empty" }, h("strong", {}, title), h("span", {}, text), more);
}

/** A table that can be scrolled, with the keyboard too; `columns` of numbers have a # in front. */
export function tableBox(label, columns, body, name = "") {
  const cells = columns.map((column) => h("th", { scope: "col", class: column.startsWith("#") ? "num" : "" }, column.replace("#", "")));
  return h("div", { class: "scroll", role: "region", tabIndex: 0, "aria-label": `${label}: table` },
    h("table", { class: name }, h("caption", { class: "unseen" }, label), h("thead", {}, h("tr", {}, cells)), body));
}

/** Buttons of which one is pressed. */
export function segments(label, options, chosen, onChoose) {
  const buttons = options.map(([value, text]) =>
    h("button", { type: "button", data: { value }, "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text));
  const choose = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === String(value)));
    onChoose(value);
  };
  return h("div", { class: "segments", role: "group", "aria-label": label }, buttons);
}

/** Tabs after the ARIA pattern: arrows move between them, and a tab's panel is made when it is first shown. */
export function tabs(label, items, onChoose) {
  const list = h("div", { role: "tablist", "aria-label": label });
  const panels = h("div", {});
  const made = new Map();
  for (const { id, title } of items) {
    list.append(h("button", {
      type: "button", role: "tab", id: `tab-${id}`, "aria-controls": `panel-${id}`, "aria-selected": "false", tabIndex: -1,
      onclick: () => onChoose(id),
    }, title));
    panels.append(h("div", { role: "tabpanel", id: `panel-${id}`, "aria-labelledby": `tab-${id}`, hidden: true }));
  }
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...list.children];
    const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
    next.click();
    next.focus();
    event.preventDefault();
  });
  return {
    element: [list, panels],
    show(id) {
      for (const tab of list.children) {
        const chosen = tab.id === `tab-${id}`;
        tab.setAttribute("aria-selected", String(chosen));
        tab.tabIndex = chosen ? 0 : -1;
      }
      for (const panel of panels.children) {
        panel.hidden = panel.id !== `panel-${id}`;
        if (!panel.hidden && !made.has(id)) made.set(id, items.find((item) => item.id === id).make(panel));
      }
      return made.get(id);
    },
    made: () => [...made.values()],
  };
}
