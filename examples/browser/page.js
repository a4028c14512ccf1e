/* The page: a bundle, then images or a camera; each prediction is drawn with what its experts saw. */

import { checkSize, readBundle } from "./bundle.js";
import { checkImage } from "./image.js";
import { draw } from "./draw.js";

const OPENING = 120; // seconds; the library alone is 14 MB, 27 with WebGPU
const PREDICTING = 30; // seconds

const $ = (selector) => document.querySelector(selector);
const video = $("video");
let worker; // with the bundle that is open
let last = Promise.resolve(); // what was asked for before
let camera; // its stream while it is on

/** Act when all that was asked for before is done: bundles and predictions come in the order they were chosen. */
function queued(action) {
  const done = last.then(action);
  last = done.catch(() => {});
  return done;
}

/** Open a bundle, a Blob, in place of the one before; resolves to what the worker says of it. */
export const open = (blob) =>
  queued(async () => {
    const bundle = await readBundle(blob);
    const opening = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    try {
      const opened = await ask(opening, { bundle }, [bundle], OPENING);
      worker?.terminate();
      worker = opening;
      return opened;
    } catch (error) {
      opening.terminate();
      throw error;
    }
  });

/** Predict a Blob or an ImageBitmap; an image file's size is looked at before its pixels are decoded. */
export const predict = (image) =>
  queued(async () => {
    if (image instanceof Blob) await checkImage(image);
    if (!worker) throw new Error("there is no bundle: choose one first");
    return ask(worker, { image }, image instanceof Blob ? [] : [image], PREDICTING);
  });

/** Send a worker one message; one that says nothing in time is ended. */
function ask(asked, message, transferred, seconds) {
  return new Promise((resolve, reject) => {
    const fail = (reason) => {
      asked.terminate();
      if (worker === asked) worker = undefined;
      reject(new Error(reason));
    };
    const timer = setTimeout(fail, seconds * 1e3, `nothing came of it in ${seconds} seconds`);
    asked.onerror = ({ message }) => fail(message ?? "its scripts could not be loaded");
    asked.onmessage = ({ data: { result, error } }) => {
      clearTimeout(timer);
      if (error) reject(new Error(error));
      else resolve(result);
    };
    asked.postMessage(message, transferred);
  });
}

function say(text, isError = false) {
  $("#status").textContent = text;
  $("#status").className = isError ? "error" : "";
}

/** Show what goes wrong in one line, beginning with what was tried. */
async function trying(what, action) {
  try {
    await action();
  } catch (error) {
    $("#prediction").hidden = true; // what is there is of something else
    say(`cannot use ${what}: ${error.message}`, true);
  }
}

async function show(image) {
  const prediction = await predict(image);
  draw(prediction);
  const { decode, resize, chain } = prediction.milliseconds;
  say(
    `${prediction.graphs} graphs ran in ${chain.toFixed(0)} ms; ` +
      `decoding ${decode.toFixed(0)} ms, resizing ${resize.toFixed(0)} ms`,
  );
}

async function openBundle(name, blob) {
  say(`opening ${name}`);
  const { provider, manifest } = await open(blob);
  say(`${name}: ${manifest.class_names.length} classes, ${manifest.graphs.length} graphs on ${provider}`);
}

/** Predict frame after frame until somebody ends it, here or in the browser's permissions. */
async function watch() {
  if (!navigator.mediaDevices) throw new Error("browsers lend it on localhost and over HTTPS alone");
  $("#camera").disabled = true; // a second click would ask for a second stream
  const asked = navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const stream = await asked.finally(() => ($("#camera").disabled = false));
  camera = video.srcObject = stream;
  $("#camera").textContent = "stop";
  try {
    await video.play();
    while (stream.active) {
      const frame = await createImageBitmap(video); // the newest each time
      if (stream.active) await show(frame);
    }
    if (camera === stream) throw new Error("it was unplugged or taken away");
  } finally {
    if (camera === stream) stop();
  }
}

function stop() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = undefined;
  $("#camera").textContent = "camera";
}

function onFile(selector, action) {
  $(selector).onclick = ({ target }) => (target.value = ""); // so that the same file may be chosen again
  $(selector).onchange = ({ target: { files } }) => files[0] && trying(files[0].name, () => action(files[0]));
}

onFile("#bundle", (file) => openBundle(file.name, file));
onFile("#file", (file) => {
  stop();
  say(`predicting ${file.name}`);
  return show(file);
});
$("#camera").onclick = () => (camera ? stop() : trying("the camera", watch));

// ?bundle=ADDRESS opens a bundle that is served beside the page.
const address = new URLSearchParams(location.search).get("bundle");
if (address) trying(address, fetched);

async function fetched() {
  const response = await fetch(address, { signal: AbortSignal.timeout(OPENING * 1e3) });
  if (!response.ok) throw new Error(`the server says ${response.status}`);
  checkSize(response.headers.get("content-length"));
  await openBundle(address, await response.blob());
}
