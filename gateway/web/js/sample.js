// One sample: its prompt, its numbers, and its tokens in colours.

import { get, job as path } from "./api.js";
import { h, setText } from "./dom.js";
import { number, signed, versionText } from "./format.js";
import { segments } from "./parts.js";

/** What tokens can be coloured by: the value of a token, and whether it has two signs. */
const MEASURES = {
  difference: { label: "Log-prob difference", of: (tokens, i) => absolute(tokens.train_log_probs[i], tokens.rollout_log_probs[i]) },
  advantage: { label: "Advantage", of: (tokens, i) => tokens.advantages[i], signed: true },
  surprise: { label: "Surprise", of: (tokens, i) => negative(tokens.train_log_probs[i] ?? tokens.rollout_log_probs[i]) },
};
const absolute = (a, b) => (typeof a === "number" && typeof b === "number" ? Math.abs(a - b) : null);
const negative = (a) => (typeof a === "number" ? -a : null);

export class SampleView {
  constructor(place, jobId, key, { before, after }) {
    this.place = place;
    this.key = key;
    this.jobId = jobId;
    this.measure = localStorage.getItem("miles.tokens") ?? "difference";
    this.life = new AbortController();
    const href = (wanted) => `#/jobs/${encodeURIComponent(jobId)}/samples${wanted ? `/${wanted}` : ""}`;
    this.steps = { ArrowLeft: before && href(before), ArrowRight: after && href(after), Escape: href("") };
    const link = (to, label) => (to ? h("a", { class: "button", href: to }, label) : null);
    this.title = h("h2", { tabIndex: -1 }, "Sample");
    this.content = h("div", { class: "pad stack" });
    place.replaceChildren(h("section", { class: "card", "aria-label": "Sample" },
      h("header", {}, link(href(""), "All samples"), this.title, h("span", { class: "grow" }), link(this.steps.ArrowLeft, "Before"), link(this.steps.ArrowRight, "After")),
      this.content));
    addEventListener("keydown", (event) => this.onKey(event), { signal: this.life.signal });
    this.title.focus({ preventScroll: true });
    this.load();
  }

  close() {
    this.life.abort();
    this.place.replaceChildren();
  }

  onKey(event) {
    if (event.target.closest?.("input, textarea, select, dialog, [role=tab], .tokens") && event.key !== "Escape") return;
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const to = this.steps[event.key];
    if (to) location.hash = to;
  }

  async load() {
    try {
      this.show(await get(path(this.jobId, `/samples/${this.key}`), {}, this.life.signal));
    } catch (problem) {
      if (!this.life.signal.aborted) this.content.replaceChildren(h("p", { class: "notice", data: { tone: "bad" } }, problem.message));
    }
  }

