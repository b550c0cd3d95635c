// The panel of parameters, and the pickers below the message box: both show the settings and change them.

import { $, h } from "./dom.js";
import { EXAMPLE, OWN_TOOLS, offered, readTools } from "./tools.js";

const NUMBERS = { temperature: "temperature", "top-p": "topP", "max-tokens": "maxTokens", seed: "seed" };

export function showParameters(settings) {
  for (const [id, name] of Object.entries(NUMBERS)) {
    $(id).addEventListener("input", () => {
      const box = $(id), value = box.value === "" ? null : Number(box.value);
      settings.set(name, value);
      const isTaken = settings.get(name) === value;
      box.setAttribute("aria-invalid", String(!isTaken));
      box.setCustomValidity(isTaken ? "" : `From ${box.min} to ${box.max}.`);
    });
  }
  bind("system", "input", (box) => settings.set("system", box.value));
  bind("json", "change", (box) => settings.set("json", box.checked));
  bind("run-own", "change", (box) => settings.set("runOwn", box.checked));
  bind("effort", "change", (box) => settings.set("effort", box.value));
  bind("model", "change", (box) => settings.set("model", box.value));
  $("own-tools").append(...[...OWN_TOOLS].map(([name, { definition }]) => {
    const box = h("input", { type: "checkbox", value: name });
    box.addEventListener("change", () => settings.set("ownTools", [...OWN_TOOLS.keys()].filter((one) =>
      one === name ? box.checked : settings.get("ownTools").includes(one))));
    return h("label", { class: "check" }, box, h("span", {}, h("code", {}, name), " ", definition.function.description));
  }));
  bind("tools", "input", (box) => takeTools(box, settings));
  $("tools-example").addEventListener("click", () => {
    $("tools").value = EXAMPLE;
    takeTools($("tools"), settings);
  });
  $("reset").addEventListener("click", () => settings.take({ system: "", temperature: 0.3, topP: null, maxTokens: null,
    seed: null, json: false, tools: [], ownTools: [], runOwn: true }));
  settings.addEventListener("change", () => draw(settings));
  draw(settings);
}

function bind(id, event, change) {
  $(id).addEventListener(event, () => change($(id)));
}

function takeTools(box, settings) {
  let message = "";
  try {
    settings.set("tools", readTools(box.value));
  } catch (error) {
    message = error.message;
  }
  box.setAttribute("aria-invalid", String(Boolean(message)));
  $("tools-error").textContent = message;
}

function draw(settings) {
  for (const [id, name] of Object.entries(NUMBERS)) put($(id), settings.get(name) ?? "");
  $("temperature-value").textContent = String(settings.get("temperature"));
  put($("system"), settings.get("system"));
  put($("effort"), settings.get("effort"));
  $("json").checked = settings.get("json");
  $("run-own").checked = settings.get("runOwn");
  for (const box of $("own-tools").querySelectorAll("input")) box.checked = settings.get("ownTools").includes(box.value);
  const tools = settings.get("tools");
  if (document.activeElement !== $("tools")) {
    $("tools").value = tools.length ? JSON.stringify(tools, null, 2) : "";
    $("tools-error").textContent = "";
    $("tools").setAttribute("aria-invalid", "false");
  }
  const number = offered(settings.all()).length, marks = [];
  if (settings.get("system").trim()) marks.push("system prompt");
  if (number) marks.push(`${number} tool${number > 1 ? "s" : ""}`);
  if (settings.get("json")) marks.push("JSON");
  $("marks").textContent = marks.join(" · ");
}

// Not while somebody types in it.
function put(box, value) {
  if (document.activeElement !== box && box.value !== String(value)) box.value = String(value);
}

// Fill the picker of models; the one chosen before stays if it is still there.
export function showModels(settings, names) {
  $("model").replaceChildren(...names.map((name) => new Option(name, name)));
  if (!names.includes(settings.get("model"))) settings.set("model", names[0] ?? "");
  $("model").value = settings.get("model");
  settings.addEventListener("change", () => {
    if (names.includes(settings.get("model"))) $("model").value = settings.get("model");
    else if (names.length) settings.set("model", names[0]);
  });
}
