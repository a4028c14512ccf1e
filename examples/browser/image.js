/* From an image to the chain's frame, and boxes in it back to the image: the runtime's decode.py and preprocess.py. */

const MAX_PIXELS = 65e6; // as in the runtime
const MAX_BYTES = 100e6; // of a file

// Upright by EXIF orientation; color profiles are ignored.
const DECODING = { imageOrientation: "from-image", colorSpaceConversion: "none" };

/** Refuse an image file of which too much would be read or decoded; a page alone can tell its size. */
export async function checkImage(blob) {
  if (blob.size > MAX_BYTES) throw new Error(`it has ${blob.size} bytes; expected at most ${MAX_BYTES}`);
  const image = new Image();
  const loaded = new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = reject;
  });
  image.src = URL.createObjectURL(blob);
  try {
    await loaded.catch(undecodable);
    checkPixels(image.naturalWidth, image.naturalHeight);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** A Blob or a camera's ImageBitmap as upright RGBA on white: `{ bitmap, data, width, height }`. */
export async function decode(source) {
  const bitmap = source instanceof ImageBitmap ? source : await createImageBitmap(source, DECODING).catch(undecodable);
  const { width, height } = bitmap;
  checkPixels(width, height);
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false, willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  return { bitmap, data: context.getImageData(0, 0, width, height).data, width, height };
}

function undecodable() {
  throw new Error("it is damaged, cut short, or no image that this browser decodes");
}

function checkPixels(width, height) {
  if (width * height > MAX_PIXELS)
    throw new Error(
      `it is ${width} x ${height} pixels; expected at most ${MAX_PIXELS / 1e6} megapixels: scale it down first`,
    );
}

/**
 * Resize the shorter side to `resize` and crop the center: `{ frame, viewport }`.
 *
 * The frame is uint8 RGB [size, size, 3]; the viewport where it lies in the image, edges [left, top, right, bottom].
 */
export function toFrame(image, { resize, size }) {
  const { width, height } = image;
  const resized =
    width <= height
      ? [resize, Math.trunc((resize * height) / width)]
      : [Math.trunc((resize * width) / height), resize];
  const [left, top] = resized.map((side) => halfToEven(side - size));
  const [x, y] = [width / resized[0], height / resized[1]]; // source pixels for one resized pixel
  const viewport = [left * x, top * y, (left + size) * x, (top + size) * y];
  return { frame: cropResized(image, resized, [left, top], size), viewport };
}

/** n / 2 for a whole n >= 0, rounded as Python does. */
function halfToEven(n) {
  const half = Math.floor(n / 2);
  return half + (n & half & 1);
}

const BITS = 22; // of a weight's fraction: Pillow's fixed point, by which equal pixels come out
const HALF = 1 << (BITS - 1);

/** Pillow's antialiased bilinear: RGBA resized to [width, height], of which `size` x `size` at [left, top] as RGB. */
export function cropResized({ data, width, height }, resized, [left, top], size) {
  const columns = kernels(width, resized[0], left, size);
  const rows = kernels(height, resized[1], top, size);
  const first = rows[0].start; // no other rows are made narrow than those that some row of the crop reads
  const narrow = new Uint8ClampedArray((rows.at(-1).start + rows.at(-1).weights.length - first) * size * 3);
  for (let out = 0, y = first; out < narrow.length; y++)
    for (const { start, weights } of columns) {
      let [r, g, b] = [HALF, HALF, HALF];
      for (let i = 0, at = 4 * (y * width + start); i < weights.length; i++, at += 4) {
        r += weights[i] * data[at];
        g += weights[i] * data[at + 1];
        b += weights[i] * data[at + 2];
      }
      narrow[out++] = r >> BITS;
      narrow[out++] = g >> BITS;
      narrow[out++] = b >> BITS;
    }
  const stride = 3 * size;
  const frame = new Uint8ClampedArray(size * stride);
  rows.forEach(({ start, weights }, y) => {
    for (let x = 0; x < stride; x++) {
      let sum = HALF;
      for (let i = 0, at = (start - first) * stride + x; i < weights.length; i++, at += stride)
        sum += weights[i] * narrow[at];
      frame[y * stride + x] = sum >> BITS;
    }
  });
  return new Uint8Array(frame.buffer);
}

/** For each of `count` output pixels from `first` on: where its input pixels start, and their weights. */
function kernels(inputs, outputs, first, count) {
  const scale = inputs / outputs;
  const support = Math.max(scale, 1); // the triangle widens where the image shrinks: that is the antialiasing
  return Array.from({ length: count }, (_, number) => {
    const center = (first + number + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), inputs);
    const triangle = Array.from({ length: end - start }, (_, i) =>
      Math.max(0, 1 - Math.abs((start + i - center + 0.5) / support)),
    );
    const sum = triangle.reduce((a, b) => a + b);
    return { start, weights: Int32Array.from(triangle, (weight) => 0.5 + (weight / sum) * 2 ** BITS) };
  });
}

/**
 * What each expert saw, in pixels of the source image: [K, 4], the first what the frame shows.
 *
 * Where crops are cut from the frame (`crops.frame`), boxes are in its pixels; else box k in those of view k, whose
 * crop is resized with aligned corners (the runtime's `compose_boxes` has the formula).
 */
export function composeBoxes(boxes, [left, top, right, bottom], crops) {
  const size = crops.frame || crops.sizes[0];
  const seen = boxes.map((box, k) => {
    let edges = box;
    for (let n = crops.frame ? 0 : k; n-- > 0; ) edges = toOuter(edges, boxes[n], crops.sizes[n + 1]);
    return edges;
  });
  const [x, y] = [(right - left) / size, (bottom - top) / size];
  return [[0, 0, size, size], ...seen].map(([x0, y0, x1, y1]) => [
    left + x0 * x,
    top + y0 * y,
    left + x1 * x,
    top + y1 * y,
  ]);
}

function toOuter(edges, box, size) {
  return edges.map((edge, i) => {
    const [low, high] = [box[i % 2], box[(i % 2) + 2]];
    if (high - low <= 1) return box[i];
    return Math.min(Math.max(low + 0.5 + ((edge - 0.5) * (high - low - 1)) / (size - 1), low), high);
  });
}
