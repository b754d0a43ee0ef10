// Samples that were trained on: a table with filters; each opens to its tokens.

import { get, job as path } from "./api.js";
import { h, reconcile, setText } from "./dom.js";
import { number, signed, versionText } from "./format.js";
import { empty, tableBox } from "./parts.js";
import { SampleView } from "./sample.js";

const PAGE = 50;
const COLUMNS = ["#Step", "#Group", "#Reward", "Prompt", "Response", "#Tokens", "#Log-prob difference", "#Advantage", "#Versions", "End"];

export function samplesTab(panel, data) {
  let samples = [];
  let cursor = null;
  let asked = 0;
  let open = null;
  const field = (id, label, properties) => h("label", { htmlFor: id }, label, h("input", { id, inputMode: "decimal", autocomplete: "off", ...properties }));
  const step = field("sample-step", "Step", { placeholder: "any", data: { filter: "" } });
  const low = field("sample-low", "Reward from", { placeholder: "lowest" });
  const high = field("sample-high", "to", { placeholder: "highest" });
  const body = h("tbody");
  const table = tableBox("Samples, newest step first", COLUMNS, body, "samples");
  const none = empty("No samples", "They come with each training step; change the filter to see others.");
  const more = h("button", { onclick: () => load(true) }, "More samples");
  const footer = h("div", { class: "pad row", hidden: true }, more);
  const news = h("button", { class: "quiet", hidden: true, onclick: () => load(false) }, "");
  const status = h("span", { class: "dim small", role: "status" });
  const list = h("section", { class: "card", "aria-label": "Samples" },
    h("header", {}, h("form", { class: "filters", onsubmit: (event) => { event.preventDefault(); load(false); } },
      step, low, high, h("button", { class: "primary" }, "Show"),
      h("button", { type: "button", onclick: () => { for (const each of [step, low, high]) each.querySelector("input").value = ""; load(false); } }, "All")),
      status, h("span", { class: "grow" }), news),
    table, none, footer);
  const place = h("div", { hidden: true });
  panel.append(list, place);
  const value = (label) => label.querySelector("input").value.trim().replace(",", ".");

  async function load(further) {
    const turn = (asked += 1);
    const filter = { step: value(step), min_reward: value(low), max_reward: value(high) };
    setText(status, "loading");
    try {
      let found = [];
      let next = further ? cursor : "";
      // A page may be short, even empty, while there is more behind it.
      do {
        const page = await get(path(data.id, "/samples"), { ...filter, limit: PAGE, cursor: next });
        found = found.concat(page.samples);
        next = page.next_cursor;
      } while (next !== null && found.length < PAGE && turn === asked);
      if (turn !== asked) return;
      samples = further ? samples.concat(found) : found;
      cursor = next;
      setText(status, `${samples.length}${cursor === null ? "" : " newest"} shown`);
    } catch (problem) {
      setText(status, problem.message);
      return;
    }
    news.hidden = true;
    table.hidden = !samples.length;
    none.hidden = samples.length > 0;
    footer.hidden = cursor === null;
    reconcile(body, samples, keyOf, makeRow);
  }

  function makeRow(sample) {
    const href = `#/jobs/${encodeURIComponent(data.id)}/samples/${keyOf(sample)}`;
    const difference = sample.log_prob_diff ? `${number(sample.log_prob_diff.mean, 2)} / ${number(sample.log_prob_diff.max, 2)}` : "–";
    return h("tr", { class: "open-able", onclick: (event) => { if (!event.target.closest("a")) location.hash = href; } },
      h("td", { class: "num" }, sample.step),
      h("td", { class: "num" }, `${sample.group_id}.${sample.index}`),
      h("td", { class: "num" }, h("b", { class: "reward", data: { sign: Math.sign(sample.reward ?? 0) } }, sample.reward === null ? "–" : number(sample.reward))),
      h("td", { class: "prompt mono dim" }, preview(promptText(sample.prompt))),
      h("td", { class: "response" }, h("a", { href, class: "mono" }, preview(sample.response))),
      h("td", { class: "num" }, sample.response_length),
      h("td", { class: "num" }, difference),
      h("td", { class: "num" }, sample.advantage === null ? "–" : signed(sample.advantage)),
      h("td", { class: "num" }, versionText(sample.versions)),
      h("td", { class: "dim" }, sample.status));
  }

  function go(deeper = []) {
    const wanted = deeper.length === 3 ? deeper.join("/") : null;
    const was = open?.key;
    list.hidden = wanted !== null;
    place.hidden = wanted === null;
    if (open && open.key !== wanted) {
      open.close();
      open = null;
    }
    if (wanted === null) {
      if (!samples.length) load(false);
      const row = was && body.kept?.get(was);
      row?.querySelector("a").focus();
      return;
    }
    open ??= new SampleView(place, data.id, wanted, neighbours(wanted));
  }

  function neighbours(key) {
    const at = samples.findIndex((sample) => keyOf(sample) === key);
    return at < 0 ? {} : { before: samples[at - 1] && keyOf(samples[at - 1]), after: samples[at + 1] && keyOf(samples[at + 1]) };
  }

  data.addEventListener("curves", () => {
    if (panel.hidden || !list.isConnected || list.hidden || value(step) !== "") return;
    if (!samples.length) load(false);
    const newer = data.curves.newest - samples[0]?.step;
    news.hidden = !(newer > 0);
    setText(news, `Newer samples, to step ${data.curves.newest}`);
  });
  return { go, close: () => open?.close() };
}

const keyOf = (sample) => `${sample.step}/${sample.group_id}/${sample.index}`;

/** A prompt's text, or that of the last message of a conversation. */
function promptText(prompt) {
  const text = typeof prompt === "string" ? prompt : prompt.at(-1)?.content;
  return typeof text === "string" ? text : JSON.stringify(text ?? prompt);
}

function preview(whole) {
  const text = whole.trim().replace(/\s+/g, " ");
  return text.length > 140 ? `${text.slice(0, 140)}…` : text || "(empty)";
}
