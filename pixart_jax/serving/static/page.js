// The form: what the server offers, reading and restoring settings, generating.

import { ApiError, call, events, post } from "./api.js";
import { $, announce, h, parse, say } from "./dom.js";
import { maskFile, maskOf, overlay, paint } from "./painter.js";
import { beginRun, openGallery } from "./runs.js";
import { settingsOf } from "./settings.js";

const STYLES = { // added to the prompt, to the negative prompt
  None: ["", ""],
  Photograph: ["photograph, natural light, 35 mm lens, fine detail", "drawing, painting, illustration"],
  "Film still": ["still from a film, shallow depth of field, muted colours, film grain", "cartoon, low contrast"],
  Illustration: ["editorial illustration, flat shapes, limited palette, clean outlines", "photograph, noise"],
  "Oil painting": ["oil painting, visible brush strokes, canvas texture, warm light", "photograph, 3D render"],
  Watercolour: ["watercolour, soft edges, paper texture, light washes", "photograph, hard outlines"],
  Ink: ["ink drawing, black lines on white paper, hatching", "colour, photograph"],
  Anime: ["anime key visual, cel shading, bright colours", "photograph, realism"],
  "3D render": ["3D render, soft global illumination, physically based materials", "sketch, grain"],
  "Pixel art": ["pixel art, 16-bit console, small palette, sharp pixels", "smooth shading, blur"],
  "Low poly": ["low poly model, large facets, simple materials, studio light", "texture, noise"],
};
const RATIOS = ["1:1", "4:3", "3:2", "16:9", "3:4", "2:3", "9:16"];
const EXAMPLES = {
  true: ["a large red star left of a small blue circle", "two green triangles on a sand ground", "a yellow ring above a purple square"],
  false: ["a lighthouse on a cliff in heavy rain, evening", "a bowl of ripe figs on a linen cloth, window light", "a paper boat crossing a wet street"],
};
const FIELDS = { num_inference_steps: "steps", guidance_scale: "guidance", negative_prompt: "negative", mask: "image", lora: "solver" };
const LAST_SEED = 2n ** 64n - 1n;

let offer = {}; // the model's entry of /v1/models
let running = null; // the AbortController of the run in progress
let source = { image: null, bitmap: null, mask: null, control: null }; // Blob, ImageBitmap, canvas, Blob

const ratio = (size) => { const [width, height] = size.split(/[x:]/); return width / height; };
const nearest = (sizes, wanted) => sizes.reduce((best, size) =>
  (Math.abs(Math.log(ratio(size) / wanted)) < Math.abs(Math.log(ratio(best) / wanted)) ? size : best));
const option = (value, text = value) => h("option", { value, textContent: text });
const dice = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; };
const notice = (text, ...more) => say($("notice"), text, ...more);

// ---- what the server offers ----

async function start() {
  $("style").append(...Object.keys(STYLES).map((name) => option(name)));
  $("shortcut").textContent = /Mac|iP/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
  dice();
  await openGallery({ reuse, vary: async (run, image) => { await reuse(run, image); dice(); submit(); },
    edit: (run, image) => setImage(image.blob, ratio(run.settings.size)),
    repaint: async (run, image) => { await setImage(image.blob, ratio(run.settings.size)); repaint(); } });
  try {
    await ready();
    offer = parse(await (await call("v1/models")).text()).data[0];
  } catch (error) {
    $("status").textContent = "";
    return notice(error.message, h("button", { type: "button", textContent: "Reload", onclick: () => location.reload() }));
  }
  $("model").textContent = offer.id;
  const ratios = RATIOS.map((name) => [name, nearest(offer.sizes, ratio(name))])
    .filter(([name, size]) => Math.abs(Math.log(ratio(size) / ratio(name))) < 0.05);
  $("ratios").hidden = ratios.length < 2;
  $("ratios").append(...ratios.map(([name, size]) => h("button", { type: "button", value: size, textContent: name,
    "aria-pressed": "false", title: size.replace("x", " × "), onclick: () => setSize(size) })));
  $("size").append(...offer.sizes.map((size) => option(size, size.replace("x", " × "))));
  setSize(offer.default_size);
  $("n").append(...Array.from({ length: offer.max_n }, (_, n) => option(n + 1)));
  $("solver").append(...offer.solvers.map(({ name }) => option(name)));
  $("steps").max = offer.steps.length - 1;
  setSolver(offer.solvers[0].name);
  $("adapters").hidden = !offer.adapters?.length;
  $("adapters").append(...(offer.adapters ?? []).map((name) => {
    const weight = h("input", { type: "number", value: 1, step: 0.05, min: -2, max: 2, "aria-label": `Weight of ${name}`, disabled: true });
    const box = h("input", { type: "checkbox", value: name, onchange: () => { weight.disabled = !box.checked; } });
    return h("div", { className: "adapter" }, h("label", {}, box, name), weight);
  }));
  $("controls").hidden = !offer.controlnets?.length;
  const sample = EXAMPLES[Math.max(...offer.default_size.split("x")) <= 128];
  $("examples").append(...sample.map((text) => h("li", {}, h("button", { type: "button", textContent: text,
    onclick: () => { $("prompt").value = text; recount(); $("prompt").focus(); } }))));
  $("generate").disabled = false;
  recount();
}

