// Plain SVG charts over time. Each is a picture with its sums in words, and has its numbers in a table beneath.

import { h } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 160, LEFT = 58, BOTTOM = 20, TOP = 8;
let width = 640;    // as wide as it is shown, so that its words are as large as all others

export function drawWithin(element) {
  width = Math.max(200, Math.min(1000, element.clientWidth - 36));
}

function s(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function tableOf(caption, head, rows) {
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, h("table", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, head.map((one) => h("th", { scope: "col" }, one)))),
    h("tbody", {}, rows.map(([first, ...rest]) =>
      h("tr", {}, h("th", { scope: "row" }, first), rest.map((one) => h("td", {}, one)))))));
}

// series: [{ name, values, colour }], a value for each label, null where there is none. show: a value in words. top: of
// the scale of lines, the greatest value unless given.
export function figure({ title, kind, labels, series, show, words, top, first = "UTC" }) {
  const drawn = kind === "bars" ? bars(labels, series, show) : lines(labels, series, show, top);
  drawn.setAttribute("role", "img");
  drawn.setAttribute("aria-label", `${title}. ${words}`);
  const rows = labels.map((label, i) => [label, ...series.map(({ values }) => shown(values[i], show))]);
  return h("figure", {},
    h("figcaption", {}, title),
    h("ul", { class: "legend" }, series.map(({ name, colour }) =>
      h("li", {}, s("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" },
        s("rect", { width: 10, height: 10, class: `c${colour}` })), name))),
    drawn,
    h("details", {}, h("summary", {}, "The numbers"), tableOf(title, [first, ...series.map(({ name }) => name)], rows)));
}

const shown = (value, show) => (value === null || value === undefined ? "–" : show(value));

function frame(top, labels, show) {
  const svg = s("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}` });
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP);
    svg.append(s("line", { class: "grid", x1: LEFT, x2: width, y1: y, y2: y }));
    const text = s("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" });
    text.textContent = show(top * share);
    svg.append(text);
  }
  [[0, "start", LEFT], [labels.length - 1, "end", width]].forEach(([i, anchor, x]) => {
    const text = s("text", { x, y: HEIGHT - 4, "text-anchor": anchor });
    text.textContent = labels[i] ?? "";
    svg.append(text);
  });
  return svg;
}

const height = (value, top) => (top ? value / top : 0) * (HEIGHT - BOTTOM - TOP);

function bars(labels, series, show) {
  const sums = labels.map((_, i) => series.reduce((sum, { values }) => sum + (values[i] ?? 0), 0));
  const top = 2 * Math.ceil(Math.max(1, ...sums) / 2), step = (width - LEFT) / Math.max(1, labels.length);
  const svg = frame(top, labels, show);
  labels.forEach((label, i) => {
    let y = HEIGHT - BOTTOM;
    for (const { name, values, colour } of series) {
      const size = height(values[i] ?? 0, top);
      if (!size) continue;
      y -= size;
      const told = s("title", {});
      told.textContent = `${label}: ${show(values[i])} ${name}`;
      svg.append(s("rect", { class: `c${colour}`, x: LEFT + i * step + step * 0.1, y, width: step * 0.8, height: size }, told));
    }
  });
  return svg;
}

function lines(labels, series, show, top = Math.max(...series.flatMap(({ values }) => values.map((one) => one ?? 0))) || 1) {
  const svg = frame(top, labels, show), step = (width - LEFT) / Math.max(1, labels.length);
  for (const { values, colour } of series) {
    let run = [];
    const end = () => {
      if (run.length > 1) svg.append(s("polyline", { class: `c${colour}`, points: run.map((at) => at.join(",")).join(" ") }));
      else if (run.length) svg.append(s("rect", { class: `c${colour}`, x: run[0][0] - 2, y: run[0][1] - 2, width: 4, height: 4 }));
      run = [];
    };
    values.forEach((value, i) => {                        // a gap where nothing was measured
      if (value === null) end();
      else run.push([LEFT + (i + 0.5) * step, HEIGHT - BOTTOM - height(value, top)]);
    });
    end();
  }
  return svg;
}
