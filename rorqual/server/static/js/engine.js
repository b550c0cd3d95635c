// The engine view: what the server is doing now, asked for again and again while the panel is open.

import { json } from "./api.js";
import { $, h } from "./dom.js";
import { bytes, count, percent, rate, seconds } from "./figures.js";
import { HeatMap } from "./heatmap.js";

const BUSY_MS = 400, IDLE_MS = 1500;
const PHASES = { waiting: "waits", restoring: "restores windows", reading: "reads", answering: "answers" };
const KINDS = { window: "Windows", entries: "Entries", index_keys: "Index keys", pending: "Open blocks", engram: "Engram",
  snapshots: "Snapshots", checkpoints: "Checkpoints" };
const LAYERS = { sliding: "window", csa: "CSA", hca: "HCA" };

export class EngineView {
  #timer = 0;
  #isOpen = false;
  #last = null;       // the moment before, for rates

  constructor(settings, session) {
    this.settings = settings;
    this.session = session;
    this.heatMap = new HeatMap($("heat"));
    document.addEventListener("visibilitychange", () => this.#again(0));
    session.addEventListener("busy", () => this.#again(0));
  }

  open(isOpen) {
    this.#isOpen = isOpen;
    this.#again(0);
  }

  #again(after) {
    clearTimeout(this.#timer);
    if (this.#isOpen && !document.hidden) this.#timer = setTimeout(() => this.#ask(), after);
  }

  async #ask() {
    let isBusy = this.session.isBusy;
    try {
      const { time, models } = await json("/engine/view");
      const view = models[this.settings.get("model")] ?? Object.values(models)[0];
      isBusy ||= view.running + view.waiting > 0;
      this.#draw(view, time);
      $("engine-trouble").hidden = true;
    } catch (error) {
      $("engine-trouble").textContent = error.message;
      $("engine-trouble").hidden = false;
    }
    this.#again(isBusy ? BUSY_MS : IDLE_MS);
  }

  #draw(view, time) {
    const before = this.#last;
    this.#last = { time, sampled: view.sampled_tokens };
    const now = before && time > before.time ? (view.sampled_tokens - before.sampled) / (time - before.time) : 0;
    tiles("now", [
      [`${view.running} / ${view.max_running}`, "running"],
      [count(view.waiting), "waiting"],
      [now >= 0.5 ? rate(now) : "0", "tokens/s now"],
      [view.tokens_per_step ? view.tokens_per_step.toPrecision(3) : "–", "tokens a step"],
    ]);
    $("requests").replaceChildren(...view.requests.map(drawRequest));
    $("no-requests").hidden = view.requests.length > 0;
    drawSteps($("steps"), view.steps);
    drawMemory(view);
    drawCache(view.cache);
    $("drafts").hidden = !view.drafted_tokens;
    if (view.drafted_tokens) {
      tiles("draft-figures", [
        [percent(view.accepted_tokens, view.drafted_tokens), "drafts right"],
        [view.accepted_length.toPrecision(3), "tokens a check"],
        [count(view.drafted_tokens), "drafted"],
      ]);
    }
    $("layer-map").replaceChildren(...view.layers.map(({ layer, kind, entry_tokens: size }) => h("span",
      { class: `layer ${kind}`, title: `Layer ${layer}: ${LAYERS[kind]}${size ? `, an entry for ${size} tokens` : ""}` },
      LAYERS[kind])));
  }

  // Fetch and show what was picked for an answer, by its id.
  async picks(request) {
    const box = $("heat-box"), note = $("heat-note");
    box.setAttribute("aria-busy", "true");
    note.hidden = false;
    note.textContent = request ? "Reading the answer again…" : "Ask something first: the map is of an answer.";
    $("heat").hidden = true;
    box.scrollIntoView({ block: "nearest" });
    if (request) {
      try {
        const data = await json(`/engine/picks?request=${encodeURIComponent(request)}`);
        note.hidden = true;
        $("heat").hidden = false;
        this.heatMap.show(data);
        box.scrollIntoView({ block: "start" });
      } catch (error) {
        note.textContent = error.message;
      }
    }
    box.setAttribute("aria-busy", "false");
  }
}

function tiles(id, pairs) {
  const box = $(id);
  if (box.childElementCount !== pairs.length) {
    box.replaceChildren(...pairs.map(() => h("div", {}, h("dt"), h("dd"))));
  }
  pairs.forEach(([value, name], i) => {
    box.children[i].firstChild.textContent = name;
    box.children[i].lastChild.textContent = value;
  });
}

function drawRequest(one) {
  const isReading = one.phase === "reading" || one.phase === "restoring";
  const [done, all] = isReading ? [one.read_tokens, one.prompt_tokens] : [one.output_tokens, one.max_tokens];
  const detail = one.phase === "waiting" ? `${count(one.prompt_tokens)} tokens to read`
    : isReading ? `${count(done)} of ${count(all)} tokens` : `${count(done)} tokens written`;
  return h("li", { class: one.phase },
    h("span", { class: "phase" }, PHASES[one.phase]),
    h("span", {}, detail),
    h("span", { class: "age" }, seconds(one.age_s)),
    isReading && h("progress", { max: all, value: done, "aria-label": "Prompt read" }),
    h("small", {}, `#${one.number} · prompt ${count(one.prompt_tokens)}, ${percent(one.cached_tokens, one.prompt_tokens)} cached` +
      (one.priority ? ` · priority ${one.priority}` : "")));
}

function drawMemory({ state_bytes: held, cache }) {
  bars("state", held, "Nothing is held: no request runs.");
  $("kept").hidden = !cache;
  if (!cache) return;
  bars("kept-bars", cache.bytes, "Nothing is kept yet.");
  $("kept-note").textContent = `${count(cache.pages)} pages of ${cache.page_tokens} tokens · ${bytes(cache.memory_bytes)} of ` +
    `${bytes(cache.max_memory_bytes)}` + (cache.disk_bytes ? ` · ${bytes(cache.disk_bytes)} on disk` : "") +
    (cache.evicted_pages ? ` · ${count(cache.evicted_pages)} pages evicted` : "");
}

// One bar cut by kind, and a line for each.
function bars(id, parts, nothing) {
  const kinds = Object.entries(parts).filter(([name, n]) => name !== "total" && n > 0);
  const total = kinds.reduce((sum, [, n]) => sum + n, 0), box = $(id);
  if (!total) {
    box.replaceChildren(h("p", { class: "hint" }, nothing));
    return;
  }
  const whole = h("div", { class: "bar", role: "presentation" });
  for (const [name, n] of kinds) {
    const part = h("i", { class: `kind ${name}` });
    part.style.flexGrow = String(n);
    whole.append(part);
  }
  box.replaceChildren(whole, h("dl", { class: "legend" }, kinds.map(([name, n]) => h("div", {},
    h("dt", {}, h("i", { class: `kind ${name}` }), KINDS[name] ?? name), h("dd", {}, bytes(n))))));
}

function drawCache(cache) {
  $("cache").hidden = !cache;
  if (!cache) return;
  tiles("cache-figures", [
    [percent(cache.cached_tokens, cache.prompt_tokens), "of tokens from cache"],
    [`${count(cache.hits)} / ${count(cache.requests)}`, "requests with a hit"],
    [count(cache.replayed_tokens), "tokens run again"],
  ]);
  const reasons = Object.entries(cache.reasons).sort((a, b) => b[1] - a[1]), most = reasons[0]?.[1] ?? 1;
  $("reasons").replaceChildren(...reasons.map(([reason, n]) => {
    const row = h("div", {}, h("dt", {}, reason), h("dd", {}, count(n)));
    row.style.setProperty("--part", `${(100 * n) / most}%`);
    return row;
  }));
}

// The last steps: height is time, colour says what was in them.
function drawSteps(canvas, steps) {
  $("steps-box").hidden = !steps.length;
  const width = canvas.parentElement.clientWidth, height = 56, scale = devicePixelRatio;
  if (!steps.length || !width) return;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d"), style = getComputedStyle(canvas);
  const color = (name) => style.getPropertyValue(name).trim();
  context.scale(scale, scale);
  const times = steps.map((one) => one.ms).sort((a, b) => a - b), top = Math.max(times[Math.floor(times.length * .97)], .1);
  const w = width / Math.max(steps.length, 40);
  steps.forEach((one, i) => {
    const high = Math.max(2, Math.min(1, one.ms / top) * height);
    context.fillStyle = color(one.prompt ? "--heat" : "--accent");
    context.fillRect(width - (steps.length - i) * w, height - high, Math.max(1, w - 1), high);
  });
  const median = times[times.length >> 1];
  $("steps-note").textContent = `Last ${steps.length} steps: ${median.toPrecision(2)} ms typically, ` +
    `${times.at(-1).toPrecision(2)} ms at most.`;
}