async function ready() {
  for (;;) {
    const response = await fetch("readyz").catch(() => { throw new ApiError("The server does not answer. Is it running?"); });
    const { state } = await response.json().catch(() => ({}));
    $("status").className = response.ok ? "ready" : "starting";
    $("status").textContent = response.ok ? "Ready" : { draining: "Shutting down" }[state] ?? `Starting: ${state ?? "loading"}`;
    if (response.ok || state === "compiling") { // the model is open, requests wait in the queue
      if (!response.ok) setTimeout(() => ready().catch(() => {}), 2000);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

function setSize(size) {
  $("size").value = size;
  for (const button of $("ratios").children) button.ariaPressed = String(button.value === size);
}

function setSolver(name) {
  $("solver").value = name;
  const { steps, guidance } = offer.solvers.find((solver) => solver.name === name);
  setSteps(steps);
  setRange("guidance", guidance);
}

function setSteps(steps) {
  $("steps").value = Math.max(0, offer.steps.indexOf(steps));
  $("steps").oninput();
}

function setRange(id, value) { // to any value: the slider's steps are for the hand
  const slider = $(id);
  slider.step = slider.dataset.step ??= slider.step;
  slider.max = Math.max(slider.max, value);
  slider.value = value;
  if (Number(slider.value) !== value) slider.step = "any";
  slider.value = value;
  slider.oninput();
}

for (const id of ["steps", "guidance", "strength", "control-scale"]) {
  $(id).oninput = () => {
    const value = id === "steps" ? offer.steps[$(id).value] : Number($(id).value);
    $(`${id}-value`).textContent = value;
    $(id).ariaValueText = String(value);
  };
}
for (const id of ["strength", "control-scale"]) $(id).oninput();

// ---- reading and restoring settings ----

const joined = (text, added) => [text.trim(), added].filter(Boolean).join(", ");

function read() {
  const [added, without] = STYLES[$("style").value];
  const boxes = [...$("adapters").querySelectorAll("input:checked")];
  return {
    prompt: joined($("prompt").value, added), negative_prompt: joined($("negative").value, without),
    size: $("size").value, seed: $("seed").value.trim(), n: Number($("n").value), solver: $("solver").value,
    steps: offer.steps[$("steps").value], guidance: Number($("guidance").value),
    ...(source.image && { strength: Number($("strength").value) }),
    ...(boxes.length && { lora: boxes.map((box) => ({ name: box.value,
      weight: Number(box.closest("div").querySelector("[type=number]").value) })) }),
    ...(source.control && { control_scale: Number($("control-scale").value),
      ...($("control-from").value && { control_from: $("control-from").value }) }),
  };
}

/** Put settings into the form; the names and values of those that this server does not offer. */
function apply({ prompt, negative_prompt, size, width, height, seed, index, n, solver, steps, guidance, strength, lora, control_scale, control_from, ...other }) {
  const left = Object.keys(other);
  const choose = (name, value, offered, set) => {
    if (value === undefined || value === null) return;
    if (offered.includes(value)) set(value);
    else left.push(`${name} ${value}`);
  };
  $("style").value = "None";
  $("prompt").value = prompt ?? "";
  $("negative").value = negative_prompt ?? "";
  choose("size", size ?? (width && height ? `${width}x${height}` : null), offer.sizes, setSize);
  choose("solver", solver, offer.solvers.map(({ name }) => name), setSolver);
  choose("steps", steps, offer.steps, setSteps);
  if (guidance >= 1) setRange("guidance", guidance);
  choose("strength", strength, offer.strengths, (value) => setRange("strength", value));
  if (seed !== undefined) $("seed").value = seed;
  delete $("seed").dataset.used; // the next image is to be this one
  if (index > 0) left.push(`index ${index}`); // of a prompt file: noise that the API does not make
  choose("images", n ?? 1, Array.from({ length: offer.max_n }, (_, k) => k + 1), (value) => { $("n").value = value; });
  setRange("control-scale", control_scale ?? 1);
  $("control-from").value = control_from ?? "";
  const wanted = Array.isArray(lora) ? lora : [];
  for (const box of $("adapters").querySelectorAll("[type=checkbox]")) {
    const one = wanted.find(({ name }) => name === box.value);
    box.checked = Boolean(one);
    box.onchange();
    if (one) box.closest("div").querySelector("[type=number]").value = one.weight;
  }
  left.push(...wanted.filter(({ name }) => !offer.adapters?.includes(name)).map(({ name }) => `LoRA ${name}`));
  say($("style-text"), "");
  wrong();
  resize();
  recount();
  return left;
}

/** The settings and inputs of a run, or of one of its images. */
async function reuse(run, image) {
  await setImage(run.inputs.image ?? null);
  if (run.inputs.mask) setMask(await maskOf(run.inputs.mask));
  await setControl(run.inputs.control ?? null);
  apply(image ? { ...run.settings, seed: image.seed, n: 1 } : run.settings);
  $("prompt").focus();
}

async function restore(file) {
  const use = h("button", { type: "button", textContent: "Use as the input image", onclick: () => { notice(""); setImage(file); } });
  const found = await settingsOf(file);
  if (!found) return notice(`${file.name} holds no settings.`, use);
  // what describes the file, not the request
  const { model, model_hash, dtype, times, text_encoder, null: _, image, image_hash, mask, mask_hash, edit, control, control_hash, controlnet, controlnet_hash, ...settings } = found;
  const left = apply(settings);
  const texts = [`Restored the settings of ${file.name}.`];
  if (model && model !== offer.id) texts.push(`It was made with ${model}.`);
  if (left.length) texts.push(`Not applied: ${left.join(", ")}.`);
  notice(texts.join(" "), use);
}

// ---- input images ----

async function setImage(blob, shape) {
  wrong();
  if (blob) {
    try {
      source.bitmap = await createImageBitmap(blob);
    } catch {
      return wrong("image", "This file is no image that the browser can open: choose a PNG, JPEG or WebP.");
    }
    setSize(nearest(offer.sizes, shape ?? source.bitmap.width / source.bitmap.height));
  }
  source.image = blob;
  setMask(null);
  $("image-drop").hidden = Boolean(blob);
  $("image-chosen").hidden = $("strength-field").hidden = !blob;
}

function setMask(mask) {
  source.mask = mask;
  setRange("strength", mask ? 1 : 0.6);
  $("paint").textContent = mask ? "Change the mask" : "Paint a mask";
  $("unpaint").hidden = !mask;
  if (!source.image) return;
  const preview = $("image-preview");
  [preview.width, preview.height] = [source.bitmap.width, source.bitmap.height];
  overlay(preview.getContext("2d"), source.bitmap, mask);
}

const repaint = async () => setMask(await paint(source.bitmap, source.mask));

async function setControl(blob) {
  wrong();
  source.control = blob;
  URL.revokeObjectURL($("control-preview").src);
  if (blob) $("control-preview").src = URL.createObjectURL(blob);
  $("control-drop").hidden = Boolean(blob);
  $("control-chosen").hidden = $("control-field").hidden = !blob;
}

// ---- generating ----

/** Show an error beside a field; without arguments, none. */
function wrong(id, text) {
  for (const node of $("form").querySelectorAll(".error")) say(node, "");
  for (const node of $("form").querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
  if (!id) return;
  say($(`e-${id}`), text);
  $(id).setAttribute("aria-invalid", "true");
  $(id).focus();
}

function body(settings, inputs) {
  const { steps, guidance, ...same } = settings;
  const fields = { ...same, num_inference_steps: steps, guidance_scale: guidance, stream: true, partial_images: 3, progress: true };
  if (!inputs.image && !inputs.control) return ["v1/images/generations", fields];
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  for (const [name, blob] of Object.entries(inputs)) if (blob) form.append(name, blob, `${name}.png`);
  return ["v1/images/edits", form];
}

const png = (base64) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });

async function submit() {
  if (running || !offer.id) return;
  wrong();
  notice("");
  if (!$("lock").classList.contains("on") && $("seed").dataset.used === $("seed").value) dice();
  const settings = read();
  if (!/^\d{1,20}$/.test(settings.seed) || BigInt(settings.seed) > LAST_SEED) {
    return wrong("seed", `A whole number from 0 to ${LAST_SEED} is needed.`);
  }
  if (!settings.prompt) return wrong("prompt", "Describe the image first.");
  $("seed").dataset.used = settings.seed;
  const inputs = { ...(source.image && { image: source.image }), ...(source.mask && { mask: await maskFile(source.mask) }),
    ...(source.control && { control: source.control }) };
  await generate({ id: Date.now(), settings, inputs, notes: [], images: [] });
}

async function generate(run) {
  const view = beginRun(run);
  running = new AbortController();
  button(true);
  try {
    const response = await post(...body(run.settings, run.inputs), { signal: running.signal });
    for await (const event of events(response)) {
      const kind = event.type.split(".")[1], number = event.index ?? event.image_index ?? run.images.length;
      if (kind === "progress") view.progress(event);
      if (kind === "partial_image") view.preview(number, png(event.b64_json));
      if (kind !== "completed") continue;
      view.image({ blob: png(event.b64_json), seed: event.seed ?? run.settings.seed, index: number, parameters: event.parameters }, number);
      if (event.prompt_truncated) run.notes = [`The model reads ${offer.max_prompt_tokens} tokens. Not used: ${event.prompt_truncated}`];
    }
    if (!run.images.length) throw new ApiError("The server closed the connection before the image was ready.");
    view.done();
  } catch (error) {
    const field = FIELDS[error.param] ?? error.param;
    if (error.name === "AbortError") announce("Cancelled");
    else if (!(error instanceof ApiError) && error.name !== "TypeError") throw error;
    if (error.name === "AbortError") view.failed(null);
    else if (field && $(`e-${field}`)) {
      view.failed(null);
      wrong(field, error.message);
    } else {
      const text = error instanceof ApiError ? error.message : "The connection was lost before the image was ready.";
      view.failed(text, () => generate({ ...run, id: Date.now(), notes: [], images: [], node: undefined }));
    }
  } finally {
    running = null;
    document.title = "pixart_jax";
    button(false);
  }
}

function button(busy) {
  const node = $("generate");
  node.textContent = busy ? "Cancel" : "Generate";
  node.type = busy ? "button" : "submit"; // so that Enter in a field does not cancel
  node.classList.toggle("primary", !busy);
}

let waiting = null;
function recount() { // tokens of the prompt, as the model will read it
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const prompt = read().prompt;
    try {
      const { count: tokens, limit, lost } = await (await post("v1/tokens", { prompt })).json();
      if (prompt !== read().prompt) return;
      $("tokens").textContent = `${tokens} of ${limit} tokens`;
      say($("lost"), lost.length ? `Too long, not used: ${lost.join(" ")}` : "");
    } catch {
      say($("lost"), "");
    }
  }, 250);
}

