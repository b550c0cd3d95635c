// Conversations, kept in this browser's IndexedDB; in memory alone where the browser forbids that.

const NAME = "rorqual", TABLE = "conversations";
const UNSAVED = "rorqual.unsaved";     // what was not written when the page went; written when it comes again
const WRITE_MS = 400;
const ROLES = new Set(["user", "assistant", "tool"]);

function request(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

export function makeId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Store {
  all = new Map();      // by id
  isKept = true;        // false: the browser stores nothing, and a reload forgets
  #db = null;
  #unsaved = new Map(); // by id: a conversation, and a stamp that changes with each `put`
  #stamp = 0;
  #timer = 0;

  async open() {
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
      this.#db = await request(opening);
      for (const one of await request(this.#table("readonly").getAll())) this.all.set(one.id, one);
    } catch {
      this.isKept = false;
    }
    try {
      for (const one of JSON.parse(localStorage.getItem(UNSAVED)) ?? []) this.put(one, true);
      localStorage.removeItem(UNSAVED);
    } catch { /* nothing was left */ }
  }

  #table(mode) {
    return this.#db.transaction(TABLE, mode).objectStore(TABLE);
  }

  // Newest first; with `words` those whose title or text holds all of them.
  list(words = "") {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    return [...this.all.values()]
      .filter((one) => wanted.every((word) => holds(one, word)))
      .sort((a, b) => b.updated - a.updated);
  }

  // Written soon; `atOnce` as soon as can be.
  put(conversation, atOnce = false) {
    this.all.set(conversation.id, conversation);
    this.#unsaved.set(conversation.id, { conversation, stamp: ++this.#stamp });
    if (atOnce) this.write();
    else this.#timer ||= setTimeout(() => this.write(), WRITE_MS);
  }

  async write() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const unsaved = [...this.#unsaved];
    if (!this.#db || !unsaved.length) return;
    try {
      const table = this.#table("readwrite");
      await Promise.all(unsaved.map(([, { conversation }]) => request(table.put(conversation))));
      for (const [id, { stamp }] of unsaved) if (this.#unsaved.get(id)?.stamp === stamp) this.#unsaved.delete(id);
      localStorage.removeItem(UNSAVED);
    } catch {
      this.isKept = false;                                // full, or forbidden since
    }
  }

  // The page will be gone in a moment, and what the database is asked now may never be done.
  leave() {
    if (!this.#unsaved.size) return;
    try {
      localStorage.setItem(UNSAVED, JSON.stringify([...this.#unsaved.values()].map((one) => one.conversation)));
    } catch { /* too much for it: the database may still manage */ }
    this.write();
  }

  async delete(id) {
    this.all.delete(id);
    this.#unsaved.delete(id);
    if (this.#db) await request(this.#table("readwrite").delete(id));
  }
}

function holds(conversation, word) {
  return conversation.title.toLowerCase().includes(word) ||
    conversation.messages.some((one) => one.content.toLowerCase().includes(word));
}

// Conversations out of a file: what is not of their shape is left out. Throws for a file that holds none.
export function readExport(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON. Choose one that this page exported.");
  }
  const given = Array.isArray(data?.conversations) ? data.conversations : [data];
  const found = given.map(readConversation).filter(Boolean);
  if (!found.length) throw new Error("The file holds no conversation. Choose one that this page exported.");
  return found;
}

function readConversation(one) {
  if (!Array.isArray(one?.messages)) return null;
  const messages = one.messages.filter((m) => ROLES.has(m?.role) && typeof m.content === "string").map(readMessage);
  if (!messages.length) return null;
  const time = Number(one.updated) || Date.now();
  const settings = typeof one.settings === "object" && one.settings ? one.settings : {};
  return { id: makeId(), title: String(one.title ?? "Imported").slice(0, 200), created: Number(one.created) || time,
    updated: time, settings, messages };
}

function readMessage({ role, content, reasoning_content, tool_calls, tool_call_id, figures }) {
  const out = { role, content };
  if (typeof reasoning_content === "string") out.reasoning_content = reasoning_content;
  if (typeof tool_call_id === "string") out.tool_call_id = tool_call_id;
  if (Array.isArray(tool_calls)) {
    out.tool_calls = tool_calls.map((call) => ({
      id: String(call?.id), name: String(call?.name), arguments: String(call?.arguments),
    }));
  }
  if (typeof figures === "object" && figures) out.figures = figures;
  return out;
}