  show(sample) {
    setText(this.title, `Sample ${sample.index} of group ${sample.group_id}, step ${sample.step}`);
    const facts = [
      ["Reward", sample.reward === null ? "–" : number(sample.reward)],
      ["Advantage", sample.advantage === null ? "–" : signed(sample.advantage)],
      ["Log-prob difference", sample.log_prob_diff ? `${number(sample.log_prob_diff.mean)}, at most ${number(sample.log_prob_diff.max)}` : "–"],
      ["Tokens", sample.response_length], ["Versions", versionText(sample.versions)], ["End", sample.status],
      ...(sample.label === null ? [] : [["Label", sample.label]]),
      ...Object.entries(sample.reward_parts).map(([name, value]) => [`Reward: ${name}`, number(value)]),
    ];
    this.content.replaceChildren(
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "num" }, value)))),
      h("section", {}, h("h3", {}, "Prompt"), promptElement(sample.prompt)),
      this.responseSection(sample));
  }

  responseSection(sample) {
    const section = h("section", { class: "stack" });
    if (!sample.tokens?.ids.length || !sample.tokens.texts.some(Boolean)) {
      section.append(h("h3", {}, "Response"), h("pre", { class: "text" }, sample.response), h("p", { class: "dim small" }, "Numbers of single tokens were not recorded."));
      return section;
    }
    this.tokens = sample.tokens;
    this.scale = h("div", { class: "scale" });
    this.said = h("p", { class: "token-facts num", role: "status" }, "Point at a token, or walk over them with the arrow keys.");
    this.text = h("div", { class: "tokens text", role: "group", "aria-label": "Tokens of the response", tabIndex: 0 });
    this.text.addEventListener("keydown", (event) => this.walk(event));
    this.text.addEventListener("pointerover", (event) => { if (event.target.dataset.i) this.choose(Number(event.target.dataset.i)); });
    const options = Object.entries(MEASURES).map(([name, { label }]) => [name, label]);
    if (!(this.measure in MEASURES)) this.measure = "difference";
    section.append(
      h("div", { class: "row" }, h("h3", {}, "Response"), h("span", { class: "grow" }),
        segments("Colour tokens by", options, this.measure, (measure) => { this.measure = measure; localStorage.setItem("miles.tokens", measure); this.paint(); })),
      this.scale, this.text, this.said);
    this.makeTokens();
    this.paint();
    return section;
  }

  makeTokens() {
    const { ids, texts, mask, skipped, skipped_at: at } = this.tokens;
    this.spans = ids.map((_, i) => h("span", { class: mask[i] === 0 ? "untrained" : "", data: { i } }, visible(texts[i])));
    const children = skipped ? [...this.spans.slice(0, at), h("em", {}, `[… ${skipped} tokens …]`), ...this.spans.slice(at)] : this.spans;
    this.text.replaceChildren(...children);
  }

  paint() {
    const { of, signed: twoSigns, label } = MEASURES[this.measure];
    const values = this.spans.map((_, i) => of(this.tokens, i) ?? null);
    const sizes = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
    const top = sizes.length ? sizes[Math.ceil(0.99 * (sizes.length - 1))] || sizes.at(-1) : 0;
    this.spans.forEach((span, i) => {
      const strength = values[i] === null || !top ? 0 : Math.min(1, Math.abs(values[i]) / top);
      span.style.setProperty("--heat", `${Math.round(strength * 100)}%`);
      span.dataset.sign = twoSigns ? (values[i] < 0 ? "minus" : "plus") : "one";
    });
    const known = sizes.length > 0;
    const text = !known ? `${label}: not recorded` : top ? "" : `${label}: 0 for every token`;
    this.scale.replaceChildren(...(text ? [h("span", { class: "dim small" }, text)] : [
      h("span", { class: "small num" }, twoSigns ? signed(-top, 2) : "0"),
      h("i", { class: twoSigns ? "ramp two" : "ramp" }),
      h("span", { class: "small num" }, twoSigns ? signed(top, 2) : `${number(top, 2)} and more`)]));
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const last = this.spans.length - 1;
    this.choose(Math.max(0, Math.min(last, (this.chosen ?? (step > 0 ? -1 : last + 1)) + step)));
  }

  choose(i) {
    this.spans[this.chosen]?.classList.remove("chosen");
    this.chosen = i;
    this.spans[i].classList.add("chosen");
    this.spans[i].scrollIntoView({ block: "nearest" });
    const { ids, texts, train_log_probs: train, rollout_log_probs: engine, advantages, mask } = this.tokens;
    const show = (value) => (typeof value === "number" ? number(value, 4) : "–");
    const parts = [
      `“${texts[i]}” (${ids[i]})`, `trainer ${show(train[i])}`, `engine ${show(engine[i])}`,
      `difference ${show(absolute(train[i], engine[i]))}`, `advantage ${show(advantages[i])}`,
    ];
    if (mask[i] === 0) parts.push("not trained on");
    setText(this.said, parts.join("  ·  "));
  }
}

/** Text of a token in which white space can be seen. */
function visible(text) {
  return text === "" ? "·" : text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t");
}

function promptElement(prompt) {
  if (typeof prompt === "string") return h("pre", { class: "text" }, prompt);
  return h("div", { class: "messages" }, prompt.map((message) => h("div", { class: "message" },
    h("b", { class: "small" }, message.role ?? "message"),
    h("pre", { class: "text" }, typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? message, null, 2)))));
}
