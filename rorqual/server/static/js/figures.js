// Numbers for people.

export const count = (n) => Math.round(n).toLocaleString("en");

export function bytes(n) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let i = 0;
  for (; n >= 1000 && i < units.length - 1; i += 1) n /= 1024;
  return `${i && n < 100 ? n.toPrecision(n < 10 ? 2 : 3) : Math.round(n)} ${units[i]}`;
}

export function seconds(s) {
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 100) return `${s.toPrecision(3)} s`;
  return s < 6000 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`;
}

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

export function rate(n) {
  return n >= 100 ? count(n) : n.toPrecision(3);
}

// The sums of a conversation; "" before its first answer.
export function totals(messages) {
  const known = messages.filter((one) => one.figures?.usage).map((one) => one.figures);
  if (!known.length) return "";
  const sum = (of) => known.reduce((total, one) => total + (of(one) ?? 0), 0);
  const sent = sum(({ usage }) => usage.prompt_tokens), cached = sum(({ usage }) => usage.prompt_cache_hit_tokens);
  const prices = known.map(({ rorqual }) => price(rorqual)).filter((one) => one !== null);
  const spent = prices.length ? ` · ${money(prices.reduce((total, one) => total + one.amount, 0), prices[0].unit)}` : "";
  return `${count(sent)} in, ${percent(cached, sent)} cached · ${count(sum(({ usage }) => usage.completion_tokens))} out${spent}`;
}

// What an answer cost, where its model has a price; else null.
function price(rorqual) {
  const said = rorqual?.cost, isFree = !(Number(said?.price?.output_per_million) > 0);
  const amount = Number(said?.total), without = Number(said?.without_cache);
  return isFree || !Number.isFinite(amount) ? null : { amount, without, unit: String(said.currency) };
}

function money(amount, unit) {
  const number = amount === 0 ? "0" : amount < 0.01 ? amount.toFixed(8).replace(/\.?0+$/, "") : amount.toFixed(2);
  return unit === "USD" ? `$${number}` : `${number} ${unit}`;
}

// The line under an answer: [text, explanation] pairs.
export function answerFigures({ usage, rorqual, firstToken, tokensPerSecond, finish, state }) {
  const out = [];
  if (usage) {
    const cached = usage.prompt_cache_hit_tokens ?? 0, thought = usage.completion_tokens_details?.reasoning_tokens ?? 0;
    out.push([`${count(usage.prompt_tokens)} in`, "Tokens of the prompt: the whole conversation up to here."]);
    out.push([`${percent(cached, usage.prompt_tokens)} cached`, rorqual?.cache?.text ?? "Of the prompt, from the cache."]);
    out.push([`${count(usage.completion_tokens)} out`, "Tokens the model wrote."]);
    if (thought) out.push([`${count(thought)} thinking`, "Of those, tokens of thinking."]);
  }
  if (tokensPerSecond) out.push([`${rate(tokensPerSecond)} tokens/s`, "From the first token to the last."]);
  if (firstToken) out.push([`first after ${seconds(firstToken)}`, "From sending to the first token, as seen here."]);
  const paid = price(rorqual);
  if (paid) out.push([money(paid.amount, paid.unit),
    `What this answer cost; ${money(paid.without, paid.unit)} without the cache.`]);
  if (rorqual?.ended === "timeout") out.push(["out of time", "The answer was cut off at its deadline."]);
  else if (finish === "length") out.push(["cut off at the limit", "The answer reached the most tokens that were allowed."]);
  if (state === "stopped") out.push(["stopped", "The answer was stopped before its end."]);
  return out;
}
