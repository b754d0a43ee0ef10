// Which view is shown, the theme, shortcuts, and the state of the connection.

import { signals } from "./api.js";
import { askForKey, shortcuts, showHelp } from "./dialogs.js";
import { announce, setText } from "./dom.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { submitView } from "./submit.js";
import { workersView } from "./workers.js";

const main = document.getElementById("main");
let current = null;

/** "#/jobs/ID/samples/1/2/3" -> the view and what it is to show. */
function route() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
  const [name = "jobs", ...rest] = parts;
  if (name === "jobs" && rest.length) return { name, key: `jobs/${rest[0]}`, view: jobView, rest };
  if (name === "workers") return { name, key: name, view: workersView, rest };
  if (name === "submit") return { name, key: name, view: submitView, rest };
  return { name: "jobs", key: "jobs", view: jobsView, rest: [] };
}

function show(again = false) {
  if (location.hash === "#main") return; // the link that skips to the content
  const { name, key, view, rest } = route();
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (current?.key === key && !again) {
    current.view.go?.(rest);
    return;
  }
  const first = current === null;
  current?.view.close();
  main.replaceChildren();
  current = { key, view: view(main, rest) };
  if (!first && !again) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme() {
  const theme = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("miles.theme", theme);
  announce(`${theme} colours`);
  dispatchEvent(new Event("miles-theme"));
}

let before = "";
function onKey(event) {
  const typing = event.target.closest?.("input, textarea, select, dialog") && event.key !== "?";
  if (event.ctrlKey || event.metaKey || event.altKey || typing || !shortcuts.on() || document.querySelector("dialog[open]")) return;
  if (event.target.closest?.("input, textarea, select")) return;
  const pressed = before === "g" ? `g${event.key}` : event.key;
  before = event.key;
  const go = { gj: "#/jobs", gw: "#/workers", gs: "#/submit" }[pressed];
  if (go) location.hash = go;
  else if (pressed === "?") showHelp();
  else if (pressed === "t") switchTheme();
  else if (!current?.view.onKey?.(pressed)) return;
  event.preventDefault();
}

document.getElementById("theme-button").addEventListener("click", switchTheme);
document.getElementById("help-button").addEventListener("click", showHelp);
document.getElementById("key-button").addEventListener("click", () => askForKey("", () => show(true)));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("miles-theme")));
signals.addEventListener("key-needed", ({ detail }) => {
  if (current?.asked) return; // whoever does not want to give one is not asked again and again
  if (current) current.asked = true;
  askForKey(detail, () => show(true));
});
signals.addEventListener("connection", ({ detail }) => {
  const sign = document.getElementById("connection");
  sign.dataset.state = detail;
  setText(sign.lastElementChild, detail === "live" ? "live" : "gateway or controller away");
  if (detail === "away") announce("the gateway or the controller does not answer");
});
addEventListener("hashchange", () => show());
addEventListener("keydown", onKey);
show();
