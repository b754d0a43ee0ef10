// Questions to the user: the key, "are you sure", and the list of shortcuts.

import { key } from "./api.js";
import { h } from "./dom.js";

function show(content, label) {
  const dialog = h("dialog", { "aria-label": label }, content);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

let asking = null;

/** Ask for an API key; calls back when one was given. */
export function askForKey(why, onGiven) {
  if (asking?.open) return;
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: false, required: true, id: "api-key" });
  const form = h(
    "form",
    { method: "dialog", onsubmit: () => { key.set(input.value.trim()); onGiven(); } },
    h("h2", {}, "API key"),
    h("p", { class: "dim" }, why || "The key stays in this tab and is forgotten when it is closed."),
    h("label", { htmlFor: "api-key" }, "Key"),
    input,
    h(
      "div",
      { class: "buttons" },
      key.get() ? h("button", { type: "button", onclick: () => { key.set(null); asking.close(); onGiven(); } }, "Forget the key") : null,
      h("button", { type: "button", onclick: () => asking.close() }, "Not now"),
      h("button", { class: "primary" }, "Use this key"),
    ),
  );
  asking = show(form, "API key");
}

/** Ask before something that cannot be taken back; resolves to whether to do it. */
export function confirm(title, text, doIt, { danger = false } = {}) {
  return new Promise((resolve) => {
    const dialog = show(
      h(
        "form",
        { method: "dialog" },
        h("h2", {}, title),
        h("p", { class: "dim" }, text),
        h(
          "div",
          { class: "buttons" },
          h("button", { value: "no" }, "No"),
          h("button", { value: "yes", class: danger ? "danger primary" : "primary" }, doIt),
        ),
      ),
      title,
    );
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"));
  });
}

const SHORTCUTS = [
  ["?", "this list"],
  ["g j", "jobs"],
  ["g w", "workers"],
  ["g s", "submit a job"],
  ["t", "dark or light"],
  ["1 … 6", "tabs of a job"],
  ["/", "filter of samples or settings"],
  ["← →", "the sample or token before and after, in an open sample"],
  ["Esc", "close what is open"],
];

/** Whether single keys act; a setting of this browser. */
export const shortcuts = {
  on: () => localStorage.getItem("miles.shortcuts") !== "off",
  set: (on) => localStorage.setItem("miles.shortcuts", on ? "on" : "off"),
};

export function showHelp() {
  const dialog = show(
    h(
      "div",
      { class: "body" },
      h("h2", {}, "Keyboard shortcuts"),
      h("dl", { class: "keys" }, SHORTCUTS.map(([keys, what]) => [
        h("dt", {}, keys.split(" ").map((each, i) => [i ? " " : "", each === "…" ? each : h("kbd", {}, each)])),
        h("dd", {}, what),
      ])),
      h("label", { class: "check" },
        h("input", { type: "checkbox", checked: shortcuts.on(), onchange: (event) => shortcuts.set(event.target.checked) }),
        "Single keys act"),
      h("div", { class: "buttons" }, h("button", { class: "primary", onclick: () => dialog.close() }, "Close")),
    ),
    "Keyboard shortcuts",
  );
}
