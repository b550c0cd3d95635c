// The chat page: sends the conversation to /v1/chat/completions and shows the stream as it comes.
// Text from the model is only ever set as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log"), promptBox = $("prompt"), sendButton = $("send"), stopButton = $("stop");
const STORED = "rorqual-conversation";

let conversation = [];   // what was said, as the API takes it back, with `figures` for show
let running = null;      // AbortController of the answer being written

// ---- the server -------------------------------------------------------------------------------

async function loadModels() {
  try {
    const response = await fetch("/v1/models");
    if (!response.ok) throw new Error(await refusal(response));
    for (const model of (await response.json()).data) $("model").add(new Option(model.id, model.id));
  } catch (error) {
    showError(`The list of models could not be read: ${explain(error)}`);
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answered ${response.status} ${text.slice(0, 200)}`;
  }
}

function explain(error) {
  return error instanceof TypeError ? "the server cannot be reached. Is it still running?" : error.message;
}

function requestBody() {
  const effort = $("effort").value;
  return {
    model: $("model").value,
    messages: conversation.map(({ role, content, reasoning_content }) =>
      reasoning_content === undefined ? { role, content } : { role, content, reasoning_content }),
    temperature: Number($("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    ...(effort === "off" ? { thinking: { type: "disabled" } } : { reasoning_effort: effort }),
  };
}

// Yields the parsed events of a Server-Sent Events body; throws if it ends before [DONE].
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did.");
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const line = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      if (!line.startsWith("data: ")) continue;           // a keep-alive comment
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// ---- what is shown ----------------------------------------------------------------------------

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function addToLog(element) {
  $("welcome").hidden = true;
  const stay = isAtBottom();
  log.append(element);
  if (stay) scrollDown();
  return element;
}

function showUser(text) {
  const message = make("article", "message user");
  message.setAttribute("aria-label", "You");
  message.append(make("div", "text", text));
  return addToLog(message);
}

function showError(text) {
  const box = make("div", "error", text);
  box.setAttribute("role", "alert");
  addToLog(box);
  scrollDown();
}

// An assistant message on the page; `draw` may be called as often as text comes.
function showAssistant() {
  const message = make("article", "message assistant");
  message.setAttribute("aria-label", "Model");
  const thinking = make("details", "thinking");
  const summary = make("summary", "", "Thinking…");
  const reasoning = make("div", "reasoning");
  thinking.append(summary, reasoning);
  thinking.hidden = true;
  const answer = make("div", "answer");
  const figures = make("p", "figures");
  message.append(thinking, answer, figures);
  addToLog(message);
  let touched = false;                                    // the reader folded or unfolded it; leave it so
  summary.addEventListener("click", () => { touched = true; });
  return {
    message,
    draw(reply, state) {
      const stay = isAtBottom();
      message.classList.toggle("writing", state === "writing");
      message.setAttribute("aria-busy", String(state === "writing"));
      thinking.hidden = !reply.reasoning_content;
      if (reasoning.textContent !== (reply.reasoning_content || "")) reasoning.textContent = reply.reasoning_content || "";
      const thinks = state === "writing" && !reply.content;
      summary.textContent = thinks ? "Thinking…" : "Thoughts";
      if (!touched) thinking.open = thinks;
      if (reply.content || !thinks) drawText(answer, reply.content);
      figures.textContent = reply.figures || "";
      if (stay) scrollDown();
    },
  };
}

// Plain text with ``` blocks set apart; only the parts that changed are touched.
function drawText(answer, text) {
  const parts = text.split("```").map((part, i, all) => {
    if (i % 2) return { tag: "pre", text: part.replace(/^[\w+-]*\n/, "").replace(/\n$/, "") };
    if (i > 0) part = part.replace(/^\n+/, "");          // the block's own margins are space enough
    if (i < all.length - 1) part = part.replace(/\n+$/, "");
    return { tag: "div", text: part };
  });
  parts.forEach((part, i) => {
    let node = answer.children[i];
    if (!node || node.tagName.toLowerCase() !== part.tag) {
      const fresh = make(part.tag, part.tag === "div" ? "text" : "");
      node ? node.replaceWith(fresh) : answer.append(fresh);
      node = fresh;
    }
    if (node.textContent !== part.text) node.textContent = part.text;
  });
  while (answer.children.length > parts.length) answer.lastChild.remove();
}

function isAtBottom() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function scrollDown() {
  log.scrollTop = log.scrollHeight;
}

function describe(times, tokens, reason) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  const seconds = (times.last - times.first) / 1000;
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toPrecision(3)} tokens/s`);
  if (times.first) parts.push(`first token after ${((times.first - times.start) / 1000).toFixed(2)} s`);
  if (reason === "length") parts.push("cut off at the token limit");
  if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

// ---- one turn ---------------------------------------------------------------------------------

async function send(text) {
  conversation.push({ role: "user", content: text });
  const question = showUser(text);
  scrollDown();
  const view = showAssistant();
  const reply = { role: "assistant", content: "" };
  const times = { start: performance.now(), first: 0, last: 0 };
  let tokens = 0, reason = null, failure = null, drawing = 0;
  const redraw = () => {
    drawing ||= requestAnimationFrame(() => { drawing = 0; view.draw(reply, "writing"); });
  };
  running = new AbortController();
  setBusy(true);
  view.draw(reply, "writing");
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(requestBody()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of readEvents(response)) {
      const choice = event.choices[0];
      if (!choice) continue;
      const { content, reasoning_content } = choice.delta;
      if (content || reasoning_content) {
        tokens += 1;                                      // about one a piece; the exact count comes last
        times.last = performance.now();
        times.first ||= times.last;
      }
      if (content) reply.content += content;
      if (reasoning_content) reply.reasoning_content = (reply.reasoning_content || "") + reasoning_content;
      if (event.usage) tokens = event.usage.completion_tokens;
      reason = choice.finish_reason || reason;
      reply.figures = describe(times, tokens, reason);
      redraw();
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else failure = explain(error);
  }
  cancelAnimationFrame(drawing);
  reply.figures = tokens || reason === "stopped" ? describe(times, tokens, reason) : "";
  view.draw(reply, "done");
  running = null;
  setBusy(false);
  if (failure !== null) showError(failure);
  if (reply.content || reply.reasoning_content) {
    conversation.push(reply);
    $("status").textContent = reason === "stopped" ? "Stopped." : "Answer complete.";
  } else {
    conversation.pop();                                   // nothing came: the question can be asked again
    view.message.remove();
    if (!promptBox.value) {
      promptBox.value = text;
      question.remove();
    }
  }
  store();
  resize();
}

function setBusy(busy) {
  sendButton.hidden = busy;
  stopButton.hidden = !busy;
  $("new-chat").disabled = busy;
  if (!busy && matchMedia("(hover: hover)").matches) promptBox.focus();
}

function stop() {
  running?.abort();
}

function submit() {
  const text = promptBox.value;
  if (running || !text.trim()) return;
  promptBox.value = "";
  resize();
  send(text);
}

function resize() {
  promptBox.style.height = "auto";
  promptBox.style.height = `${promptBox.scrollHeight + 2}px`;
}

// ---- the conversation survives a reload -------------------------------------------------------

function store() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(conversation));
  } catch { /* full or forbidden: the conversation then lives as long as the page */ }
}

function restore() {
  try {
    conversation = JSON.parse(sessionStorage.getItem(STORED)) || [];
  } catch {
    conversation = [];
  }
  for (const message of conversation) {
    if (message.role === "user") showUser(message.content);
    else showAssistant().draw(message, "done");
  }
  scrollDown();
}

function newChat() {
  stop();
  conversation = [];
  store();
  log.replaceChildren($("welcome"));
  $("welcome").hidden = false;
  $("status").textContent = "New chat.";
  promptBox.focus();
}

// ---- events -----------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
promptBox.addEventListener("input", resize);
promptBox.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
stopButton.addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => { if (!running) send(button.textContent); });
}

restore();
resize();
loadModels();
