/* A prediction drawn: the likeliest classes, boxes in the image, what each expert saw and why (runtime's draw.py). */

// Okabe and Ito, "Color Universal Design" (2008): told apart by all kinds of color vision.
const EXPERTS = ["#0072b2", "#e69f00", "#cc79a7", "#009e73", "#56b4e9", "#d55e00"];
// Dark blue to yellow through red, lightness rising evenly (after "inferno", Smith and van der Walt, 2015).
const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const LONGEST = 800; // pixels of the image's longer side
const SIDE = 196; // pixels of what an expert saw
const TOP = 5; // classes

const $ = (selector) => document.querySelector(selector);

export function draw(prediction) {
  const { bitmap, boxes, classes, heatmaps } = prediction;
  $("#prediction").hidden = false;
  $("#classes").replaceChildren(
    ...classes.slice(0, TOP).flatMap(({ name, probability }) => [
      element("span", { textContent: name }),
      element("span", { textContent: `${(100 * probability).toFixed(1)}%` }),
      element("meter", { value: probability, ariaLabel: name }),
    ]),
  );
  drawBoxes($("#image"), bitmap, boxes);
  $("#experts").replaceChildren(
    ...boxes.map((box, k) => {
      const figure = element("figure");
      const caption = element("figcaption", { textContent: `expert ${k + 1}` });
      caption.style.borderColor = EXPERTS[k % EXPERTS.length];
      const views = [seen(bitmap, box), heated(seen(bitmap, box), heatmaps[k])];
      views.forEach((view, i) => Object.assign(view, { role: "img", ariaLabel: ["what it saw", "its heat map"][i] }));
      figure.append(caption, ...views);
      return figure;
    }),
  );
  bitmap.close();
}

/** The image, and on it the box of each expert but the first, inner ones with finer lines so that equal ones show. */
function drawBoxes(canvas, bitmap, boxes) {
  const scale = LONGEST / Math.max(bitmap.width, bitmap.height);
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  boxes.slice(1).forEach((box, index) => {
    const [x0, y0, x1, y1] = box.map((edge) => edge * scale);
    context.lineWidth = 4 + 3 * (boxes.length - 2 - index);
    context.strokeStyle = EXPERTS[(index + 1) % EXPERTS.length];
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  });
}

/** What an expert saw, stretched to a square as it saw it. */
function seen(bitmap, [x0, y0, x1, y1]) {
  const canvas = element("canvas", { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(bitmap, x0, y0, x1 - x0, y1 - y0, 0, 0, SIDE, SIDE);
  return canvas;
}

/** A heat map of any range over a grayed image, corners on corners as the chain enlarges it. */
function heated(canvas, { data, width, height }) {
  const [low, high] = [Math.min(...data), Math.max(...data)];
  const cells = new ImageData(width, height);
  data.forEach((value, cell) => {
    const heat = high > low ? (value - low) / (high - low) : 0;
    const level = Math.min(Math.floor(heat * (HEAT.length - 1)), HEAT.length - 2);
    const part = heat * (HEAT.length - 1) - level;
    const color = HEAT[level].map((channel, i) => channel + part * (HEAT[level + 1][i] - channel));
    cells.data.set([...color, 255 * (0.35 + 0.35 * heat)], 4 * cell);
  });
  const small = new OffscreenCanvas(width, height);
  small.getContext("2d").putImageData(cells, 0, 0);
  const context = canvas.getContext("2d");
  context.filter = "grayscale(1)";
  context.drawImage(canvas, 0, 0);
  context.filter = "none";
  context.drawImage(small, 0.5, 0.5, width - 1, height - 1, 0, 0, SIDE, SIDE); // from centers to centers of cells
  return canvas;
}

const element = (name, properties = {}) => Object.assign(document.createElement(name), properties);
