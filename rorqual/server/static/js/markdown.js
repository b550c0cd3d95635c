// A small Markdown, drawn as elements. The text comes from a model and is not trusted: every piece of it becomes a text
// node, links keep only http, https and mailto, pictures are never loaded, and HTML stays the text it is.

import { copy, h, icon } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)+\|?\s*$/;
const DEEPEST = 4;
const REACH = 1500;      // how far an opening mark looks for its end, so that no text takes long

// ---- blocks -----------------------------------------------------------------------------------

// Blocks of `text` from place `from` on: { start, end, kind, ... }.
export function blocksOf(text, from = 0) {
  const out = [], lines = [];
  for (let at = from; at < text.length;) {
    let end = text.indexOf("\n", at);
    if (end < 0) end = text.length;
    lines.push({ text: text.slice(at, end), start: at, end });
    at = end + 1;
  }
  for (let i = 0; i < lines.length;) {
    if (!lines[i].text.trim()) {
      i += 1;
      continue;
    }
    const [block, next] = readBlock(lines, i);
    out.push({ ...block, start: lines[i].start, end: lines[next - 1].end });
    i = next;
  }
  return out;
}

function readBlock(lines, i) {
  const line = lines[i].text;
  const until = (from, goesOn) => {
    let end = from;
    while (end < lines.length && goesOn(lines[end].text)) end += 1;
    return end;
  };
  const texts = (from, to) => lines.slice(from, to).map((one) => one.text);
  const fence = FENCE.exec(line);
  if (fence) {
    const close = (text) => text.trim().startsWith(fence[1]) && !text.trim().replaceAll(fence[1][0], "");
    const end = until(i + 1, (text) => !close(text));
    return [{ kind: "code", language: fence[2], text: texts(i + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, i + 1];
  if (/^ {0,3}>/.test(line)) {
    const end = until(i, (text) => /^ {0,3}>/.test(text));
    return [{ kind: "quote", text: texts(i, end).map((one) => one.replace(/^ {0,3}> ?/, "")).join("\n") }, end];
  }
  if (line.includes("|") && TABLE_RULE.test(lines[i + 1]?.text ?? "")) {
    const end = until(i + 2, (text) => text.includes("|"));
    return [{ kind: "table", head: cells(line), rows: texts(i + 2, end).map(cells) }, end];
  }
  if (ITEM.test(line)) return readList(lines, i);
  const end = until(i + 1, (text) => text.trim() && !opens(text));
  return [{ kind: "text", text: texts(i, end).join("\n") }, end];
}

const opens = (text) => FENCE.test(text) || HEADING.test(text) || RULE.test(text) || /^ {0,3}>/.test(text) ||
  /^ {0,3}([-*+]|1[.)])\s+\S/.test(text);

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function readList(lines, i) {
  const [, indent, mark] = ITEM.exec(lines[i].text);
  const isOrdered = /\d/.test(mark), items = [];
  let end = i;
  while (end < lines.length) {
    const text = lines[end].text, item = ITEM.exec(text);
    if (item && item[1].length <= indent.length + 1 && /\d/.test(item[2]) === isOrdered && !RULE.test(text)) {
      items.push([text.slice(item[0].length)]);
    } else if (/^\s+\S/.test(text)) {
      items.at(-1).push(text.replace(/^( {1,4}|\t)/, ""));
    } else if (!text.trim() && end + 1 < lines.length && (ITEM.test(lines[end + 1].text) ||
        /^\s+\S/.test(lines[end + 1].text))) {
      items.at(-1).push("");
    } else if (!text.trim() || opens(text) || item) {
      break;
    } else {
      items.at(-1).push(text);
    }
    end += 1;
  }
  const first = isOrdered ? parseInt(mark, 10) : 1;
  return [{ kind: "list", isOrdered, first, items: items.map((one) => one.join("\n")) }, end];
}

// ---- elements ---------------------------------------------------------------------------------

function draw(block, depth = 0) {
  switch (block.kind) {
    case "code": return drawCode(block);
    case "rule": return h("hr");
    case "heading": return h(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "quote": return h("blockquote", {}, ...nested(block.text, depth));
    case "table": return drawTable(block);
    case "list": return h(block.isOrdered ? "ol" : "ul", block.isOrdered && block.first !== 1 ? { start: block.first } : {},
      block.items.map((item) => h("li", {}, ...nested(item, depth))));
    default: return h("p", {}, ...inline(block.text));
  }
}

function nested(text, depth) {
  if (depth >= DEEPEST) return inline(text);
  const blocks = blocksOf(text);
  return blocks.length === 1 && blocks[0].kind === "text" ? inline(blocks[0].text)
    : blocks.map((block) => draw(block, depth + 1));
}

function drawCode({ language, text }) {
  const button = h("button", { type: "button", class: "quiet", "aria-label": "Copy the code", title: "Copy" }, icon("copy"));
  const code = h("code", {}, text);
  button.addEventListener("click", () => copy(code.textContent, button));
  return h("figure", { class: "code" }, h("figcaption", {}, h("span", {}, language || "text"), button),
    h("pre", { tabindex: "0" }, code));
}

function drawTable({ head, rows }) {
  const line = (tag, texts) => h("tr", {}, head.map((_, i) => h(tag, {}, ...inline(texts[i] ?? ""))));
  return h("div", { class: "table", tabindex: "0" },
    h("table", {}, h("thead", {}, line("th", head)), h("tbody", {}, rows.map((row) => line("td", row)))));
}

// ---- inside a line ----------------------------------------------------------------------------

const MARKS = /[`*_[~\\!]|https?:\/\//g;

function inline(text, depth = 0) {
  const out = [];
  let at = 0;                                            // text before is drawn
  const push = (node, from, to) => {
    if (from > at) out.push(text.slice(at, from));
    if (node !== null) out.push(node);
    at = to;
  };
  const marks = new RegExp(MARKS);                       // of its own: calls nest
  for (let found; (found = marks.exec(text));) {
    const i = found.index;
    if (i < at) continue;
    const [node, end] = readMark(text, i, found[0], depth) ?? [];
    if (end === undefined) continue;
    push(node, i, end);
    marks.lastIndex = end;
  }
  if (at < text.length) out.push(text.slice(at));
  return out;
}

function readMark(text, i, mark, depth) {
  if (mark === "\\") return /[\\`*_[\]~!#>|-]/.test(text[i + 1] ?? "") ? [text[i + 1], i + 2] : null;
  if (mark === "`") return readCode(text, i);
  if (mark === "[" || mark === "!") return readLink(text, mark === "!" ? i + 1 : i, i, depth);
  if (mark.startsWith("http")) return readAddress(text, i);
  return readEmphasis(text, i, mark, depth);
}

function readCode(text, i) {
  const ticks = /^`+/.exec(text.slice(i, i + 8))[0];
  const end = text.slice(i, i + REACH).indexOf(ticks, ticks.length);
  return end < 0 ? null : [h("code", {}, text.slice(i + ticks.length, i + end).replace(/^ (.*) $/s, "$1")), i + end + ticks.length];
}

function readLink(text, open, start, depth) {
  if (text[open] !== "[" || depth >= DEEPEST) return null;
  const found = /^\[([^\]\n]{0,400})\]\(\s*<?([^()\s<>]{0,2000})>?(?:\s+"[^"\n]{0,200}")?\s*\)/.exec(text.slice(open, open + 2700));
  if (!found) return null;
  const end = open + found[0].length, label = inline(found[1], depth + 1);
  return [link(found[2], label.length ? label : [found[2]]) ?? text.slice(start, end), end];
}

function readAddress(text, i) {
  const address = /^https?:\/\/[^\s<>"'`)\]}]+/.exec(text.slice(i, i + 2000))?.[0].replace(/[.,;:!?]+$/, "");
  const node = address && link(address, [address]);
  return node ? [node, i + address.length] : null;
}

