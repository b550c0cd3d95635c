// The list of conversations: open, search, rename, export, delete, and import.

import { $, download, h, icon, iconButton, say, toast } from "./dom.js";
import { readExport } from "./store.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  // `open(conversation)` shows one, null a new one.
  constructor(store, session, open) {
    Object.assign(this, { store, session, open });
    this.list = $("conversations");
    this.search = $("search");
    this.search.addEventListener("input", () => this.draw());
    for (const type of ["change", "busy"]) session.addEventListener(type, () => this.draw());
    $("export-all").addEventListener("click", () => this.#exportAll());
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", (event) => this.#import(event.target));
  }

  draw() {
    const found = this.store.list(this.search.value), groups = new Map();
    for (const one of found) {
      const name = age(one.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(one);
    }
    const current = this.session.conversation?.id;
    this.list.replaceChildren(...[...groups].flatMap(([name, group]) => [
      h("h3", {}, name),
      h("ul", {}, group.map((one) => this.#row(one, one.id === current))),
    ]));
    if (!found.length) {
      this.list.append(h("p", { class: "hint" }, this.search.value ? "Nothing holds these words."
        : "What you talk about is kept here, in this browser only."));
    }
    $("unkept").hidden = this.store.isKept;
    $("title").textContent = this.session.conversation?.title || "New conversation";
    document.title = this.session.conversation ? `${this.session.conversation.title} · Rorqual` : "Rorqual";
  }

  #row(one, isCurrent) {
    const open = h("button", { type: "button", class: "open", title: one.title, "aria-current": isCurrent && "true",
      on: { click: () => this.open(one) } }, one.title || "Untitled");
    const row = h("li", { class: isCurrent ? "current" : "" }, open, h("div", { class: "actions" },
      iconButton("edit", `Rename “${one.title}”`, () => this.#rename(one, row)),
      iconButton("export", `Export “${one.title}”`, () => exportOne(one)),
      iconButton("delete", `Delete “${one.title}”`, () => this.#delete(one))));
    return row;
  }

  #rename(one, row) {
    const box = h("input", { type: "text", "aria-label": "Name of the conversation", value: one.title, maxLength: 120 });
    let isOver = false;
    const end = (isKept) => {
      if (isOver) return;
      isOver = true;
      const title = box.value.trim();
      if (isKept && title) {
        one.title = title;
        this.store.put(one, true);
      }
      this.draw();
      this.list.querySelector(".current .open")?.focus();
    };
    box.addEventListener("blur", () => end(true));
    box.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") end(false);
    });
    row.replaceChildren(box);
    box.select();
    box.focus();
  }

  #delete(one) {
    const wasOpen = this.session.conversation?.id === one.id;
    if (wasOpen) this.open(null);
    this.store.delete(one.id);
    this.draw();
    toast(`“${one.title}” is deleted.`, () => {
      this.store.put(one, true);
      if (wasOpen) this.open(one);
      this.draw();
    });
    this.search.focus();
  }

  #exportAll() {
    const all = this.store.list();
    if (!all.length) say("There is nothing to export.");
    else download(`rorqual-${day()}.json`, JSON.stringify({ conversations: all }, null, 1));
  }

  async #import(input) {
    const file = input.files[0];
    input.value = "";
    if (!file) return;
    try {
      const found = readExport(await file.text());
      for (const one of found) this.store.put(one, true);
      toast(`${found.length} conversation${found.length === 1 ? "" : "s"} imported.`);
    } catch (error) {
      toast(error.message);
    }
    this.draw();
  }
}

function exportOne(one) {
  const name = one.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
  download(`${name}.json`, JSON.stringify(one, null, 1));
}

const day = () => new Date().toISOString().slice(0, 10);

function age(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return time >= midnight - 6 * DAY_MS ? "This week" : "Earlier";
}
