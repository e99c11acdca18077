// Holds one ONNX model in ONNX Runtime Web and does what the server says. The protocol is in _server.py.
import * as ort from "./ort.mjs";

const threads = Number(new URLSearchParams(location.search).get("threads"));
let session;

async function post(path, body) {
  const response = await fetch(path, { method: "POST", body });
  if (!response.ok) throw new Error(`POST ${path}: ${response.status}`);
}

const answer = (message) => post("answer", JSON.stringify(message));

async function get(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`GET ${path}: ${response.status}`);
  return response.arrayBuffer();
}

async function image(index, shape) {
  return new ort.Tensor("float32", new Float32Array(await get(`images/${index}`)), [1, ...shape]);
}

async function run(tensor) {
  const outputs = await session.run({ [session.inputNames[0]]: tensor });
  return outputs[session.outputNames[0]].data;
}

const commands = {
  async load() {
    const model = await get("model.onnx");
    const start = performance.now();
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
    await answer({ load_ms: performance.now() - start });
  },

  async infer({ count, shape }) {
    for (let index = 0; index < count; index++) await post("logits", await run(await image(index, shape)));
  },

  async time({ runs, shape }) {
    const tensor = await image(0, shape);
    const ms = [];
    for (let index = 0; index < runs; index++) {
      const start = performance.now();
      await run(tensor);
      ms.push(performance.now() - start);
    }
    await answer({ ms });
  },
};

async function startRuntime() {
  if (threads > 1 && !crossOriginIsolated) throw new Error("this page is not isolated, so it has one thread only");
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = { wasm: new URL("ort.wasm", location).href };
  // An empty model is refused, but only once the runtime is there: loading a model can then be timed alone.
  await ort.InferenceSession.create(new Uint8Array()).catch(() => {});
  await answer({ version: ort.env.versions.web });
}

const attempt = (action) => action().catch((error) => answer({ error: String(error.message ?? error) }));

await attempt(startRuntime);
new EventSource("commands").onmessage = (event) => {
  const [name, values] = JSON.parse(event.data);
  attempt(() => commands[name](values));
};
