// What a request says besides its messages, as the panel shows it. A conversation keeps its own; a new one begins with
// those used last.

const STORED = "rorqual.settings";
const DEFAULTS = {
  model: "", effort: "high", system: "", temperature: 0.3, topP: null, maxTokens: null, seed: null, json: false,
  tools: [], ownTools: [], runOwn: true,
};
const NUMBERS = { temperature: [0, 2], topP: [0.01, 1], maxTokens: [1, 393216], seed: [0, Number.MAX_SAFE_INTEGER] };
const WHOLE = new Set(["maxTokens", "seed"]);

export class Settings extends EventTarget {
  #values = { ...DEFAULTS };

  constructor() {
    super();
    try {
      this.#take(JSON.parse(localStorage.getItem(STORED)) ?? {});
    } catch { /* nothing stored, or nothing of ours */ }
  }

  get(name) {
    return this.#values[name];
  }

  all() {
    return structuredClone(this.#values);
  }

  set(name, value) {
    this.take({ [name]: value });
  }

  // Those of `given` that are of the right kind.
  take(given) {
    this.#take(given ?? {});
    try {
      localStorage.setItem(STORED, JSON.stringify(this.#values));
    } catch { /* they then live as long as the page */ }
    this.dispatchEvent(new Event("change"));
  }

  #take(given) {
    for (const name of Object.keys(DEFAULTS)) {
      const value = given[name];
      if (value !== undefined && isOfKind(name, value)) this.#values[name] = value;
    }
  }
}

function isOfKind(name, value) {
  const range = NUMBERS[name];
  if (range) {
    return value === null ? name !== "temperature" : typeof value === "number" && value >= range[0] && value <= range[1] &&
      (!WHOLE.has(name) || Number.isInteger(value));
  }
  if (name === "effort") return ["off", "low", "high", "max"].includes(value);
  return Array.isArray(DEFAULTS[name]) ? Array.isArray(value) : typeof value === typeof DEFAULTS[name];
}