function readEmphasis(text, i, mark, depth) {
  if (depth >= DEEPEST) return null;
  const run = text[i + 1] === mark ? mark + mark : mark;
  if (run === "~") return null;
  const before = text[i - 1] ?? " ", after = text[i + run.length] ?? " ";
  if (/\s/.test(after) || (mark === "_" && /\w/.test(before))) return null;
  const part = text.slice(i, i + REACH);
  for (let end = part.indexOf(run, run.length + 1); end >= 0; end = part.indexOf(run, end + 1)) {
    if (/\s/.test(part[end - 1]) || (run.length === 1 && (part[end + 1] === mark || part[end - 1] === mark))) continue;
    if (mark === "_" && /\w/.test(part[end + run.length] ?? " ")) continue;
    const tag = mark === "~" ? "del" : run.length === 2 ? "strong" : "em";
    return [h(tag, {}, ...inline(part.slice(run.length, end), depth + 1)), i + end + run.length];
  }
  return null;
}

// A link, if the address is one of those that cannot run anything here.
function link(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, ...children);
}

// ---- text that grows --------------------------------------------------------------------------

// Long lists and code are changed where they grew; false where the block has to be drawn anew.
function regrow(node, old, block) {
  if (old?.kind !== block.kind) return false;
  if (block.kind === "code" && old.language === block.language && block.text.startsWith(old.text) && old.text) {
    node.querySelector("code").firstChild.appendData(block.text.slice(old.text.length));
    return true;
  }
  if (block.kind !== "list" || old.isOrdered !== block.isOrdered || old.first !== block.first) return false;
  block.items.forEach((item, i) => {
    if (item === old.items[i]) return;
    const fresh = h("li", {}, ...nested(item, 0));
    i < old.items.length ? node.children[i].replaceWith(fresh) : node.append(fresh);
  });
  while (node.childElementCount > block.items.length) node.lastElementChild.remove();
  return true;
}

// Draws a text into `box`, and again as it grows, touching only the last blocks.
export class Drawn {
  #text = "";
  #blocks = [];

  constructor(box) {
    this.box = box;
  }

  update(text) {
    if (text === this.#text) return;
    if (!text.startsWith(this.#text)) this.#blocks = [];
    const kept = Math.max(0, this.#blocks.length - 2);     // the two last may still change their shape
    const from = kept ? this.#blocks[kept - 1].end : 0;
    const fresh = blocksOf(text, from);
    const old = this.#blocks.slice(kept);
    this.#blocks.length = kept;
    while (this.box.childElementCount > kept + old.length) this.box.lastElementChild.remove();
    fresh.forEach((block, i) => {
      const source = text.slice(block.start, block.end), place = this.box.children[kept + i];
      this.#blocks.push({ ...block, source });
      if (!place) this.box.append(draw(block));
      else if (old[i]?.source !== source && !regrow(place, old[i], block)) place.replaceWith(draw(block));
    });
    while (this.box.childElementCount > kept + fresh.length) this.box.lastElementChild.remove();
    this.#text = text;
  }
}
