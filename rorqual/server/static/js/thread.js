// The conversation on the page: messages, thinking, tool calls, figures, and what can be done with each.

import { $, copy, h, icon, iconButton, say, toast } from "./dom.js";
import { answerFigures, totals } from "./figures.js";
import { Drawn } from "./markdown.js";
import { OWN_TOOLS, pretty } from "./tools.js";

const SLOW_MS = 10;     // a redraw that took longer makes the next ones rarer

export class Thread {
  #views = new Map();   // by message
  #frame = 0;
  #restUntil = 0;

  // `actions`: { picks(request) } of other parts of the page.
  constructor(session, actions) {
    this.session = session;
    this.actions = actions;
    this.log = $("log");
    this.box = $("messages");
    session.addEventListener("change", () => this.draw());
    session.addEventListener("write", () => this.#drawSoon());
    this.log.addEventListener("scroll", () => this.#showDown(), { passive: true });
    $("down").addEventListener("click", () => this.scrollDown());
  }

  // Everything; views of messages that stayed are kept.
  draw() {
    const { messages, trouble } = this.session, wasAtEnd = this.isAtEnd();
    const shown = messages.filter((one) => one.role !== "tool");
    const views = new Map(shown.map((one) => [one, this.#views.get(one) ?? this.#make(one)]));
    for (const [message, view] of this.#views) if (!views.has(message)) view.element.remove();
    let place = this.box.firstElementChild;
    for (const view of views.values()) {
      if (view.element === place) place = place.nextElementSibling;
      else this.box.insertBefore(view.element, place);
    }
    const isNew = views.size && ![...views.keys()].some((one) => this.#views.has(one));
    this.#views = views;
    const last = shown.at(-1);
    for (const [message, view] of views) view.draw(message === last);
    $("welcome").hidden = messages.length > 0;
    $("totals").textContent = totals(messages);
    this.#drawTrouble(trouble);
    if (wasAtEnd || isNew) this.scrollDown();
    this.#showDown();
  }

  #make(message) {
    return message.role === "user" ? new UserView(message, this) : new AnswerView(message, this);
  }

  #drawSoon() {
    this.#frame ||= requestAnimationFrame((now) => {
      this.#frame = 0;
      if (now < this.#restUntil) {
        this.#drawSoon();
        return;
      }
      const began = performance.now(), wasAtEnd = this.isAtEnd(), last = this.session.messages.at(-1);
      this.#views.get(last)?.draw(true);
      if (wasAtEnd) this.scrollDown();
      const took = performance.now() - began;
      this.#restUntil = took > SLOW_MS ? performance.now() + 3 * took : 0;
    });
  }

  #drawTrouble(trouble) {
    const box = $("trouble");
    box.hidden = !trouble;
    if (!trouble) return;
    const again = h("button", { type: "button", on: { click: () => this.session.retry() } }, icon("again"), "Try again");
    const key = trouble.status === 401 &&
      h("button", { type: "button", on: { click: () => this.actions.askKey() } }, "Enter a key");
    box.replaceChildren(h("p", {}, trouble.message), h("div", { class: "row" }, key, again));
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }

  scrollDown() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  #showDown() {
    $("down").hidden = this.isAtEnd();
  }
}

class UserView {
  constructor(message, thread) {
    this.message = message;
    this.thread = thread;
    this.text = h("div", { class: "text" }, message.content);
    this.actions = h("div", { class: "actions" },
      iconButton("copy", "Copy this message", (event) => copy(message.content, event.currentTarget)),
      iconButton("edit", "Edit this message", () => this.#edit()));
    this.element = h("article", { class: "message user", "aria-label": "You" }, this.text, this.actions);
  }

  draw() {}

  #edit() {
    const { session } = this.thread;
    if (session.isBusy) return;
    const area = h("textarea", { "aria-label": "Your message", rows: 3 });
    area.value = this.message.content;
    const close = () => form.replaceWith(this.text, this.actions);
    const save = () => {
      const text = area.value;
      if (!text.trim()) return;
      close();
      toast("The conversation goes on from here.", session.edit(session.messages.indexOf(this.message), text));
    };
    const form = h("form", { class: "editing", on: { submit: (event) => { event.preventDefault(); save(); } } }, area,
      h("div", { class: "row" }, h("button", { type: "button", on: { click: close } }, "Cancel"),
        h("button", { type: "submit", class: "primary" }, "Send")));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
        this.actions.lastElementChild.focus();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    this.actions.remove();
    this.text.replaceWith(form);
    area.style.height = `${Math.min(area.scrollHeight + 4, 400)}px`;
    area.focus();
  }
}

class AnswerView {
  #wasTouched = false;     // a reader folded or unfolded the thinking: it stays so
  #calls = [];

