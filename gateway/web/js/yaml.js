// Flat settings as text: YAML of one level, as config files of the command line have it, or a JSON object.

/** Settings of a text: {values, lines (of each name, from 0), faults ([line, what is wrong])}. */
export function parse(text) {
  return text.trimStart().startsWith("{") ? parseJson(text) : parseYaml(text);
}

function parseJson(text) {
  try {
    const values = JSON.parse(text);
    const lines = {};
    const rows = text.split("\n");
    for (const name of Object.keys(values)) lines[name] = Math.max(0, rows.findIndex((row) => row.includes(JSON.stringify(name))));
    return { values, lines, faults: [] };
  } catch (error) {
    return { values: {}, lines: {}, faults: [[0, `this is not JSON: ${error.message}`]] };
  }
}

function parseYaml(text) {
  const values = {};
  const lines = {};
  const faults = [];
  let list = null;
  text.split("\n").forEach((row, number) => {
    const line = stripComment(row).trimEnd();
    if (!line.trim()) return;
    const item = /^\s*-\s+(.*)$/.exec(line);
    if (item && list) {
      if (!Array.isArray(values[list])) values[list] = [];
      values[list].push(scalar(item[1]));
      return;
    }
    const pair = /^([A-Za-z_][\w-]*)\s*:(?:\s+(.*))?$/.exec(line);
    if (!pair) {
      faults.push([number, "write NAME: VALUE, one setting a line"]);
      return;
    }
    const name = pair[1].replaceAll("-", "_");
    if (name in values) faults.push([number, `${name} is given twice`]);
    lines[name] = number;
    try {
      values[name] = valueOf((pair[2] ?? "").trim());
      list = values[name] === null ? name : null;
    } catch {
      faults.push([number, `the value of ${name} cannot be read`]);
    }
  });
  return { values, lines, faults };
}

function stripComment(row) {
  const at = /(^|\s)#(?=(?:[^"']|"[^"]*"|'[^']*')*$)/.exec(row);
  return at ? row.slice(0, at.index) : row;
}

function valueOf(text) {
  if (text.startsWith("[") && text.endsWith("]")) return text.slice(1, -1).trim() ? text.slice(1, -1).split(",").map((each) => scalar(each.trim())) : [];
  return text.startsWith("{") ? JSON.parse(text) : scalar(text);
}

function scalar(text) {
  if (text === "" || text === "~" || text === "null") return null;
  if (text.startsWith('"')) return JSON.parse(text);
  if (text.startsWith("'")) return text.slice(1, -1).replaceAll("''", "'");
  if (/^(true|false)$/i.test(text)) return text.toLowerCase() === "true";
  if (/^[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text)) return Number(text.replaceAll("_", ""));
  return text;
}

/** A value as a text that is read back as the same. */
export function write(value) {
  if (typeof value === "string") return typeof scalar(value) === "string" && !/[#:"'[\]{}\n]|^\s|\s$|^$/.test(value) ? value : JSON.stringify(value);
  if (Array.isArray(value) && value.every((each) => !String(each).includes(","))) return `[${value.map(write).join(", ")}]`;
  if (typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3) return value.toExponential();
  return JSON.stringify(value);
}

/** The text with one setting changed, added, or (with an undefined value) taken out. */
export function change(text, name, value) {
  const { values, lines } = parse(text);
  if (text.trimStart().startsWith("{")) return `${JSON.stringify({ ...values, [name]: value }, null, 2)}\n`;
  const rows = text.split("\n");
  const row = value === undefined ? [] : [`${name}: ${write(value)}`];
  if (name in lines) rows.splice(lines[name], 1, ...row);
  else if (row.length) rows.splice(rows.at(-1) === "" ? rows.length - 1 : rows.length, 0, ...row);
  return rows.join("\n");
}