// ---- events ----

function resize() {
  for (const area of [$("prompt"), $("negative")]) {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  }
}

$("form").onsubmit = (event) => { event.preventDefault(); submit(); };
$("form").onkeydown = (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  submit();
};
$("generate").onclick = (event) => {
  if (!running) return;
  event.preventDefault(); // the button is one to submit again before this click is over
  running.abort();
};
for (const area of [$("prompt"), $("negative")]) area.oninput = () => { recount(); resize(); };
$("style").onchange = () => {
  const [added, without] = STYLES[$("style").value];
  say($("style-text"), added && `Adds “${added}”; without “${without}”.`);
  recount();
};
$("size").onchange = () => setSize($("size").value);
$("solver").onchange = () => setSolver($("solver").value);
$("dice").onclick = dice;
$("lock").onclick = () => {
  const on = $("lock").classList.toggle("on");
  $("lock").ariaPressed = String(on);
  $("lock").querySelector("use").setAttribute("href", on ? "#i-lock" : "#i-unlock");
};
$("paint").onclick = repaint;
$("unpaint").onclick = () => setMask(null);
$("image-remove").onclick = () => setImage(null);
$("control-remove").onclick = () => setControl(null);
for (const [id, use] of [["restore", restore], ["image", setImage], ["control", setControl]]) {
  $(id).onchange = () => { const [file] = $(id).files; $(id).value = ""; if (file) use(file); };
}

const carries = (event) => [...event.dataTransfer.types].includes("Files");
document.ondragover = (event) => { if (carries(event)) { event.preventDefault(); $("shade").hidden = Boolean(event.target.closest(".drop")); } };
document.ondragleave = (event) => { if (!event.relatedTarget) $("shade").hidden = true; };
document.ondrop = (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  $("shade").hidden = true;
  const [file] = event.dataTransfer.files, zone = event.target.closest(".drop")?.id;
  if (file) ({ "image-drop": setImage, "control-drop": setControl }[zone] ?? restore)(file);
};
document.onpaste = (event) => { const [file] = event.clipboardData.files; if (file) restore(file); };

start();
