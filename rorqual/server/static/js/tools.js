// Tools that the model may call: the page's own, which run here and can do no harm, and those that people describe as
// JSON, whose results people type.

import { calculate } from "./calculator.js";

const own = (name, description, properties, run) => ({
  definition: { type: "function", function: { name, description,
    parameters: { type: "object", properties, required: Object.keys(properties) } } },
  run,
});

export const OWN_TOOLS = new Map([
  own("calculate", "Work out an arithmetic expression.",
    { expression: { type: "string", description: "Such as 2 * (3 + 4)." } },
    ({ expression }) => {
      const value = calculate(String(expression));
      return String(Number.isInteger(value) ? value : Number(value.toPrecision(12)));
    }),
  own("get_time", "Tell the present date and time.", {}, () => {
    const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
    return `${new Date().toLocaleString("sv-SE", { hour12: false })} ${zone}, ` +
      new Date().toLocaleDateString("en", { weekday: "long" });
  }),
].map((tool) => [tool.definition.function.name, tool]));

export const EXAMPLE = JSON.stringify([{ type: "function", function: { name: "get_weather",
  description: "The weather in a city.", parameters: { type: "object",
    properties: { city: { type: "string" } }, required: ["city"] } } }], null, 2);

// What the settings offer the model, in the API's form.
export function offered(settings) {
  const own = [...OWN_TOOLS].filter(([name]) => settings.ownTools?.includes(name)).map(([, tool]) => tool.definition);
  return [...own, ...(settings.tools ?? [])];
}

// Tool definitions out of JSON text; plain `{name, parameters}` objects are wrapped. Throws an Error that says what is
// wrong with them.
export function readTools(text) {
  if (!text.trim()) return [];
  let data;
  try {
    data = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  const tools = (Array.isArray(data) ? data : [data]).map((tool) =>
    tool?.type === "function" && tool.function ? tool : { type: "function", function: tool });
  for (const [i, tool] of tools.entries()) {
    const name = tool.function?.name;
    if (typeof name !== "string" || !/^[\w-]{1,64}$/.test(name)) {
      throw new Error(`Tool ${i + 1} needs a "name" of letters, digits, "_" and "-".`);
    }
    if (OWN_TOOLS.has(name)) throw new Error(`"${name}" is one of the page's own tools. Choose another name.`);
    if (tools.findIndex((one) => one.function.name === name) < i) throw new Error(`Two tools are called "${name}".`);
  }
  return tools;
}

// The result of one of the page's own tools as text; undefined where a person has to give it.
export function runOwn(call) {
  const tool = OWN_TOOLS.get(call.name);
  if (!tool) return undefined;
  try {
    return tool.run(JSON.parse(call.arguments || "{}"));
  } catch (error) {
    return `Error: ${error.message}`;
  }
}

// Arguments for people to read: indented if they are whole JSON, else as far as they have come.
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
