// Numbers, times and sizes as people read them.

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5) return compact.format(value);
  if (size < 1e-3) return value.toExponential(Math.max(0, digits - 2));
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits).replace("-", "−");
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit ? count.toPrecision(3) : count} ${units[unit]}`;
}

export function clock(when) {
  return new Date(when).toLocaleTimeString("en-GB");
}

export function moment(when) {
  const date = new Date(when);
  const today = date.toDateString() === new Date().toDateString();
  const options = today ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return date.toLocaleString("en-GB", options);
}

/** Seconds since a time in ISO form, by this machine's clock. */
export function since(when) {
  return Math.max(0, (Date.now() - Date.parse(when)) / 1000);
}

/** What a job waits for, since when, and how that ends. */
export function waitText(wait) {
  const counted = wait.samples ? ` (${plural(wait.samples, "sample")} waiting)` : "";
  const detail = wait.detail ? `: ${wait.detail}` : "";
  const left = wait.gives_up_at ? `; gives up in ${duration(Math.max(0, (Date.parse(wait.gives_up_at) - Date.now()) / 1000))}` : "";
  const ending = wait.ending ? `; ${wait.ending}` : "";
  return `${wait.what}, for ${duration(since(wait.since))}${counted}${detail}${left}${ending}`;
}

export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

export const TONES = {
  queued: "calm", starting: "live", running: "live", paused: "warn", recovering: "warn",
  succeeded: "good", failed: "bad", cancelled: "", stopped: "",
};
export const ENDED = new Set(["succeeded", "failed", "cancelled", "stopped"]);

export function versionText(versions) {
  const found = versions.map((span) => span.version);
  return found.length ? (found[0] === found.at(-1) ? String(found[0]) : `${found[0]} – ${found.at(-1)}`) : "–";
}
