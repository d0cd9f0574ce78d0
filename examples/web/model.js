// A bundle that answers questions about images: the course of runtime/sequence/session.py and
// runtime/answer/generation.py, with greedy decoding.

import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { readBundle, tokenizerDescription } from "./bundle.js";
import { Decoder, Vision, prepareRuntime } from "./engine.js";
import { decodeImage } from "./image.js";
import { preprocess } from "./pixels.js";
import { IMAGE_TOKEN_ID, promptIds } from "./prompt.js";
import { Detokenizer, StopStrings } from "./text.js";

/**
 * Opens a bundle.
 * @param {string} url where its folder is, ending in a slash
 * @param {number} [wantedThreads] see prepareRuntime
 * @param {(loaded: number, total: number) => void} onProgress bytes read so far and in all
 * @throws {Error} no bundle there, or the browser cannot run it
 */
export async function openModel(url, wantedThreads, onProgress) {
  const start = performance.now();
  const threads = prepareRuntime(wantedThreads);
  const bundle = await readBundle(url, onProgress);
  const description = tokenizerDescription(bundle);
  const vision = await Vision.open(bundle);
  const decoder = await Decoder.open(bundle);
  return new Model({
    spec: bundle.manifest.spec,
    threads,
    description,
    tokenizer: new Tokenizer(description, {}),
    vision,
    decoder,
    loadSeconds: (performance.now() - start) / 1000,
  });
}

class Model {
  /** { imageId, ids, past }: the last prompt up to its image, with keys and values of it. */
  #known = null;

  constructor(parts) {
    Object.assign(this, parts);
  }

  /**
   * Answers a question about an image. What an earlier question about the same image has
   * computed up to the image's end is reused.
   * @param image { source, id }: what decodeImage takes; another image has another id
   * @param {(text: string) => void} onText pieces of the answer as they come
   * @param {() => Promise<boolean>} isStopped asked after each token
   * @returns {Promise<{text, tokens, finishReason, promptTokens, timings}>} finishReason: `stop`,
   *   `length` or `asked`; timings as Stopwatch has them
   * @throws {Error} the question is wrong, or too long for the context
   */
  async answer(image, question, maxNewTokens, onText, isStopped) {
    const watch = new Stopwatch();
    const ids = promptIds(this.tokenizer, this.spec, question);
    const begun = await this.#readImage(image, ids, watch);
    const rest = ids.slice(begun.ids.length);
    const promptTokens = begun.past.length + rest.length;
    const room = this.spec.decoder.context_length;
    if (promptTokens >= room) {
      throw new Error(
        `the prompt takes ${promptTokens} tokens with the image, the context holds ${room} ` +
          `with the answer: shorten it`,
      );
    }
    const state = await this.decoder.append(begun.past, this.decoder.embed(rest));
    const answer = await this.#decode(state, maxNewTokens, onText, isStopped, watch);
    return { ...answer, promptTokens, timings: watch.timings() };
  }

  /** The prompt up to its image, with keys and values. */
  async #readImage(image, ids, watch) {
    const begin = ids.slice(0, ids.indexOf(IMAGE_TOKEN_ID) + 1);
    if (this.#known?.imageId === image.id && startsWith(begin, this.#known.ids)) {
      return this.#known;
    }
    const pixels = preprocess(
      await decodeImage(image.source),
      this.spec.inputs.image.preparation,
    );
    watch.lap("preprocess");
    const visual = await this.vision.encode(pixels);
    watch.lap("vision");
    const { systemIds, systemPast } = this.decoder;
    const start = startsWith(begin, systemIds) ? systemIds.length : 0;
    const text = this.decoder.embed(begin.slice(start, -1));
    const embeds = new Float32Array(text.length + visual.length);
    embeds.set(text);
    embeds.set(visual, text.length);
    const before = start ? systemPast : this.decoder.emptyPast;
    const { past } = await this.decoder.append(before, embeds);
    this.#known = { imageId: image.id, ids: begin, past };
    return this.#known;
  }

  /** Greedy tokens until the answer ends. */
  async #decode(state, maxNewTokens, onText, isStopped, watch) {
    const { conversation, decoder } = this.spec;
    const detokenizer = new Detokenizer(this.tokenizer, this.description);
    const stops = new StopStrings(conversation.stop_strings);
    const answer = { text: "", tokens: [], finishReason: "length" };
    const show = (piece) => {
      answer.text += piece.text;
      if (piece.text) onText(piece.text);
      if (piece.stopped) answer.finishReason = "stop";
      return piece.stopped;
    };
    for (;;) {
      const token = argmax(state.logits);
      watch.lap(answer.tokens.length ? "decode" : "prefill");
      if (conversation.eos_token_ids.includes(token)) {
        answer.finishReason = "stop";
        break;
      }
      answer.tokens.push(token);
      if (show(stops.add(detokenizer.add(token)))) return answer;
      if (answer.tokens.length === maxNewTokens) break;
      if (state.past.length === decoder.context_length) break;
      if (await isStopped()) {
        answer.finishReason = "asked";
        break;
      }
      watch.skip();
      state = await this.decoder.append(state.past, this.decoder.embed([token]));
    }
    if (!show(stops.add(detokenizer.finish()))) show({ text: stops.finish(), stopped: false });
    return answer;
  }
}

/** Collects seconds by what they were spent on. */
class Stopwatch {
  #laps = { preprocess: 0, vision: 0, prefill: 0, decode: 0 };
  #decoded = 0;
  #last = performance.now();

  /** Counts the time since the last call. */
  lap(name) {
    this.#laps[name] += (performance.now() - this.#last) / 1000;
    this.#decoded += name === "decode";
    this.skip();
  }

  /** Leaves the time since the last call uncounted. */
  skip() {
    this.#last = performance.now();
  }

  /** Seconds of each part; `firstToken`: from the question to the first token; `tokensPerSecond`:
   * of those after the first, 0 where there is none. */
  timings() {
    const { preprocess, vision, prefill, decode } = this.#laps;
    return {
      ...this.#laps,
      firstToken: preprocess + vision + prefill,
      tokensPerSecond: this.#decoded ? this.#decoded / decode : 0,
    };
  }
}

function startsWith(ids, beginning) {
  return beginning.length > 0 && beginning.every((id, index) => ids[index] === id);
}

function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index++)
    if (values[index] > values[best]) best = index;
  return best;
}
