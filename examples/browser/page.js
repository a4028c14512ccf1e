/* The page: a bundle, then images or a camera; each prediction is drawn with what its experts saw. */

import { readBundle } from "./bundle.js";
import { MAX_PIXELS, tooLarge } from "./image.js";
import { draw } from "./draw.js";

const OPENING = 120; // seconds; the library alone is 14 MB, 27 with WebGPU
const PREDICTING = 30; // seconds

const $ = (selector) => document.querySelector(selector);
const video = $("video");
let worker; // with the bundle that is open
let last = Promise.resolve(); // what was asked of the worker before; it does one thing at a time

/** Open a bundle, a Blob, in place of the one before; resolves to what the worker says of it. */
export async function open(blob) {
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
}

/** Predict a Blob or an ImageBitmap; an image file's size is looked at before its pixels are decoded. */
export async function predict(image) {
  if (image instanceof Blob) await checkSize(image);
  const prediction = last.then(() => {
    if (!worker) throw new Error("there is no bundle: choose one first");
    return ask(worker, { image }, image instanceof Blob ? [] : [image], PREDICTING);
  });
  last = prediction.catch(() => {});
  return prediction;
}

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

async function checkSize(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(new Error("it is damaged, or no image that this browser decodes"));
    });
    const { naturalWidth: width, naturalHeight: height } = image;
    if (width * height > MAX_PIXELS) throw new Error(tooLarge(width, height));
  } finally {
    URL.revokeObjectURL(image.src);
  }
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

const openFile = (name, blob) =>
  trying(name, async () => {
    say(`opening ${name}`);
    const { provider, manifest } = await open(blob);
    say(`${name}: ${manifest.class_names.length} classes, ${manifest.graphs.length} graphs on ${provider}`);
  });

async function watch() {
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  await video.play();
  while (video.srcObject) await show(await createImageBitmap(video)); // the newest frame each time
}

function stop() {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

$("#bundle").onchange = ({ target: { files } }) => files[0] && openFile(files[0].name, files[0]);
$("#file").onchange = ({ target: { files } }) => files[0] && trying(files[0].name, () => show(files[0]));
$("#camera").onclick = () => (video.srcObject ? stop() : trying("the camera", watch).finally(stop));

// ?bundle=ADDRESS opens a bundle that is served beside the page.
const address = new URLSearchParams(location.search).get("bundle");
export const opened = address && trying(address, fetched);

async function fetched() {
  const response = await fetch(address, { signal: AbortSignal.timeout(OPENING * 1e3) });
  if (!response.ok) throw new Error(`the server says ${response.status}`);
  await openFile(address, await response.blob());
}
