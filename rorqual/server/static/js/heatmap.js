// The heat map of what the indexer picked: rows are tokens of the answer, columns blocks of what could be read. Below it
// the text itself, tinted alike. A pointer, a finger or the arrow keys choose a cell.

import { $, h } from "./dom.js";
import { count } from "./figures.js";

const shown = (text) => text.replace(/<｜([^｜<>]*)｜>/g, (_, name) => `⟨${name.replaceAll("▁", " ")}⟩`);   // control tokens
const TALLEST = 320, ROW_LEAST = 3, ROW_MOST = 12;

export class HeatMap {
  #data = null;
  #layer = 0;           // place in data.layers
  #isDense = false;     // what attention over all entries would weigh, instead of what was picked
  #row = -1;            // -1: all rows together
  #block = -1;

  constructor(box) {
    this.layers = h("div", { class: "segments", role: "radiogroup", "aria-label": "Layer" });
    this.kinds = h("div", { class: "segments", role: "radiogroup", "aria-label": "What is shown" },
      ...["Picked", "Dense attention"].map((name, i) => h("button", { type: "button", role: "radio",
        on: { click: () => { this.#isDense = i === 1; this.draw(); } } }, name)));
    this.canvas = h("canvas", { tabindex: "0", role: "img", "aria-describedby": "cell" });
    this.axis = h("p", { class: "axis" }, h("span", {}, "↓ answer, → what it could look up"), h("span", {}, "newest"));
    this.cell = h("p", { id: "cell", class: "cell", "aria-live": "polite" });
    this.note = h("p", { class: "hint" });
    this.text = h("div", { class: "context", tabindex: "0", role: "group", "aria-label": "The context, tinted" });
    box.append(this.note, this.layers, this.kinds, h("div", { class: "map" }, this.canvas, this.axis), this.cell, this.text);
    this.layers.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const number = this.#data.layers.length;
      this.#layer = (this.#layer + step + number) % number;
      this.draw();
      this.layers.children[this.#layer].focus();
    });
    this.kinds.addEventListener("keydown", (event) => {
      if (!event.key.startsWith("Arrow")) return;
      event.preventDefault();
      this.#isDense = !this.#isDense;
      this.draw();
      this.kinds.children[Number(this.#isDense)].focus();
    });
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#choose(-1, -1));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.text.addEventListener("pointerover", (event) => {
      if (event.target.dataset.block) this.#choose(this.#row, Number(event.target.dataset.block));
    });
    new ResizeObserver(() => this.#paint()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    document.addEventListener("themechange", () => this.draw());
  }

  show(data) {
    this.#data = data;
    this.#layer = Math.min(this.#layer, data.layers.length - 1);
    this.#row = this.#block = -1;
    this.layers.replaceChildren(...data.layers.map((layer, i) => h("button", { type: "button", role: "radio",
      on: { click: () => { this.#layer = i; this.draw(); } } }, `Layer ${layer.layer}`)));
    this.text.replaceChildren(...data.blocks.map(({ text }, i) => h("span", { "data-block": String(i) }, shown(text))));
    this.draw();
  }

  get #cells() {
    const layer = this.#data.layers[this.#layer];
    return this.#isDense ? layer.mass : layer.share;
  }

  // How bright a cell is: a share as it is, a mass beside the row's largest.
  get #shades() {
    if (!this.#isDense) return this.#cells;
    return this.#cells.map((row) => {
      const most = Math.max(...row, 1e-9);
      return row.map((one) => one === null ? null : one / most);
    });
  }

  draw() {
    if (!this.#data) return;
    const { layers, prompt_tokens: prompt, output_tokens: output, top_k: most, window: near } = this.#data;
    const layer = layers[this.#layer];
    [...this.layers.children].forEach((one, i) => {
      one.setAttribute("aria-checked", String(i === this.#layer));
      one.tabIndex = i === this.#layer ? 0 : -1;
    });
    const what = `For each of ${count(output)} tokens of the answer, the indexer of layer ${layer.layer} picks up to ${most} ` +
      `entries of ${layer.entry_tokens} tokens out of ${count(prompt + output)}; the last ${near} are read in full besides.`;
    [...this.kinds.children].forEach((one, i) => {
      const isOn = this.#isDense === (i === 1);
      one.setAttribute("aria-checked", String(isOn));
      one.tabIndex = isOn ? 0 : -1;
    });
    this.note.textContent = layer.has_choice ? what
      : `${what} Here there were no more than ${most}, so it took all of them: ask something longer to see it choose.`;
    this.canvas.setAttribute("aria-label", `Heat map: ${this.#data.rows.length} rows of answer, ` +
      `${this.#data.blocks.length} blocks of context. Arrow keys choose a cell.`);
    this.#paint();
    this.#describe();
  }

  #size() {
    const rows = this.#data.rows.length, width = this.canvas.parentElement.clientWidth;
    return { width, height: rows * Math.min(ROW_MOST, Math.max(ROW_LEAST, Math.floor(TALLEST / rows))) };
  }

  #paint() {
    if (!this.#data || !this.canvas.parentElement.clientWidth) return;
    const { width, height } = this.#size(), scale = devicePixelRatio, context = this.canvas.getContext("2d");
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.height = `${height}px`;
    context.scale(scale, scale);
    const style = getComputedStyle(this.canvas), color = (name) => style.getPropertyValue(name).trim();
    const { blocks, rows, prompt_tokens: prompt } = this.#data, w = width / blocks.length, high = height / rows.length;
    const dark = color("--heat-none"), bright = color("--heat");
    this.#shades.forEach((row, y) => row.forEach((share, x) => {
      if (share === null) return;
      context.globalAlpha = 1;
      context.fillStyle = dark;
      context.fillRect(x * w, y * high, w + .5, high + .5);
      if (!share) return;
      context.globalAlpha = .25 + .75 * share;
      context.fillStyle = bright;
      context.fillRect(x * w, y * high, Math.max(w - (w > 4 ? 1 : 0), 1), high - (high > 5 ? 1 : 0));
    }));
    context.globalAlpha = 1;
    context.strokeStyle = color("--accent");
    const end = (prompt / blocks.at(-1).end) * width;       // where the answer begins
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(end, 0);
    context.lineTo(end, height);
    context.stroke();
    if (this.#block >= 0 && this.#row >= 0) {
      context.setLineDash([]);
      context.strokeStyle = color("--ink");
      context.lineWidth = 1.5;
      context.strokeRect(this.#block * w - .5, this.#row * high - .5, w + 1, high + 1);
    }
    this.#tint();
  }

  #tint() {
    const cells = this.#shades;
    [...this.text.children].forEach((span, i) => {
      const column = this.#row >= 0 ? [cells[this.#row][i]] : cells.map((row) => row[i]);
      const known = column.filter((one) => one !== null);
      const share = known.length ? known.reduce((a, b) => a + b, 0) / known.length : 0;
      span.style.setProperty("--share", `${Math.round(share * 70)}%`);
      span.classList.toggle("chosen", i === this.#block);
    });
  }

  #describe() {
    const { blocks, rows } = this.#data, block = blocks[this.#block], row = rows[this.#row];
    if (!block) {
      this.cell.replaceChildren("Point at a cell to read what it stands for.");
      return;
    }
    const share = row ? this.#cells[this.#row][this.#block] : undefined;
    const weight = (value) => `${(value * 100).toFixed(value < .1 ? 1 : 0)} % of dense attention on `;
    const what = this.#isDense ? (share === null ? "not there yet: " : weight(share ?? 0)) : share === null ? "not there yet: " : share === 1 ? "picked " : share === 0 ? "left out "
      : `${Math.round(share * 100)} % picked of `;
    this.cell.replaceChildren(...(row ? ["Writing ", h("q", {}, shown(row.text)), ", ", what] : []),
      h("q", {}, shown(block.text)), h("span", { class: "place" }, ` tokens ${block.begin}–${block.end - 1}`));
  }

  #point(event) {
    if (!this.#data) return;
    const box = this.canvas.getBoundingClientRect(), { blocks, rows } = this.#data;
    const within = (part, n) => Math.max(0, Math.min(n - 1, Math.floor(part * n)));
    this.#show(within((event.clientY - box.top) / box.height, rows.length),
      within((event.clientX - box.left) / box.width, blocks.length));
  }

  #key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !this.#data) return;
    event.preventDefault();
    const { blocks, rows } = this.#data, fit = (at, n) => Math.max(0, Math.min(n - 1, at));
    this.#show(fit(Math.max(0, this.#row) + step[0], rows.length), fit(Math.max(0, this.#block) + step[1], blocks.length));
  }

  // Choose a cell of the map, and bring its text into view.
  #show(row, block) {
    this.#choose(row, block);
    const span = this.text.children[block];
    this.text.scrollTop = span.offsetTop - this.text.clientHeight / 2;
  }

  #choose(row, block) {
    if (!this.#data || (row === this.#row && block === this.#block)) return;
    this.#row = row;
    this.#block = block;
    this.#paint();
    this.#describe();
  }
}
