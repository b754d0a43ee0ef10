// Calls to the gateway. The key, when one is needed, lives as long as the tab and goes nowhere but into a header.

const STORED = "miles.key";

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

/** A problem document, or no answer at all (status 0). */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `the gateway answered ${status}`);
    this.status = status;
    this.kind = (document.type ?? "").replace("/problems/", "");
    this.faults = document.faults ?? [];
  }
}

/** Tells of "key-needed", and of "connection" with "live" or "away". */
export const signals = new EventTarget();

let connection = "connecting";
function setConnection(state) {
  if (state === connection) return;
  connection = state;
  signals.dispatchEvent(new CustomEvent("connection", { detail: state }));
}

async function send(path, { method = "GET", query = {}, body, headers = {}, signal } = {}) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(query)) {
    for (const each of [value].flat()) if (each !== undefined && each !== null && each !== "") url.searchParams.append(name, each);
  }
  const all = { ...headers };
  if (key.get()) all.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) all["Content-Type"] = "application/json";
  let answer;
  try {
    const content = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(url, { method, headers: all, body: content, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    setConnection("away");
    throw new Problem(0, { detail: "the gateway does not answer; trying again" });
  }
  const away = answer.status === 502 || answer.status === 503;
  setConnection(away ? "away" : "live");
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => ({}));
  if (document.type === "/problems/unknown-key") key.set(null);
  if (answer.status === 401) signals.dispatchEvent(new CustomEvent("key-needed", { detail: document.detail }));
  throw new Problem(answer.status, document);
}

export async function get(path, query, signal) {
  return (await send(path, { query, signal })).json();
}

export async function post(path, body, { query, idempotencyKey } = {}) {
  const headers = { "Idempotency-Key": idempotencyKey ?? crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
  const answer = await send(path, { method: "POST", body, query, headers });
  return answer.status === 204 ? null : answer.json();
}

export const job = (id, rest = "") => `/v1/jobs/${encodeURIComponent(id)}${rest}`;

/** Follow a job's events after the given one, through broken connections, until the job has ended. */
export async function follow(id, after, onEvent, signal) {
  let last = after;
  let wait = 500;
  while (!signal.aborted) {
    try {
      const answer = await send(job(id, "/events"), { headers: last ? { "Last-Event-ID": last } : {}, signal });
      for await (const event of parse(answer.body)) {
        wait = 500;
        if (event.type === "end") return;
        last = event.id;
        onEvent(event);
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && error.status >= 400 && error.status < 500 && error.status !== 429)) return;
    }
    await new Promise((done) => setTimeout(done, wait));
    wait = Math.min(wait * 2, 8000);
  }
}

/** Server-sent events of a body. EventSource would do, but it cannot send a key. */
async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

/** Save an answer as a file; with a key it has to go through this page's memory. */
export async function download(path, name) {
  const link = document.createElement("a");
  if (key.get()) {
    const answer = await send(path);
    link.href = URL.createObjectURL(await answer.blob());
  } else {
    link.href = path;
  }
  link.download = name;
  link.click();
}
