/* The chain of a bundle on onnxruntime-web: the experts one by one, so that it may stop where an exit is learned. */

import { Bundle } from "./bundle.js";
import { composeBoxes, decode, toFrame } from "./image.js";

// The one place that says where onnxruntime-web comes from: here npm's folder. A CDN does as well, for example
// "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/".
const ORT = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);

export class Pipeline {
  /** Open a bundle's bytes on WebGPU where there is one that runs it, else on WebAssembly. */
  static async open(buffer) {
    const bundle = new Bundle(buffer);
    if (await navigator.gpu?.requestAdapter())
      try {
        return await new Pipeline().#open(bundle, "webgpu");
      } catch (error) {
        console.warn(`WebGPU does not run this bundle, WebAssembly does: ${error.message}`);
      }
    return new Pipeline().#open(bundle, "wasm");
  }

  async #open(bundle, provider) {
    this.ort = await import(new URL(`ort.${provider}.bundle.min.mjs`, ORT));
    this.ort.env.wasm.wasmPaths = ORT.href;
    this.provider = provider;
    this.manifest = bundle.manifest;
    const calibration = bundle.has("calibration.json") ? bundle.json("calibration.json").values : {};
    this.temperatures = calibration.temperatures ?? {};
    this.thresholds = calibration.exits?.thresholds ?? {};
    // Any graph may read any file: the weights of a shared backbone lie in the first graph's.
    const names = this.manifest.graphs.map(({ name }) => name);
    const externalData = names
      .map((name) => `${name}.weights`)
      .filter((path) => bundle.has(`onnx/${path}`))
      .map((path) => ({ path, data: bundle.read(`onnx/${path}`) }));
    this.sessions = [];
    for (const name of names) {
      const forCpu = `onnx/${name}.cpu.onnx`; // INT8 as a CPU computes it
      const graph = bundle.read(bundle.has(forCpu) ? forCpu : `onnx/${name}.onnx`);
      const options = { executionProviders: [provider], externalData, logSeverityLevel: 4 };
      this.sessions.push(await this.ort.InferenceSession.create(graph, options));
    }
    const { size } = this.manifest.preprocess;
    await this.#run(new Uint8Array(size * size * 3)); // whatever a device cannot run fails here, once
    return this;
  }

  /** Predict a Blob or an ImageBitmap; what comes back may be sent from a worker, the upright image with it. */
  async predict(source) {
    const start = performance.now();
    const image = await decode(source);
    const decoded = performance.now();
    const { frame, viewport } = toFrame(image, this.manifest.preprocess);
    const framed = performance.now();
    const { tensors, graphs, probabilities } = await this.#run(frame);
    const end = performance.now();
    const views = this.manifest.views.filter(({ logits }) => logits in tensors);
    const boxes = views.filter(({ box }) => box).map(({ box }) => [...tensors[box].data]);
    return {
      classes: this.manifest.class_names
        .map((name, index) => ({ name, probability: probabilities[index] }))
        .sort((a, b) => b.probability - a.probability),
      boxes: composeBoxes(boxes, viewport, this.manifest.crops),
      heatmaps: views.map(({ heatmap }) => {
        const { data, dims } = tensors[heatmap];
        return { data, height: dims[1], width: dims[2] };
      }),
      graphs, // how many ran
      milliseconds: { decode: decoded - start, resize: framed - decoded, chain: end - framed, total: end - start },
      bitmap: image.bitmap,
    };
  }

  async #run(frame) {
    const { size } = this.manifest.preprocess;
    const tensors = { frame: new this.ort.Tensor("uint8", frame, [1, size, size, 3]) };
    let probabilities;
    let graphs = 0;
    for (const { inputs, logits } of this.manifest.graphs) {
      const feeds = Object.fromEntries(inputs.map(({ name }) => [name, tensors[name]]));
      Object.assign(tensors, await this.sessions[graphs++].run(feeds));
      probabilities = softmax(tensors[logits].data, this.temperatures[logits] ?? 1);
      if (Math.max(...probabilities) >= (this.thresholds[logits] ?? Infinity)) break;
    }
    return { tensors, graphs, probabilities };
  }
}

function softmax(logits, temperature) {
  if (!logits.every(Number.isFinite)) throw new Error("the chain computed NaN or infinity: export the bundle again");
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}
