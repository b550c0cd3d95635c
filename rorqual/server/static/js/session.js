// One conversation being held: what was said, the answer being written, and what follows from a tool's result.
// Knows the API and the store, not the page; emits `change` (other messages), `write` (the last one grew), `busy`
// and `trouble` (an ApiError to show).

import { ApiError, call, events } from "./api.js";
import { makeId } from "./store.js";
import { offered, runOwn } from "./tools.js";

const MOST_ROUNDS = 8;     // of answers that follow each other without a person

export class Session extends EventTarget {
  constructor(store, settings) {
    super();
    this.store = store;
    this.settings = settings;
    this.conversation = null;      // null: a new one, not stored before something is said
    this.messages = [];
    this.trouble = null;
    settings.addEventListener("change", () => { if (!this.#isOpening) this.keep(); });
  }

  #abort = null;
  #rounds = 0;
  #isOpening = false;

  get isBusy() {
    return this.#abort !== null;
  }

  #emit(type) {
    this.dispatchEvent(new Event(type));
  }

  open(conversation) {
    this.stop();
    this.#abort = null;
    this.conversation = conversation;
    this.messages = conversation?.messages ?? [];
    this.trouble = null;
    for (const one of this.messages) if (one.state === "writing") one.state = "stopped";   // a reload cut it off
    this.#isOpening = true;
    if (conversation) this.settings.take(conversation.settings);
    this.#isOpening = false;
    this.#emit("change");
  }

  send(text) {
    if (this.isBusy) return;
    for (const open of this.openCalls()) this.#addResult(open.id, "No result was given.");
    this.messages.push({ role: "user", content: text });
    this.#start(text);
  }

  // Say the message at `index` differently; what followed is dropped. Returns what undoes it.
  edit(index, text) {
    return this.#rewrite(index, () => { this.messages.push({ role: "user", content: text }); });
  }

  // Write the answer at `index` (an assistant message) anew.
  regenerate(index) {
    return this.#rewrite(index, () => {});
  }

  retry() {
    const last = this.messages.at(-1);
    if (this.isBusy || !last) return;
    if (last.role === "assistant") this.messages.pop();
    this.#start();
  }

  #rewrite(index, change) {
    if (this.isBusy) return () => {};
    const before = [...this.messages], id = this.conversation.id;
    this.messages.length = index;
    change();
    this.#start();
    return () => {
      if (this.conversation?.id !== id) return;
      this.stop();
      this.messages.splice(0, this.messages.length, ...before);
      this.trouble = null;
      this.keep();
      this.#emit("change");
    };
  }

  // Calls of the last answer that have no result yet.
  openCalls() {
    const at = this.messages.findLastIndex((one) => one.role === "assistant");
    const answered = new Set(this.messages.slice(at + 1).map((one) => one.tool_call_id));
    return (this.messages[at]?.tool_calls ?? []).filter((one) => !answered.has(one.id));
  }

  giveResult(id, text) {
    if (this.isBusy || !this.openCalls().some((one) => one.id === id)) return;
    this.#addResult(id, text);
    this.#rounds = 0;
    if (this.openCalls().length) {
      this.keep();
      this.#emit("change");
    } else {
      this.#answer();
    }
  }

  #addResult(id, content) {
    this.messages.push({ role: "tool", tool_call_id: id, content });
  }

  stop() {
    this.#abort?.abort();
  }

  keep(atOnce = false) {
    if (!this.conversation) return;
    Object.assign(this.conversation, { messages: this.messages, settings: this.settings.all() });
    this.store.put(this.conversation, atOnce);
  }

  #store(conversation) {
    if (this.store.all.has(conversation.id)) this.store.put(conversation);   // else it was deleted meanwhile
  }

  #start(title = "") {
    if (!this.conversation) {
      const now = Date.now();
      this.conversation = { id: makeId(), title: title.trim().replace(/\s+/g, " ").slice(0, 80), created: now,
        updated: now, settings: {}, messages: this.messages };
    }
    this.#rounds = 0;
    this.#answer();
  }

  async #answer() {
    this.conversation.updated = Date.now();
    const answer = new Answer(this), abort = this.#abort = answer.abort, conversation = this.conversation;
    this.messages.push(answer.reply);
    this.trouble = null;
    this.keep();
    this.#emit("change");
    this.#emit("busy");
    const trouble = await answer.run(() => {
      if (this.conversation === conversation) this.#emit("write");
      this.#store(conversation);
    });
    if (this.#abort === abort) this.#abort = null;
    const messages = conversation.messages;
    if (answer.isEmpty && messages.at(-1) === answer.reply) messages.pop();
    this.#store(conversation);
    this.#emit("busy");
    if (this.conversation !== conversation) return;         // another one was opened meanwhile
    this.trouble = trouble;
    const goesOn = this.#runOwnTools(answer.reply);
    this.keep();
    this.#emit("change");
    if (trouble) this.#emit("trouble");
    else if (goesOn) this.#answer();
  }

  // Results of the page's own tools; whether every call now has one, so that the model can go on.
  #runOwnTools(reply) {
    if (reply.state !== "done" || !reply.tool_calls?.length || !this.settings.get("runOwn")) return false;
    for (const one of this.openCalls()) {
      const result = runOwn(one);
      if (result !== undefined) this.#addResult(one.id, result);
    }
    this.#rounds += 1;
    return !this.openCalls().length && this.#rounds < MOST_ROUNDS;
  }
}

