// The mask editor: what is painted is generated anew.

import { $ } from "./dom.js";

const PAINT = "#e4572e", UNDO = 20;
const canvas = $("canvas"), context = canvas.getContext("2d");
let image, mask, marks, past, cursor, last;
let scale; // pixels of the canvas a pixel of the image

const copy = (source) => {
  const made = new OffscreenCanvas(source.width, source.height);
  made.getContext("2d").drawImage(source, 0, 0);
  return made;
};

/** image: ImageBitmap; before: an earlier mask or null, returned if the dialog is left. The mask is a
 * canvas whose painted pixels are opaque, null if there are none. */
export async function paint(picture, before) {
  image = picture;
  mask = before ? copy(before) : new OffscreenCanvas(image.width, image.height);
  marks = mask.getContext("2d", { willReadFrequently: true });
  scale = Math.max(1, Math.ceil(640 / Math.max(image.width, image.height)));
  [canvas.width, canvas.height] = [image.width * scale, image.height * scale];
  context.scale(scale, scale);
  context.imageSmoothingEnabled = false;
  past = [];
  cursor = [image.width / 2, image.height / 2];
  tool(true);
  show();
  const dialog = $("painter");
  dialog.returnValue = "";
  dialog.showModal();
  canvas.focus();
  await new Promise((resolve) => { dialog.onclose = resolve; });
  if (dialog.returnValue !== "done") return before;
  return painted(mask) ? mask : null;
}

/** A PNG of a mask as the API takes it: transparent where the image is generated anew. */
export function maskFile(mask) {
  const out = new OffscreenCanvas(mask.width, mask.height), pen = out.getContext("2d");
  pen.fillRect(0, 0, out.width, out.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(hard(mask), 0, 0);
  return out.convertToBlob({ type: "image/png" });
}

/** The mask of such a PNG. */
export async function maskOf(file) {
  const picture = await createImageBitmap(file);
  const made = new OffscreenCanvas(picture.width, picture.height), pen = made.getContext("2d");
  pen.fillStyle = PAINT;
  pen.fillRect(0, 0, made.width, made.height);
  pen.globalCompositeOperation = "destination-out";
  pen.drawImage(picture, 0, 0);
  return made;
}

/** Draw an image with its mask over it. */
export function overlay(pen, picture, over) {
  pen.clearRect(0, 0, picture.width, picture.height);
  pen.drawImage(picture, 0, 0);
  if (!over) return;
  pen.globalAlpha = 0.6;
  pen.drawImage(over, 0, 0);
  pen.globalAlpha = 1;
}

function hard(soft) { // every pixel wholly painted or not at all
  const made = copy(soft), pen = made.getContext("2d");
  const data = pen.getImageData(0, 0, made.width, made.height);
  for (let n = 3; n < data.data.length; n += 4) data.data[n] = data.data[n] < 128 ? 0 : 255;
  pen.putImageData(data, 0, 0);
  return made;
}

function painted(some) {
  const { data } = some.getContext("2d").getImageData(0, 0, some.width, some.height);
  for (let n = 3; n < data.length; n += 4) if (data[n] >= 128) return true;
  return false;
}

const radius = () => Math.max(0.75, (Number($("brush-size").value) / 100) * Math.max(image.width, image.height) / 2);

function show(ring = false) {
  overlay(context, image, mask);
  $("undo").disabled = !past.length;
  if (!ring) return;
  for (const [color, width] of [["#000", 3], ["#fff", 1]]) {
    context.beginPath();
    context.arc(...cursor, radius(), 0, 7);
    context.strokeStyle = color;
    context.lineWidth = width * image.width / canvas.clientWidth;
    context.stroke();
  }
}

function remember() {
  past.push(copy(mask));
  if (past.length > UNDO) past.shift();
}

function stroke(from, to) {
  marks.globalCompositeOperation = $("erase").ariaPressed === "true" ? "destination-out" : "source-over";
  marks.strokeStyle = PAINT;
  marks.lineCap = "round";
  marks.lineWidth = 2 * radius();
  marks.beginPath();
  marks.moveTo(...from);
  marks.lineTo(to[0] + 1e-3, to[1]);
  marks.stroke();
}

function tool(brush) {
  $("brush").ariaPressed = String(brush);
  $("erase").ariaPressed = String(!brush);
}

function whole(operation) { // on every pixel, with the paint's colour
  remember();
  marks.globalCompositeOperation = operation;
  marks.fillStyle = PAINT;
  marks.fillRect(0, 0, mask.width, mask.height);
  show();
}

function undo() {
  if (!past.length) return;
  marks.globalCompositeOperation = "copy";
  marks.drawImage(past.pop(), 0, 0);
  show();
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * image.width, ((event.clientY - box.top) / box.height) * image.height];
}

canvas.onpointerdown = (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = cursor = place(event);
  stroke(last, last);
  show(true);
};
canvas.onpointermove = (event) => {
  cursor = place(event);
  if (last) {
    for (const step of [...(event.getCoalescedEvents?.() ?? []), event]) {
      stroke(last, place(step));
      last = place(step);
    }
  }
  show(true);
};
canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
canvas.onpointerleave = () => { if (!last) show(); };

$("painter").onkeydown = (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") undo();
  else if (event.key === "[") $("brush-size").stepDown(2);
  else if (event.key === "]") $("brush-size").stepUp(2);
  else if (event.target !== canvas) return;
  else if (event.key === " ") {
    remember();
    stroke(cursor, cursor);
  } else if (event.key.startsWith("Arrow")) {
    const by = radius() * { Left: -1, Up: -1, Right: 1, Down: 1 }[event.key.slice(5)];
    const axis = ["ArrowUp", "ArrowDown"].includes(event.key) ? 1 : 0;
    cursor[axis] = Math.min(Math.max(cursor[axis] + by, 0), [image.width, image.height][axis]);
  } else return;
  event.preventDefault();
  show(document.activeElement === canvas);
};
$("brush").onclick = () => tool(true);
$("erase").onclick = () => tool(false);
$("undo").onclick = undo;
$("invert").onclick = () => whole("source-out");
$("wipe").onclick = () => whole("destination-out");
$("painter-cancel").onclick = () => $("painter").close("");
$("painter-done").onclick = () => $("painter").close("done");
