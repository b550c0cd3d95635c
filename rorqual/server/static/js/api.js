// The server: requests with the key, errors in its words, and the events of a stream.

const KEY = "rorqual.key";

export class ApiError extends Error {
  // status: of HTTP, 0 where no answer came. retryAfter: seconds, or undefined.
  constructor(message, status = 0, retryAfter = undefined) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export const apiKey = {
  get: () => read(sessionStorage) ?? read(localStorage) ?? "",
  set(value, keep) {
    for (const storage of [localStorage, sessionStorage]) write(storage, "");
    if (value) write(keep ? localStorage : sessionStorage, value);
  },
};

function read(storage) {
  try { return storage.getItem(KEY); } catch { return null; }
}

function write(storage, value) {
  try { value ? storage.setItem(KEY, value) : storage.removeItem(KEY); } catch { /* it then lives in the other one */ }
}

// The response, if it is a good one. Throws ApiError, or an AbortError when `signal` says so.
export async function call(path, { body, signal } = {}) {
  const headers = { ...(apiKey.get() && { authorization: `Bearer ${apiKey.get()}` }) };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    const method = body === undefined ? "GET" : "POST";
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running? Start it again, then try again.");
  }
  if (response.ok) return response;
  const after = Number(response.headers.get("retry-after")) || undefined;
  throw new ApiError(await refusal(response), response.status, after);
}

export async function json(path, options) {
  return (await call(path, options)).json();
}

async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    const isPlain = response.headers.get("content-type")?.startsWith("text/plain");
    return isPlain ? text.slice(0, 400) : `The server answered ${response.status}: ${text.slice(0, 200)}`;
  }
}

// The parsed events of a Server-Sent Events body; throws if it ends before [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("The connection ended before the answer did. Try again.");
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;           // a keep-alive comment
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.message, 500);
      yield event;
    }
  }
}
