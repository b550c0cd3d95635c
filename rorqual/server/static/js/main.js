// The page put together.

import { apiKey, json } from "./api.js";
import { $, say, toast } from "./dom.js";
import { EngineView } from "./engine.js";
import { listenToKeys } from "./keys.js";
import { Layout, nextTheme } from "./layout.js";
import { showModels, showParameters } from "./parameters.js";
import { Session } from "./session.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";

const store = new Store(), settings = new Settings();
await store.open();
const session = new Session(store, settings);
const engine = new EngineView(settings, session);
const layout = new Layout((tab) => engine.open(tab === "engine"));
new Thread(session, { picks, askKey });
const sidebar = new Sidebar(store, session, open);
const promptBox = $("prompt");

// ---- conversations ----------------------------------------------------------------------------

function open(conversation) {
  layout.closeDrawer();
  session.open(conversation);
  remember(conversation);
  say(conversation ? `Opened ${conversation.title}.` : "New conversation.");
  if (matchMedia("(hover: hover)").matches) promptBox.focus();
}

// The address names the conversation, so that a reload shows it again; ids mean nothing to anybody else.
function remember(conversation) {
  history.replaceState(null, "", conversation ? `#${conversation.id}` : location.pathname + location.search);
}

async function loadModels() {
  try {
    showModels(settings, (await json("/v1/models")).data.map((model) => model.id));
  } catch (error) {
    if (error.status === 401) askKey();
    else toast(error.message, loadModels, "Try again");
  }
}

function askKey() {
  $("key").value = apiKey.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", () => {
  apiKey.set($("key").value.trim(), $("keep-key").checked);
  loadModels();
  if (session.trouble?.status === 401) session.retry();
});

function picks(request) {
  layout.showTab("engine");
  engine.picks(request);
}

function lastPicks() {
  picks(session.messages.findLast((one) => one.figures?.request && one.state !== "writing")?.figures.request);
}

// ---- the message box --------------------------------------------------------------------------

function submit() {
  const text = promptBox.value;
  if (session.isBusy || !text.trim()) return;
  promptBox.value = "";
  resize();
  session.send(text);
}

function resize() {
  promptBox.style.height = "auto";
  promptBox.style.height = `${promptBox.scrollHeight + 2}px`;
}

function showBusy() {
  const { isBusy } = session;
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (isBusy) {
    remember(session.conversation);
    return;
  }
  const last = session.messages.at(-1);
  if (session.trouble) say("The answer failed.");
  else if (last?.role === "assistant") say(last.state === "stopped" ? "Stopped." : `Answer: ${last.content.slice(0, 1000)}`);
  const { activeElement } = document;
  const isFree = !activeElement || activeElement === document.body || activeElement === $("stop");
  if (isFree && matchMedia("(hover: hover)").matches) promptBox.focus();
}

session.addEventListener("busy", showBusy);
session.addEventListener("trouble", () => {
  if (session.trouble.status === 401) askKey();
  $("trouble").scrollIntoView({ block: "nearest" });
});

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
promptBox.addEventListener("input", resize);
promptBox.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("stop").addEventListener("click", () => session.stop());
$("new-chat").addEventListener("click", () => open(null));
$("new-chat-top").addEventListener("click", () => open(null));
$("theme").addEventListener("click", nextTheme);
$("help").addEventListener("click", () => $("help-dialog").showModal());
$("show-key").addEventListener("click", askKey);
$("last-picks").addEventListener("click", lastPicks);
$("marks").addEventListener("click", () => layout.showTab("settings"));
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", () => { if (!session.isBusy) session.send(button.textContent); });
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}
addEventListener("pagehide", () => { if (session.isBusy) session.keep(); store.leave(); });
document.addEventListener("visibilitychange", () => { if (document.hidden) store.write(); });

listenToKeys({
  newChat: () => open(null),
  prompt: () => promptBox.focus(),
  search: () => { if (!layout.isOpen.side) layout.toggle("side"); $("search").focus(); },
  engine: () => layout.toggleTab("engine"),
  settings: () => layout.toggleTab("settings"),
  theme: nextTheme,
  again: () => {
    const at = session.messages.findLastIndex((one) => one.role === "assistant");
    if (at >= 0 && !session.isBusy) toast("The answer is written anew.", session.regenerate(at));
  },
  picks: lastPicks,
  help: () => $("help-dialog").showModal(),
  escape: () => { layout.closeDrawer() || session.stop(); },
});

// ---- begin ------------------------------------------------------------------------------------

showParameters(settings);
session.open(store.all.get(location.hash.slice(1)) ?? null);
sidebar.draw();
showBusy();
resize();
await loadModels();
document.documentElement.dataset.ready = "";
