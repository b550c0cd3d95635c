// The dashboard: the referee's verdicts over time and the results of evals, asked for when the page opens or a choice
// changes, and once a minute while it is looked at.

import { apiKey, json } from "./api.js";
import { drawWithin, figure, tableOf } from "./charts.js";
import { $, h, say } from "./dom.js";
import { count } from "./figures.js";

const AGAIN_MS = 60_000;
const SPANS = { hour: [[24, "1 day"], [48, "2 days"], [168, "7 days"]], day: [[30, "30 days"], [90, "90 days"], [365, "a year"]] };
const USUAL = { hour: 48, day: 30 };
const WORDS = ["pass", "repaired", "flagged", "blocked", "abstained", "rejected"];

const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`);
const ms = (value) => (value === null ? "–" : value === 0 ? "0" : value < 1000 ? `${value.toPrecision(3)} ms` : `${(value / 1000).toPrecision(3)} s`);
const plain = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toLocaleString("en"));
const few = (value) => (value >= 10_000 ? `${Math.round(value / 1000)}k` : plain(value));

function moment(seconds, by) {
  const text = new Date(seconds * 1000).toISOString();
  return by === "day" ? text.slice(0, 10) : `${text.slice(5, 10)} ${text.slice(11, 16)}`;
}

function offerSpans() {
  const by = $("by").value;
  $("last").replaceChildren(...SPANS[by].map(([value, words]) =>
    h("option", { value: String(value), selected: value === USUAL[by] }, words)));
}

function trouble(id, error) {
  $(id).hidden = !error;
  $(id).textContent = error?.message ?? "";
  if (error?.status === 401) $("ask-key").hidden = false;
}

async function showVerdicts() {
  const by = $("by").value;
  try {
    drawVerdicts(await json(`/v1/referee/stats?by=${by}&last=${$("last").value}`));
    trouble("verdicts-trouble", null);
  } catch (error) {
    last = null;
    for (const id of ["totals", "charts", "reasons"]) $(id).replaceChildren();
    trouble("verdicts-trouble", error);
  }
}

let last = null;    // what was drawn, to be drawn again at another width

function drawVerdicts(told) {
  last = told;
  const { by, buckets, total } = told;
  drawWithin($("charts"));
  const labels = buckets.map(({ time }) => moment(time, by));
  const tiles = [
    [count(total.judged), "answers judged"], [percent(total.judged ? (total.verdicts.pass ?? 0) / total.judged : null), "passed"],
    [percent(total.repair_rate), "of faulty ones repaired"], [count(total.rounds), "further rounds"],
    [count(total.failures), "without a verdict"], [ms(total.latency_ms.p50), "time, p50"], [ms(total.latency_ms.p95), "time, p95"],
    [count(total.tokens.referee), "tokens of the referee"],
  ];
  $("totals").replaceChildren(...tiles.map(([value, name]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  const of = (pick) => buckets.map(pick);
  const names = WORDS.filter((word) => total.verdicts[word]);
  const verdicts = names.map((name) => ({ name, colour: WORDS.indexOf(name), values: of((one) => one.verdicts[name] ?? 0) }));
  if (total.failures) verdicts.push({ name: "no verdict", colour: 6, values: of((one) => one.failures) });
  const words = names.map((name) => `${count(total.verdicts[name])} ${name}`).join(", ") || "None yet.";
  $("charts").replaceChildren(
    figure({ title: "Verdicts", kind: "bars", labels, series: verdicts, show: few, words }),
    figure({ title: "Faulty answers that were repaired", kind: "lines", labels, show: percent, top: 1, words: percent(total.repair_rate),
      series: [{ name: "share repaired", colour: 1, values: of((one) => one.repair_rate) }] }),
    figure({ title: "Tokens", kind: "bars", labels, show: few,
      words: `${count(total.tokens.prompt)} read, ${count(total.tokens.completion)} written, of these ${count(total.tokens.referee)} for the referee`,
      series: [{ name: "read", colour: 4, values: of((one) => one.tokens.prompt) },
        { name: "written", colour: 0, values: of((one) => one.tokens.completion) }] }),
    figure({ title: "Time of a request", kind: "lines", labels, show: ms,
      words: `Half took at most ${ms(total.latency_ms.p50)}, 95 % at most ${ms(total.latency_ms.p95)}`,
      series: [{ name: "p50", colour: 0, values: of((one) => one.latency_ms.p50) },
        { name: "p95", colour: 2, values: of((one) => one.latency_ms.p95) }] }));
  const reasons = Object.entries(total.reasons);
  $("reasons").replaceChildren(reasons.length
    ? tableOf("Reasons", ["code", "answers", "share"], reasons.map(([code, n]) => [code, count(n), percent(n / total.judged)]))
    : h("p", { class: "hint" }, "No reasons in this time: nothing was found wrong."));
}

async function showEvals() {
  try {
    drawEvals(await json("/v1/evals"));
    trouble("evals-trouble", null);
  } catch (error) {
    $("evals").replaceChildren();
    trouble("evals-trouble", error);
  }
}

function drawEvals({ runs, unreadable, left_out: leftOut }) {
  const groups = new Map();                               // runs of one suite and model, which may be compared
  for (const run of runs) {
    const key = `${run.suite} · ${run.model}`;
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  drawWithin($("evals"));
  const parts = [...groups].map(([title, all]) => h("div", {}, h("h3", {}, title), overRuns(title, all),
    all[0].suite === "trial" ? trials(title, all) : suiteTable(title, all)));
  if (!runs.length) parts.push(h("p", { class: "hint" }, "No results in this folder yet."));
  for (const { name, why } of unreadable) parts.push(h("p", { class: "warning" }, `${name}/result.json cannot be shown: ${why}`));
  if (leftOut) parts.push(h("p", { class: "hint" }, `${count(leftOut)} older results are not shown.`));
  $("evals").replaceChildren(...parts);
}

const day = (run) => moment(run.time, "day");
const sizeOf = (run) => `${count(run.n)}${run.valid ? "" : " (not valid)"}`;

const MOST_LINES = 4;

// The first shares among the headline figures from run to run; null with fewer than two runs.
function overRuns(title, runs) {
  const isShare = (metric) => runs.every(({ headline }) => headline[metric] === null || (headline[metric] >= 0 && headline[metric] <= 1))
    && runs.some(({ headline }) => headline[metric] > 0);
  const metrics = Object.keys(runs[0].headline).filter(isShare).slice(0, MOST_LINES);
  if (runs.length < 2 || !metrics.length) return null;
  const inOrder = runs.toReversed();
  return figure({ title: `${title}, from run to run`, kind: "lines", labels: inOrder.map(day), show: plain, top: 1, first: "run of",
    words: metrics.map((metric) => `${metric} now ${plain(runs[0].headline[metric])}`).join(", "),
    series: metrics.map((name, colour) => ({ name, colour, values: inOrder.map(({ headline }) => headline[name] ?? null) })) });
}

function suiteTable(title, runs) {
  const metrics = [...new Set(runs.flatMap((run) => Object.keys(run.headline)))];
  const cell = (run, metric) => {
    const bounds = run.intervals[metric];
    return bounds ? `${plain(run.headline[metric])} (${plain(bounds[0])}–${plain(bounds[1])})` : plain(run.headline[metric]);
  };
  return tableOf(`${title}, newest first; 95 % intervals in brackets`, ["run", "day", "items", ...metrics],
    runs.map((run) => [run.name, day(run), sizeOf(run), ...metrics.map((metric) => cell(run, metric))]));
}

function trials(title, runs) {
  const pair = (run, name, show) => `${show(run.trial.before[name])} → ${show(run.trial.after[name])}`;
  return tableOf(`${title}, before → after the referee, newest first`,
    ["run", "day", "questions", "wrong", "time, p50", "cost", "RET", "OI"],
    runs.map((run) => [run.name, day(run), sizeOf(run), pair(run, "wrong", percent), pair(run, "p50_ms", ms),
      pair(run, "cost", plain), percent(run.headline.RET), plain(run.headline.OI)]));
}

async function showAll() {
  await Promise.all([showVerdicts(), showEvals()]);
  document.documentElement.dataset.ready = "";
}

$("by").addEventListener("change", async () => {
  offerSpans();
  await showVerdicts();
  say(`Verdicts by ${$("by").value}.`);
});
$("last").addEventListener("change", showVerdicts);
$("ask-key").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set($("key").value.trim(), false);
  $("ask-key").hidden = true;
  showAll();
});
addEventListener("resize", () => { if (last) drawVerdicts(last); });
setInterval(() => { if (!document.hidden) showAll(); }, AGAIN_MS);
offerSpans();
showAll();
