// Requests to this server: the API key, errors, server-sent events.

import { $, parse } from "./dom.js";

const KEY = "pixart_jax.key";
let asking = null; // the open question for a key, shared by all requests that wait for it

export class ApiError extends Error {
  constructor(message, { status, param, retry } = {}) {
    super(message);
    Object.assign(this, { status, param, retry });
  }
}

export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it running?");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    if (sessionStorage.getItem(KEY) === key) { // nobody has entered another one meanwhile
      asking ??= askKey(key).finally(() => { asking = null; });
      await asking;
    }
  }
}

export async function post(path, body, options) {
  const form = body instanceof FormData;
  const headers = form ? {} : { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: form ? body : JSON.stringify(body), ...options });
}

async function errorOf(response) {
  const retry = Number(response.headers.get("Retry-After")) || undefined;
  const { error } = await response.json().catch(() => ({}));
  let message = error?.message ?? `The server answered with status ${response.status}.`;
  if (retry && !message.includes("again")) message += `: try again in ${retry} s`;
  return new ApiError(message, { status: response.status, param: error?.param, retry });
}

function askKey(refused) {
  const dialog = $("key"), field = $("key-value");
  $("key-text").textContent = refused
    ? "The server refused this key. Check it and try again."
    : "This server asks for a key. It stays in this tab until you close it.";
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.onclose = () => {
      if (!field.value) return reject(new ApiError("This server needs an API key.", { status: 401 }));
      sessionStorage.setItem(KEY, field.value.trim());
      resolve();
    };
  });
}

/** The data of each server-sent event, parsed. Raises ApiError for an event with an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", from = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    for (let end; (end = text.indexOf("\n\n", from)) >= 0; from = 0) {
      const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
      text = text.slice(end + 2);
      const data = lines.map((line) => line.slice(5)).join("\n").trim();
      if (!data || data === "[DONE]") continue;
      const event = parse(data);
      if (event.error) throw new ApiError(event.error.message, { param: event.error.param });
      yield event;
    }
    from = Math.max(0, text.length - 1);
  }
}
