/* The pipeline in a thread of its own, which the page can end: nothing that a file does stops the page. */

import { Pipeline } from "./pipeline.js";

let pipeline;

onmessage = async ({ data: { bundle, image } }) => {
  try {
    if (bundle) {
      pipeline = await Pipeline.open(bundle);
      postMessage({ result: { provider: pipeline.provider, manifest: pipeline.manifest } });
    } else {
      const result = await pipeline.predict(image);
      postMessage({ result }, [result.bitmap]);
    }
  } catch (error) {
    postMessage({ error: String(error.message ?? error).split("\n")[0] });
  }
};
