// The gallery: runs with their images, newest first, kept in IndexedDB; the lightbox.
//
// A run: id (ms), settings (as the form reads them), inputs {image, mask, control: Blob}, notes
// (texts), images [{blob, seed, index, parameters}].

import { $, announce, h, say } from "./dom.js";

const KEEP = 200; // runs
const runs = []; // newest first
let actions = {}; // what the form does with a run: reuse, vary, edit, repaint
let shown = null; // [run, number of the image] in the lightbox

const database = new Promise((resolve) => {
  const request = indexedDB.open("pixart_jax", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("runs", { keyPath: "id" });
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => resolve(null); // a private window: the gallery lasts as long as the page
});

async function store(use) {
  const open = await database;
  if (!open) return [];
  return new Promise((resolve, reject) => {
    const request = use(open.transaction("runs", "readwrite").objectStore("runs"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function openGallery(what) {
  actions = what;
  for (const run of await store((kept) => kept.getAll())) {
    runs.unshift(run);
    $("runs").prepend(article(run));
  }
  settle();
}

const settle = () => {
  $("empty").hidden = $("runs").childElementCount > 0;
  $("kept").hidden = !runs.length;
};

async function keep(run) {
  const { node, ...record } = run;
  try {
    await store((kept) => kept.put({ ...record, images: run.images.map(({ url, ...image }) => image) }));
    for (const old of runs.slice(KEEP)) drop(old);
  } catch {
    run.notes.push("The browser has no room to keep these images: download them before you close the page.");
    article(run);
  }
}

function drop(run) {
  run.node.remove();
  for (const image of run.images) URL.revokeObjectURL(image.url);
  if (runs.includes(run)) runs.splice(runs.indexOf(run), 1);
  settle();
  return store((kept) => kept.delete(run.id));
}

/** What a run was made with, in a line. */
function summary({ size, seed, n, steps, guidance, solver, strength, lora }, { mask, control }) {
  const parts = [size.replace("x", " × "), n > 1 ? `${n} images from seed ${seed}` : `seed ${seed}`,
    `${steps} steps`, `guidance ${guidance}`, solver];
  if (strength) parts.push(`${mask ? "repainted" : "from an image"}, strength ${strength}`);
  if (control) parts.push("following edges");
  for (const { name, weight } of lora ?? []) parts.push(`${name} ${weight}`);
  return parts.join(" · ");
}

const pixelated = ({ size }) => (Math.max(...size.split("x")) <= 128 ? " pixels" : "");

function article(run, ...body) {
  const act = (text, what) => h("button", { type: "button", className: "quiet", textContent: text, onclick: what });
  const { prompt, negative_prompt: negative } = run.settings;
  const [width, height] = run.settings.size.split("x");
  const tiles = run.images.map((image, n) => {
    image.url ??= URL.createObjectURL(image.blob);
    const picture = h("img", { src: image.url, alt: prompt, loading: "lazy", width, height });
    return h("button", { type: "button", className: `tile${pixelated(run.settings)}`, onclick: () => look(run, n),
      "aria-label": `Open image ${n + 1} of ${run.images.length}: ${prompt}` }, picture);
  });
  const node = h("article", {},
    h("div", { className: "about" },
      h("p", { className: "prompt" }, prompt || h("i", {}, "No prompt")),
      negative ? h("p", { className: "hint" }, `Without: ${negative}`) : null,
      h("p", { className: "hint" }, summary(run.settings, run.inputs)),
      ...run.notes.map((note) => h("p", { className: "note" }, note)),
      run.images.length ? h("div", { className: "row" },
        act("Reuse settings", () => actions.reuse(run)),
        act("Vary the seed", () => actions.vary(run)),
        act("Delete", () => drop(run))) : null),
    h("div", { className: "content" }, ...body, tiles.length ? h("div", { className: "tiles" }, ...tiles) : null));
  run.node?.replaceWith(node);
  return (run.node = node);
}

/** A run in progress, at the head of the gallery. */
export function beginRun(run) {
  const bar = h("progress", { "aria-label": "Progress" }), state = h("span", {}, "Sending");
  const [width, height] = run.settings.size.split("x");
  const frames = Array.from({ length: run.settings.n }, () =>
    h("div", { className: "tile pending" }, h("img", { alt: "", width, height })));
  $("runs").prepend(article(run, h("p", { className: "progress" }, state, bar),
    h("div", { className: "tiles" }, ...frames)));
  if (matchMedia("(max-width: 860px)").matches) run.node.scrollIntoView();
  settle();
  let before = "";
  const set = (text, value) => {
    state.textContent = text;
    if (value === undefined) bar.removeAttribute("value");
    else bar.value = value;
  };
  const picture = (index, blob) => {
    const image = frames[index]?.firstChild;
    if (!image) return;
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
  };
  return {
    progress({ state: phase, position, step, steps }) {
      if (phase === "running") {
        set(`Step ${step} of ${steps}`, step / steps);
        document.title = `${step}/${steps} · pixart_jax`;
      } else {
        set(phase === "compiling" ? "Compiling this size, the first time only"
          : position ? `Waiting, ${position} ahead in the queue` : "Next in the queue");
      }
      if (phase !== before) announce(phase === "running" ? "Generating" : state.textContent);
      before = phase;
    },
    preview: picture,
    image(image, number) {
      run.images.push(image);
      picture(number, image.blob);
      frames[number]?.classList.remove("pending");
    },
    done() {
      run.images.sort((a, b) => a.index - b.index);
      article(run);
      runs.unshift(run);
      announce(run.images.length > 1 ? `${run.images.length} images are ready` : "The image is ready");
      settle();
      keep(run);
    },
    /** text: what went wrong, or null to leave no trace. */
    failed(text, again) {
      if (text === null) run.node.remove();
      else {
        article(run, h("p", { className: "error", role: "alert" }, text), h("div", { className: "row" },
          h("button", { type: "button", textContent: "Try again", onclick: () => { run.node.remove(); again(); } }),
          h("button", { type: "button", className: "quiet", textContent: "Dismiss", onclick: () => { run.node.remove(); settle(); } })));
      }
      settle();
    },
  };
}

// ---- lightbox ----

function look(run, n) {
  shown = [run, n];
  const image = run.images[n], { settings } = run;
  const large = $("large");
  large.src = image.url;
  large.alt = settings.prompt;
  large.className = pixelated(settings);
  const most = 8 * Math.max(...settings.size.split("x")); // no further than squares of 8 px
  large.style.maxWidth = large.style.maxHeight = `min(${most}px, 100%)`;
  say($("large-prompt"), settings.prompt || "No prompt");
  say($("done"), "");
  const { width, height, index, ...other } = image.parameters ?? {};
  const facts = { ...settings, size: settings.size.replace("x", " × "), seed: image.seed, ...other };
  for (const name of ["prompt", "n"]) delete facts[name];
  const text = (value) => (Array.isArray(value) && value[0]?.name
    ? value.map((part) => `${part.name} ${part.weight}`).join(", ") : String(value));
  $("facts").replaceChildren(...Object.entries(facts)
    .filter(([, value]) => value !== "" && value !== null && value !== undefined && String(value) !== "")
    .flatMap(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, text(value))]));
  const name = `${settings.prompt.toLowerCase().match(/[a-z0-9]+/g)?.slice(0, 8).join("-") ?? "image"}-${image.seed}-${image.index}.png`;
  const close = (action) => () => { $("lightbox").close(); action(run, image); };
  const act = (label, onclick, className = "") => h("button", { type: "button", textContent: label, onclick, className });
  const copy = (label, what) => act(label, () => what().then(
    () => say($("done"), "Copied."), () => say($("done"), "The browser did not allow the copy.")));
  $("actions").replaceChildren(
    h("a", { className: "button primary", href: image.url, download: name }, "Download"),
    act("Reuse settings", close(actions.reuse)), act("Vary the seed", close(actions.vary)),
    act("Start from this", close(actions.edit)), act("Repaint a part", close(actions.repaint)),
    ...(navigator.clipboard ? [
      copy("Copy image", () => navigator.clipboard.write([new ClipboardItem({ "image/png": image.blob })])),
      copy("Copy settings", () => navigator.clipboard.writeText(
        JSON.stringify(image.parameters ?? settings, null, 1)))] : []),
    act("Delete", () => remove(run, n), "quiet"));
  $("previous").disabled = !beside(-1);
  $("next").disabled = !beside(1);
  if (!$("lightbox").open) $("lightbox").showModal();
}

function beside(step) {
  const all = runs.flatMap((run) => run.images.map((_, n) => [run, n]));
  return all[all.findIndex(([run, n]) => run === shown[0] && n === shown[1]) + step];
}

function remove(run, n) {
  const next = beside(1) ?? beside(-1);
  if (run.images.length === 1) drop(run);
  else {
    URL.revokeObjectURL(run.images.splice(n, 1)[0].url);
    article(run);
    keep(run);
  }
  if (!next) return $("lightbox").close();
  look(next[0], next[0] === run && next[1] > n ? next[1] - 1 : next[1]);
}

const turn = (step) => { const other = beside(step); if (other) look(...other); };
$("previous").onclick = () => turn(-1);
$("next").onclick = () => turn(1);
$("lightbox-close").onclick = () => $("lightbox").close();
$("lightbox").onclick = (event) => { if (event.target === $("lightbox")) $("lightbox").close(); };
$("lightbox").onkeydown = ({ key }) => { if (key === "ArrowLeft") turn(-1); else if (key === "ArrowRight") turn(1); };
$("clear").onclick = async () => {
  if (!confirm("Delete all images of this gallery? Images you have downloaded stay.")) return;
  for (const run of [...runs]) await drop(run);
};
