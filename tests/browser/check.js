/* Runs in the page: takes each step of steps.json and posts what came of all of them. */

import { decode, toFrame } from "./image.js";
import { open, predict } from "./page.js";

const blob = async (path) => (await fetch(path)).blob();
const status = document.querySelector("#status");

const steps = {
  open: async (path) => (await open(await blob(path))).provider,
  predict: async (path) => {
    const { bitmap, heatmaps, ...rest } = await predict(await blob(path));
    return { ...rest, heatmaps: heatmaps.map(({ data }) => [...data]), size: [bitmap.width, bitmap.height] };
  },
  frame: async (path, preprocess) => [...toFrame(await decode(await blob(path)), preprocess).frame],
  // What a user does: the line that the page says in the end.
  choose: async (path, input, expected) => {
    const files = new DataTransfer();
    files.items.add(new File([await blob(path)], path.split("/").at(-1)));
    status.textContent = status.className = "";
    document.querySelector(input).files = files.files;
    document.querySelector(input).dispatchEvent(new Event("change"));
    return said(expected);
  },
  click: async (selector, expected) => {
    status.textContent = status.className = "";
    document.querySelector(selector).click();
    return said(expected);
  },
  said,
  evaluate: (expression) => eval(expression), // with this module's names
};

async function said(expected) {
  while (!status.className && !status.textContent.match(expected)) await new Promise((done) => setTimeout(done, 20));
  return status.textContent;
}

const report = [];
for (const [step, ...given] of await (await fetch("/files/steps.json")).json())
  try {
    report.push(await steps[step](...given));
  } catch (error) {
    report.push({ error: error.message });
  }
await fetch("/report", { method: "POST", body: JSON.stringify(report) });
