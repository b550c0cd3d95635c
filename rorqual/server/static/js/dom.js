// Building the page's elements. Text is only ever set as text: there is no way here to pass markup.

export const $ = (id) => document.getElementById(id);

// h("button", { class: "x", on: { click } }, "text", child, ...): props are attributes, except `on` and `class`.
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

// One of the drawings at the end of index.html.
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg"), use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

// A button that shows a drawing only; the label is its name.
export function iconButton(name, label, click, more = {}) {
  return h("button", { type: "button", class: "quiet", "aria-label": label, title: label, on: { click }, ...more },
    icon(name));
}

export function say(text) {
  $("status").textContent = text;
}

let hiding = 0;

// A short notice, with an action that takes it back where there is one.
export function toast(text, action, label = "Undo") {
  const box = $("toast");
  clearTimeout(hiding);
  box.replaceChildren(h("span", {}, text));
  if (action) {
    box.append(h("button", { type: "button", on: { click: () => { box.hidden = true; action(); } } }, label));
  }
  box.hidden = false;
  hiding = setTimeout(() => { box.hidden = true; }, action ? 9000 : 4000);
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                               // not a secure context: the old way
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    (button.closest("dialog") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  say("Copied.");
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

export function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
