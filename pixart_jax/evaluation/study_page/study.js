// Asks the trials of one sheet and hands each vote in. Where no server takes votes, they are kept in
// this browser and offered as a file at the end.
"use strict";

const $ = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "both_bad" };
let rater = "", sheet = 0, server = false, passes = [], begun = null, current = null;
const done = new Set();

// 32 bits of a text: FNV-1a, mixed as in MurmurHash3
function hash(...parts) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(parts.join("\n"))) h = Math.imul(h ^ byte, 0x01000193);
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

function show(id) {
  for (const part of ["start", "pass", "trial", "done"]) $(part).hidden = part !== id;
}

function say(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// ---- votes ----

const stored = () => JSON.parse(localStorage.getItem(`votes ${STUDY.version} ${rater}`) || "[]");

async function ask(path, options = {}) {
  const secret = sessionStorage.getItem("key");
  const headers = { ...(secret ? { Authorization: `Bearer ${secret}` } : {}), ...options.headers };
  return fetch(path, { cache: "no-store", ...options, headers });
}

async function enter() {
  let answer = null;
  if (location.protocol !== "file:") {
    answer = await ask(`v1/votes?rater=${encodeURIComponent(rater)}`).catch(() => null);
    if (!answer) throw Error("The server does not answer. Try again in a moment.");
  }
  if (answer && answer.status === 401) {
    $("locked").hidden = false;
    $("secret").focus();
    throw Error(sessionStorage.getItem("key") ? "This is not the study's key." : "This study needs a key.");
  }
  if (answer && ![200, 404, 405, 501].includes(answer.status)) throw Error(await reason(answer));
  server = Boolean(answer && answer.ok && /json/.test(answer.headers.get("Content-Type")));
  const known = server ? await answer.json() : { sheet: hash(STUDY.version, rater), done: stored().map((v) => v.trial) };
  sheet = known.sheet % STUDY.sheets.length;
  for (const trial of known.done) done.add(trial);
}

async function reason(answer) {
  const text = await answer.text();
  try { return JSON.parse(text).error.message; } catch { return `The server answered ${answer.status}.`; }
}

async function keep(vote) {
  if (!server) {
    localStorage.setItem(`votes ${STUDY.version} ${rater}`, JSON.stringify([...stored(), vote]));
    return;
  }
  const headers = { "Content-Type": "application/json" };
  const answer = await ask("v1/votes", { method: "POST", headers, body: JSON.stringify(vote) });
  if (!answer.ok) throw Error(await reason(answer));
}

// ---- trials ----

// Repeats come in the second half, what they repeat in the first.
function ordered(trials) {
  const repeated = new Set(trials.map((id) => STUDY.trials[id].mirror).filter(Boolean));
  const at = (id) => {
    const place = hash("order", rater, id) / 2 ** 32;
    return STUDY.trials[id].mirror ? 0.5 + place / 2 : repeated.has(id) ? place / 2 : place;
  };
  return [...trials].sort((a, b) => at(a) - at(b));
}

function sides(id) {
  const { images, mirror } = STUDY.trials[id];
  const turned = (hash("side", rater, mirror || id) & 1) !== (mirror ? 1 : 0);
  return turned ? [images[1], images[0]] : images;
}

const source = (image) => `pictures/${image}.png`;

function next() {
  const all = passes.flatMap((pass) => pass.trials);
  const left = all.filter((id) => !done.has(id));
  $("progress").hidden = false;
  $("progress").max = all.length;
  $("progress").value = all.length - left.length;
  $("place").textContent = left.length ? `${all.length - left.length + 1} of ${all.length}` : "";
  if (!left.length) return finish();
  const number = passes.findIndex((pass) => pass.trials.includes(left[0]));
  const pass = passes[number];
  if (pass === begun) return trial(left[0], pass, left[1]);
  $("part").textContent = passes.length > 1 ? `Part ${number + 1} of ${passes.length}` : "The question";
  $("question").textContent = pass.question;
  show("pass");
  $("begin").onclick = () => {
    begun = pass; // its question has been read
    next();
  };
  $("begin").focus();
}

async function trial(id, pass, following) {
  const shown = sides(id);
  current = { id, left: shown[0], since: 0 };
  $("asked").textContent = pass.question;
  $("text").textContent = STUDY.trials[id].text || "";
  $("text").hidden = !STUDY.trials[id].text;
  $("answers").querySelectorAll("button").forEach((button) => (button.disabled = true));
  const pictures = [...$("images").querySelectorAll("img")];
  pictures.forEach((picture, side) => {
    [picture.height, picture.width] = STUDY.sides;
    picture.src = source(shown[side]);
  });
  show("trial");
  try {
    await Promise.all(pictures.map((picture) => picture.decode()));
  } catch {
    if (current.id === id) say("An image could not be loaded. Reload the page to go on.");
    return;
  }
  if (current.id !== id) return;
  current.since = performance.now();
  $("answers").querySelectorAll("button").forEach((button) => (button.disabled = false));
  if (following) for (const image of STUDY.trials[following].images) new Image().src = source(image);
}

async function vote(answer) {
  if (!current || !current.since || $("large").open) return;
  const { id, left, since } = current;
  current.since = 0;
  $("answers").querySelectorAll("button").forEach((button) => (button.disabled = true));
  const ms = Math.round(performance.now() - since);
  try {
    await keep({ trial: id, rater, sheet, left, answer, ms, version: STUDY.version });
  } catch (error) {
    say(`Your answer was not saved: ${error.message} Answer again to retry.`);
    current.since = since;
    $("answers").querySelectorAll("button").forEach((button) => (button.disabled = false));
    return;
  }
  say("");
  done.add(id);
  document.activeElement?.blur();
  next();
}

function finish() {
  current = null;
  $("thanks").textContent = server
    ? "All comparisons are answered and saved. You may close this page."
    : "All comparisons are answered. Please send the file with your answers to those who asked you.";
  if (!server) {
    const lines = stored().map((vote) => JSON.stringify(vote) + "\n");
    $("download").href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    $("download").download = `votes-${rater.replace(/[^A-Za-z0-9_-]+/g, "-")}.jsonl`;
    $("download").hidden = false;
  }
  show("done");
}

// ---- events ----

$("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  rater = $("rater").value.trim();
  say("");
  if (!rater) return say("Enter a name or a code, by which you can continue later.");
  if ($("secret").value) sessionStorage.setItem("key", $("secret").value);
  try {
    await enter();
  } catch (error) {
    return say(error.message);
  }
  passes = STUDY.sheets[sheet].map((pass) => ({ ...pass, trials: ordered(pass.trials) }));
  sessionStorage.setItem("rater", rater);
  next();
});

$("answers").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) vote(button.dataset.answer);
});

document.addEventListener("keydown", (event) => {
  if ($("trial").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS && !$("large").open) {
    event.preventDefault();
    vote(KEYS[event.key]);
  }
});

for (const side of ["left", "right"]) {
  $(`image-${side}`).addEventListener("click", () => {
    const picture = $(`image-${side}`).firstElementChild;
    $("large").firstElementChild.src = picture.src;
    $("large").firstElementChild.alt = picture.alt;
    $("large").showModal();
  });
}
$("large").addEventListener("click", () => $("large").close());

$("rater").value = sessionStorage.getItem("rater") || "";
