// Keyboard shortcuts. Single keys act only outside of text boxes, and can be switched off in the help.

import { $, h } from "./dom.js";

const STORED = "rorqual.single-keys";

// `actions`: name to function, as in the table; `escape` returns whether it had something to end.
export function listenToKeys(actions) {
  const table = [
    ["n", "New conversation", "newChat"], ["/", "To the message box", "prompt"], ["c", "Search conversations", "search"],
    ["e", "Engine view", "engine"], ["s", "Parameters", "settings"], ["t", "Light or dark", "theme"],
    ["r", "Write the last answer anew", "again"], ["i", "What the indexer picked for the last answer", "picks"],
    ["?", "This help", "help"],
  ];
  $("keys-list").append(...[["Enter", "Send"], ["Shift Enter", "New line"], ["Esc", "Stop the answer, close what is open"],
    ...table].map(([keys, what]) => h("div", {}, h("dt", {}, keys.split(" ").flatMap((key) => [h("kbd", {}, key), " "])), h("dd", {}, what))));
  const box = $("single-keys");
  try {
    box.checked = localStorage.getItem(STORED) !== "off";
  } catch { /* on */ }
  box.addEventListener("change", () => {
    try {
      localStorage.setItem(STORED, box.checked ? "on" : "off");
    } catch { /* as long as the page lives */ }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      actions.escape();
      return;
    }
    const isTyping = event.target.closest?.("input:not([type=checkbox]):not([type=range]), textarea, select, dialog");
    if (!box.checked || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const found = table.find(([key]) => key === event.key);
    if (!found) return;
    event.preventDefault();
    actions[found[2]]();
  });
}