// One answer: asks for it and fills in `reply` as it comes.
class Answer {
  constructor(session) {
    this.session = session;
    this.abort = new AbortController();
    this.reply = { role: "assistant", content: "", state: "writing", figures: {} };
    this.body = requestBody(session);
  }

  get isEmpty() {
    const { content, reasoning_content, tool_calls } = this.reply;
    return !content && !reasoning_content && !tool_calls?.length;
  }

  // Until the end; what went wrong, or null. `onWrite` is called after each piece.
  async run(onWrite) {
    const began = performance.now(), { reply } = this, { figures } = reply;
    let first = 0, last = 0, pieces = 0, trouble = null;
    try {
      const response = await call("/v1/chat/completions", { body: this.body, signal: this.abort.signal });
      for await (const event of events(response)) {
        figures.request ??= event.id;
        const choice = event.choices?.[0];
        if (event.usage) figures.usage = event.usage;
        if (event.rorqual) figures.rorqual = event.rorqual;
        if (event.exactness) figures.exactness = event.exactness.level;
        if (!choice) continue;
        if (this.#take(choice.delta)) {
          last = performance.now();
          first ||= last;
          pieces += 1;
        }
        figures.finish = choice.finish_reason ?? figures.finish;
        const tokens = figures.usage?.completion_tokens ?? pieces, span = (last - first) / 1000;
        const measured = figures.rorqual?.timing?.decode_s ?? span;
        if (first) figures.firstToken = (first - began) / 1000;
        if (tokens > 1 && measured > 0) figures.tokensPerSecond = (tokens - 1) / measured;
        onWrite();
      }
      reply.state = "done";
      if (figures.finish !== "tool_calls") delete reply.tool_calls;   // half a call is none
    } catch (error) {
      reply.state = "stopped";
      if (error.name !== "AbortError") {
        reply.state = "failed";
        trouble = error instanceof ApiError ? error : new ApiError(`The answer could not be read: ${error.message}`);
      }
      delete reply.tool_calls;
    }
    return trouble;
  }

  #take({ content, reasoning_content, tool_calls }) {
    const { reply } = this;
    if (content) reply.content += content;
    if (reasoning_content) reply.reasoning_content = (reply.reasoning_content ?? "") + reasoning_content;
    for (const { index, id, function: part } of tool_calls ?? []) {
      reply.tool_calls ??= [];
      const made = (reply.tool_calls[index] ??= { id, name: "", arguments: "" });
      made.id ??= id;
      made.name += part?.name ?? "";
      made.arguments += part?.arguments ?? "";
    }
    return Boolean(content || reasoning_content || tool_calls?.length);
  }
}

function requestBody(session) {
  const { settings } = session, effort = settings.get("effort"), tools = offered(settings.all());
  const system = settings.get("system").trim();
  const given = {};
  for (const [name, as] of [["temperature", "temperature"], ["topP", "top_p"], ["maxTokens", "max_tokens"], ["seed", "seed"]]) {
    if (settings.get(name) !== null) given[as] = settings.get(name);
  }
  return {
    model: settings.get("model"),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...session.messages.map(asSent)],
    stream: true,
    stream_options: { include_usage: true },
    ...given,
    ...(effort === "off" ? { thinking: { type: "disabled" } } : { reasoning_effort: effort }),
    ...(tools.length ? { tools } : {}),
    ...(settings.get("json") ? { response_format: { type: "json_object" } } : {}),
  };
}

function asSent({ role, content, reasoning_content, tool_calls, tool_call_id }) {
  const out = { role, content };
  if (reasoning_content !== undefined) out.reasoning_content = reasoning_content;
  if (tool_call_id !== undefined) out.tool_call_id = tool_call_id;
  if (tool_calls?.length) {
    out.tool_calls = tool_calls.map((one) => ({ id: one.id, type: "function",
      function: { name: one.name, arguments: one.arguments } }));
  }
  return out;
}
