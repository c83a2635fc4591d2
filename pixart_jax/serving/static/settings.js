// Settings in image files: this project's JSON in PNGs, the "parameters" text of other tools.

import { parse } from "./dom.js";

const LIMIT = 1 << 20; // bytes of a chunk, also when it is inflated
const NAMES = { // of "parameters": ours
  "negative prompt": "negative_prompt", steps: "steps", sampler: "solver", "cfg scale": "guidance",
  seed: "seed", size: "size", "denoising strength": "strength", strength: "strength",
  model: "model", "model hash": "model_hash",
};
const SOLVERS = { "dpm++ 2m": "dpm++", "dpm++ 2m karras": "dpm++", "euler a": "euler_ancestral" };

/** The settings in an image file, under the names of this project's JSON; null if it has none. */
export async function settingsOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  try {
    if (ascii(bytes.subarray(1, 4)) === "PNG") return fromTexts(await pngTexts(bytes, view));
    const exif = ascii(bytes.subarray(0, 4)) === "RIFF" ? webpExif(bytes, view) : jpegExif(bytes, view);
    const comment = exif && userComment(exif);
    return comment ? fromTexts({ parameters: comment }) : null;
  } catch (error) {
    if (error instanceof RangeError || error instanceof SyntaxError || error instanceof TypeError) {
      return null; // a damaged file
    }
    throw error;
  }
}

function fromTexts(texts) {
  if (texts.pixart_jax) return parse(texts.pixart_jax);
  return texts.parameters ? parseParameters(texts.parameters) : null;
}

const ascii = (bytes) => String.fromCharCode(...bytes);
const latin1 = new TextDecoder("latin1"), utf8 = new TextDecoder();

async function pngTexts(bytes, view) {
  const texts = {};
  for (let at = 8; at + 8 <= bytes.length;) {
    const length = view.getUint32(at), kind = ascii(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    at += length + 12;
    if (kind === "IEND") break;
    if (!["tEXt", "zTXt", "iTXt"].includes(kind) || length > LIMIT) continue;
    const end = data.indexOf(0), name = latin1.decode(data.subarray(0, end));
    let rest = data.subarray(end + 1), packed = kind === "zTXt";
    if (kind === "zTXt") rest = rest.subarray(1); // the method
    if (kind === "iTXt") {
      packed = rest[0] === 1;
      rest = rest.subarray(2);
      for (let field = 0; field < 2; field++) rest = rest.subarray(rest.indexOf(0) + 1); // language
    }
    texts[name] = (kind === "iTXt" ? utf8 : latin1).decode(packed ? await inflate(rest) : rest);
  }
  return texts;
}

async function inflate(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
  const parts = [];
  let size = 0;
  for (const reader = stream.getReader(); size <= LIMIT;) {
    const { value, done } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    size += value.length;
  }
  throw new RangeError("a text chunk of more than 1 MiB");
}

function jpegExif(bytes, view) {
  for (let at = 2; at + 10 < bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda;) {
    const length = view.getUint16(at + 2);
    if (bytes[at + 1] === 0xe1 && ascii(bytes.subarray(at + 4, at + 8)) === "Exif") {
      return bytes.slice(at + 10, at + 2 + length);
    }
    at += length + 2;
  }
  return null;
}

function webpExif(bytes, view) {
  for (let at = 12; at + 8 < bytes.length;) {
    const length = view.getUint32(at + 4, true);
    if (ascii(bytes.subarray(at, at + 4)) === "EXIF" && length <= LIMIT) {
      const skip = ascii(bytes.subarray(at + 8, at + 12)) === "Exif" ? 14 : 8;
      return bytes.slice(at + skip, at + 8 + length);
    }
    at += length + 8 + (length & 1);
  }
  return null;
}

function userComment(exif) {
  const view = new DataView(exif.buffer), little = exif[0] === 0x49;
  const entry = (directory, tag) => {
    for (let n = 0; n < view.getUint16(directory, little); n++) {
      const at = directory + 2 + 12 * n;
      if (view.getUint16(at, little) === tag) return at;
    }
    return null;
  };
  const pointer = entry(view.getUint32(4, little), 0x8769);
  const at = pointer && entry(view.getUint32(pointer + 8, little), 0x9286);
  if (!at) return null;
  const start = view.getUint32(at + 8, little), count = view.getUint32(at + 4, little);
  const data = exif.subarray(start + 8, start + count);
  if (ascii(exif.subarray(start, start + 7)) !== "UNICODE") return utf8.decode(data);
  return new TextDecoder(data[0] === 0 ? "utf-16be" : "utf-16le").decode(data);
}

/** The text that web UIs write: prompt, negative prompt, a last line of "Name: value" pairs. */
export function parseParameters(text) {
  const lines = text.trim().split("\n");
  const pairs = [...lines.at(-1).matchAll(/\s*(\w[\w /-]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g)];
  const found = {};
  if (pairs.length >= 3) {
    lines.pop();
    for (const [, title, raw] of pairs) {
      const name = NAMES[title.toLowerCase()] ?? title;
      found[name] = raw.startsWith('"') ? JSON.parse(raw) : raw.trim();
    }
  }
  const split = lines.findIndex((line) => line.startsWith("Negative prompt:"));
  const part = (some) => some.join("\n").trim();
  found.prompt = part(split < 0 ? lines : lines.slice(0, split));
  if (split >= 0) found.negative_prompt = part(lines.slice(split)).slice(16).trim();
  if (/^\d+x\d+$/.test(found.size ?? "")) [found.width, found.height] = found.size.split("x").map(Number);
  delete found.size;
  for (const name of ["steps", "guidance", "strength"]) if (name in found) found[name] = Number(found[name]);
  if (found.solver) found.solver = SOLVERS[found.solver.toLowerCase()] ?? found.solver.toLowerCase();
  return found;
}
