// The two stages of a bundle in onnxruntime-web, as runtime/engines/onnx/engine.py has them.

import * as ort from "./vendor/ort.wasm.bundle.min.mjs";
import { checkInputs } from "./checks.js";

const MOST_THREADS = 4;

/** A module with one vector instruction: a browser that cannot compile it cannot run the model. */
const SIMD_MODULE = Uint8Array.from(
  atob("AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw=="),
  (character) => character.charCodeAt(0),
);

/**
 * Says where onnxruntime's files are; returns the number of threads that it will use. More than one
 * needs a page that is cross-origin isolated.
 * @param {number} [wanted] threads, by default one for two of the device's, at most four
 * @throws {Error} the browser has no WebAssembly with SIMD
 */
export function prepareRuntime(wanted) {
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(SIMD_MODULE)) {
    throw new Error(
      "this browser has no WebAssembly with SIMD: use Chrome 105, Firefox 121, Safari 16.4 or newer",
    );
  }
  const usual = Math.min(Math.ceil(navigator.hardwareConcurrency / 2), MOST_THREADS);
  const threads = crossOriginIsolated ? wanted || usual : 1;
  const wasm = new URL("vendor/ort-wasm-simd-threaded.wasm", import.meta.url);
  ort.env.wasm.wasmPaths = { wasm: wasm.href };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return threads;
}

async function openSession({ files }, { path, data }) {
  const session = await ort.InferenceSession.create(files.get(path), {
    executionProviders: ["wasm"],
    externalData: data.map((name) => ({ path: fileName(name), data: files.get(name) })),
    logSeverityLevel: 3,
  });
  for (const name of [path, ...data]) files.delete(name); // the session has a copy
  return session;
}

function fileName(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** The vision stage: tower and projector in one graph. */
export class Vision {
  static async open(bundle) {
    const vision = new Vision();
    vision.session = await openSession(bundle, bundle.stages.vision);
    checkInputs("vision", vision.session.inputNames, ["pixels"]);
    vision.size = bundle.manifest.spec.inputs.image.preparation.size;
    return vision;
  }

  /** uint8 pixels (size, size, 3) to visual tokens, float32 (num_tokens · hidden_size). */
  async encode(pixels) {
    const shape = [1, this.size, this.size, 3];
    const feeds = { pixels: new ort.Tensor("uint8", new Uint8Array(pixels.buffer), shape) };
    const { visual_tokens } = await this.session.run(feeds, ["visual_tokens"]);
    return visual_tokens.data;
  }
}

/** Inputs of the decoder's graph beside keys and values. */
const INPUTS = ["inputs_embeds", "total_length", "logits_positions", "window_length"];

/**
 * The decoder stage. Keys and values of a sequence are a `past`, { length, tensors }, which stays
 * as it is when positions are appended: the result has its own. (The tensors that go in and come
 * out are copied; onnxruntime-web cannot share buffers with a caller.)
 */
export class Decoder {
  static async open(bundle) {
    const { spec, embeddings, system_prompt: system } = bundle.manifest;
    const decoder = new Decoder();
    decoder.session = await openSession(bundle, bundle.stages.decoder);
    decoder.hiddenSize = spec.decoder.hidden_size;
    decoder.hasWindows = (spec.decoder.sliding_layers ?? []).length > 0;
    decoder.embedScale = Math.fround(spec.decoder.embed_scale ?? 1);
    decoder.rows = embeddingRows(bundle.files.get(embeddings.path), embeddings);
    decoder.emptyPast = pastOf(spec.decoder, 0, new Float32Array());
    const past = [...decoder.emptyPast.tensors.keys()].map((name) => `past_key_values.${name}`);
    checkInputs("decoder", decoder.session.inputNames, [...INPUTS, ...past]);
    decoder.systemIds = system?.ids ?? [];
    if (system) {
      const values = new Float32Array(bundle.files.get(system.path).buffer);
      decoder.systemPast = pastOf(spec.decoder, system.ids.length, values);
    }
    return decoder;
  }

  /** Embeddings of ids, float32 (ids.length · hidden_size). */
  embed(ids) {
    const embeds = new Float32Array(ids.length * this.hiddenSize);
    ids.forEach((id, index) => embeds.set(this.rows(id), index * this.hiddenSize));
    return this.embedScale === 1 ? embeds : embeds.map((value) => value * this.embedScale);
  }

  /** Keys and values after further positions, and the logits of the last (always: this onnxruntime
   * fails where no position is asked for). */
  async append(past, embeds) {
    const count = embeds.length / this.hiddenSize;
    const length = past.length + count;
    const feeds = {
      inputs_embeds: new ort.Tensor("float32", embeds, [1, count, this.hiddenSize]),
      total_length: new ort.Tensor("int32", [length], [1]),
      logits_positions: new ort.Tensor("int64", [BigInt(count - 1)], [1]),
    };
    if (this.hasWindows) feeds.window_length = feeds.total_length; // buffers have all positions
    for (const [name, tensor] of past.tensors) feeds[`past_key_values.${name}`] = tensor;
    const found = await this.session.run(feeds);
    const tensors = new Map();
    for (const name of past.tensors.keys()) tensors.set(name, found[`present.${name}`]);
    return { past: { length, tensors }, logits: found.logits.data };
  }
}

/** Keys and values of `length` positions from float32 (2 · layers, num_key_value_heads, length,
 * head_dim rounded up to a multiple of 8), each layer's keys before its values. */
function pastOf(spec, length, values) {
  const channels = Math.ceil(spec.head_dim / 8) * 8;
  const shape = [1, spec.num_key_value_heads, length, channels];
  const size = spec.num_key_value_heads * length * channels;
  const tensors = new Map();
  for (let index = 0; index < 2 * spec.num_hidden_layers; index++) {
    const part = values.subarray(index * size, (index + 1) * size);
    const name = `${index >> 1}.${index % 2 ? "value" : "key"}`;
    tensors.set(name, new ort.Tensor("float32", part, shape));
  }
  return { length, tensors };
}

/** A function from id to its row, float32 (columns). */
function embeddingRows(bytes, { offset, dtype, rows, columns }) {
  if (dtype === "float32") {
    const table = new Float32Array(bytes.buffer, offset, rows * columns);
    return (id) => table.subarray(id * columns, (id + 1) * columns);
  }
  const table = new Uint16Array(bytes.buffer, offset, rows * columns);
  return (id) => Float32Array.from(table.subarray(id * columns, (id + 1) * columns), halfToFloat);
}

/** The value of a float16's bits. */
function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