  constructor(message, thread) {
    this.message = message;
    this.thread = thread;
    this.summary = h("summary", {}, h("span", {}, "Thinking"));
    this.reasoning = h("div", { class: "reasoning" });
    this.thinking = h("details", { class: "thinking", hidden: true }, this.summary, this.reasoning);
    this.summary.addEventListener("click", () => { this.#wasTouched = true; });
    this.answer = h("div", { class: "answer" });
    this.drawn = new Drawn(this.answer);
    this.calls = h("div", { class: "calls" });
    this.figures = h("p", { class: "figures" });
    this.buttons = h("div", { class: "actions" },
      iconButton("copy", "Copy this answer", (event) => copy(message.content, event.currentTarget)),
      iconButton("again", "Write this answer anew", () => this.#again()),
      iconButton("heat", "Show what the indexer picked", () => thread.actions.picks(message.figures?.request)));
    this.foot = h("footer", {}, this.buttons, this.figures);
    this.element = h("article", { class: "message assistant", "aria-label": "Model" }, this.thinking, this.answer,
      this.calls, this.foot);
  }

  draw(isLast) {
    const { message } = this, isWriting = message.state === "writing";
    const thinks = isWriting && !message.content && !message.tool_calls;
    this.element.classList.toggle("writing", isWriting);
    this.element.classList.toggle("thinks", thinks);
    this.element.classList.toggle("last", isLast);
    this.element.setAttribute("aria-busy", String(isWriting));
    this.#drawThinking(thinks);
    this.drawn.update(message.content);
    this.#drawCalls(isLast);
    this.foot.hidden = isWriting && !message.figures?.usage;
    this.buttons.hidden = isWriting;
    this.buttons.lastElementChild.hidden = !message.figures?.request;
    if (!isWriting) this.#drawFigures();
  }

  #drawThinking(thinks) {
    const text = this.message.reasoning_content ?? "";
    this.thinking.hidden = !text && !thinks;
    grow(this.reasoning, text);
    const tokens = this.message.figures?.usage?.completion_tokens_details?.reasoning_tokens;
    this.summary.firstChild.textContent = thinks ? "Thinking…" : tokens ? `Thought for ${tokens} tokens` : "Thoughts";
    if (!this.#wasTouched) this.thinking.open = thinks && Boolean(text);
  }

  #drawCalls(isLast) {
    const given = this.message.tool_calls ?? [];
    while (this.#calls.length < given.length) {
      const view = new CallView(this.thread);
      this.#calls.push(view);
      this.calls.append(view.element);
    }
    while (this.#calls.length > given.length) this.#calls.pop().element.remove();
    if (!given.length) return;
    const { messages } = this.thread.session, at = messages.indexOf(this.message);
    given.forEach((call, i) => {
      const after = messages.slice(at + 1, at + 1 + given.length);
      const result = after.find((one) => one.role === "tool" && one.tool_call_id === call.id);
      this.#calls[i].draw(call, result?.content, isLast && this.message.state === "done");
    });
  }

  #drawFigures() {
    const { message } = this, parts = answerFigures({ ...message.figures, state: message.state });
    this.figures.replaceChildren(...parts.flatMap(([text, title], i) => [i ? " · " : "", h("span", { title }, text)]));
    const why = message.figures?.rorqual?.cache?.text;
    if (why) {
      const { rorqual, exactness } = message.figures;
      this.figures.append(h("details", { class: "why" }, h("summary", {}, "why"),
        h("span", {}, `Cache: ${why}`, rorqual.seed === undefined ? "" : ` Seed ${rorqual.seed}.`,
          exactness ? ` Exactness: ${exactness}.` : "")));
    }
  }

  #again() {
    const { session } = this.thread;
    if (session.isBusy) return;
    toast("The answer is written anew.", session.regenerate(session.messages.indexOf(this.message)));
  }
}

// A call of a tool: name and arguments as they come, then its result or a box to give it.
class CallView {
  constructor(thread) {
    this.thread = thread;
    this.name = h("code", { class: "name" });
    this.note = h("span", { class: "note" });
    this.arguments = h("pre", { class: "arguments", tabindex: "0", "aria-label": "Arguments" });
    this.result = h("pre", { class: "result", tabindex: "0", "aria-label": "Result" });
    this.area = h("textarea", { rows: 2, placeholder: "What the tool answers…" });
    this.form = h("form", { class: "give", on: { submit: (event) => { event.preventDefault(); this.#give(); } } },
      this.area, h("button", { type: "submit", class: "primary" }, "Give result"));
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#give();
      }
    });
    this.element = h("section", { class: "call" },
      h("h3", {}, icon("tool"), this.name, this.note), this.arguments, this.result, this.form);
  }

  draw(call, result, isOpen) {
    const isAnswered = result !== undefined;
    this.id = call.id;
    this.element.setAttribute("aria-label", `Tool call ${call.name}`);
    this.area.setAttribute("aria-label", `Result of ${call.name}`);
    this.name.textContent = call.name;
    grow(this.arguments, pretty(call.arguments));
    this.result.hidden = !isAnswered;
    this.result.textContent = result ?? "";
    const isNew = this.form.hidden && !isAnswered && isOpen;
    this.form.hidden = isAnswered || !isOpen;
    this.note.textContent = isAnswered ? (OWN_TOOLS.has(call.name) ? "answered by this page" : "answered") :
      isOpen ? "waits for its result" : "";
    if (isNew && !this.thread.hasAsked) say(`The model calls ${call.name} and waits for its result.`);
  }

  #give() {
    if (this.area.value.trim()) this.thread.session.giveResult(this.id, this.area.value);
  }
}

// Set a text that mostly grows: what is there stays, so that a selection and long texts do.
function grow(element, text) {
  const node = element.firstChild;
  if (!node) element.textContent = text;
  else if (node.data === text) return;
  else if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}
