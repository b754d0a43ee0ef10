// Elements, lists that keep their elements, and messages to the user.

/** Make an element: properties that start with "on" are listeners, `class` and `data` are what they say. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  setProperties(element, properties);
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** The same for SVG. */
export function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function setProperties(element, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria") && name !== "list" && name !== "form") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
}

/** Set an element's text, touching it only when it changes. */
export function setText(element, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Make a container's children those of `items`, keeping the element (and so the focus) of each key. */
export function reconcile(container, items, keyOf, create, update) {
  const known = (container.kept ??= new Map());
  const wanted = new Set(items.map(keyOf));
  for (const [key, entry] of known) {
    if (!wanted.has(key)) {
      entry.remove();
      known.delete(key);
    }
  }
  let place = container.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let element = known.get(key);
    if (!element) {
      element = create(item);
      known.set(key, element);
    }
    if (element === place) place = place.nextElementSibling;
    else container.insertBefore(element, place);
    update?.(element, item);
  }
}

/** Tell users of screen readers something that others see. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** A message that goes away by itself; it is announced too. */
export function toast(text, tone = "") {
  const box = h("div", { class: "toast", data: { tone } }, text);
  document.getElementById("toasts").append(box);
  announce(text);
  setTimeout(() => box.remove(), tone === "bad" ? 12000 : 5000);
}

/** Call a function every so often while the page is seen, until it is stopped; never twice at once. */
export function every(milliseconds, work) {
  let timer = 0;
  let stopped = false;
  const turn = async () => {
    if (!document.hidden) await work().catch(() => undefined);
    if (!stopped) timer = setTimeout(turn, milliseconds);
  };
  turn();
  return () => {
    stopped = true;
    clearTimeout(timer);
  };
}
