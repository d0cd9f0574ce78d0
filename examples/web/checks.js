// Refuses bundles that this page cannot run, by the name of what it lacks.

export const EXPORT = "mobilevlm export CHECKPOINT -o BUNDLE --target web-wasm";

/** Parts of a spec that this page reads itself, or that are inside the graphs. A part with another
 * name may change what the page has to compute. */
const KNOWN = {
  layout: words(`
    begin_ids between_ids end_ids placeholder_ids row_end_ids row_id thumbnail_ids tile_ids`),
  conversation: words(
    "chat_template eos_token_ids image_mark parts shows stop_strings tokenization",
  ),
  decoder: words(`
    attention_scale attention_softcap context_length embed_scale encoder_layers experts head_dim
    hidden_act hidden_size intermediate_size learned_positions lm_head_bias logit_softcap mlp
    mlp_bias norm norm_eps num_attention_heads num_hidden_layers num_key_value_heads o_bias
    parallel_residual post_norms qk_norm qkv_bias relative_positions rms_norm_eps rope_scaling
    rope_theta rotary_dim sliding_layers sliding_rope_theta sliding_window start_token_id
    tie_word_embeddings vocab_size`),
};
const REMEDY = "choose another model, or use a newer page";
/** The same of an image's preparation, by its kind. */
const PREPARATIONS = {
  fixed_image: words("aspect kind mean resample shortest_edge size std"),
  tiles: words("kind longest_edge max_tiles mean resample size std thumbnail"),
  aspect_tiles: words("kind max_tiles mean min_tiles size std thumbnail"),
  any_resolution: words("grids kind max_tiles mean most_tiles rounding several size std"),
};
const RESAMPLINGS = ["bilinear", "bicubic", "lanczos"];
const ASPECTS = ["pad", "crop", "resize"];
const TOKENIZATIONS = ["apart", "joined", "images_first"];

/**
 * Checks that this page can run a bundle.
 * @param manifest in today's schema
 * @param stages artifacts of the format `onnx` by their stage
 * @param {string} url where the bundle's folder is, ending in a slash
 * @throws {Error} it cannot; the message names what it lacks
 */
export function checkRunnable(manifest, stages, url) {
  const { inputs, decoder, conversation, name } = manifest.spec;
  const refuse = (what) => {
    throw new Error(`${url}: ${name} ${what}: ${REMEDY}`);
  };
  if (!inputs.image) refuse("takes no images, and this page asks about one");
  const other = Object.keys(inputs).find((kind) => kind !== "image");
  if (other) refuse(`takes ${other}, which this page cannot prepare`);
  const { preparation, connector, layout } = inputs.image;
  const { kind = "fixed_image" } = preparation;
  if (!Object.hasOwn(PREPARATIONS, kind)) {
    refuse(`has images prepared as ${quoted(kind)}, and this page prepares one square of each`);
  }
  if (kind !== "fixed_image" && preparation.max_tiles !== 1) {
    throw new Error(
      `${url}: ${name} splits images into tiles, and this page makes one of each: export it with ` +
        `'${EXPORT}'`,
    );
  }
  if (!stages.vision || !stages.decoder || !manifest.embeddings) {
    throw new Error(`${url}: a bundle without ONNX files: export it with '${EXPORT}'`);
  }
  if (decoder.encoder_layers || connector.qformer?.vocab_size > 0) {
    refuse("has a text encoder or a Q-Former that reads the question, which this page cannot run");
  }
  const known = { ...KNOWN, preparation: PREPARATIONS[kind] };
  const parts = { preparation, layout: layout ?? {}, conversation, decoder };
  for (const [part, values] of Object.entries(parts)) {
    const unknown = Object.keys(values).find(
      (key) => !known[part].includes(key) && isSet(values[key]),
    );
    if (unknown) refuse(`has ${quoted(unknown)} in its ${part}, which this page does not know`);
  }
  const { aspect = "resize", resample = "bicubic" } = preparation;
  if (!ASPECTS.includes(aspect)) refuse(`has images of aspect ${quoted(aspect)}, not known here`);
  if (!RESAMPLINGS.includes(resample)) {
    refuse(`has images resized by ${quoted(resample)}, which this page does not know`);
  }
  const { tokenization = "apart" } = conversation;
  if (!TOKENIZATIONS.includes(tokenization)) {
    refuse(`has tokenization ${quoted(tokenization)}, which this page does not know`);
  }
  if (manifest.recipe.kv_cache === "int8") {
    throw new Error(`${url}: keys and values in int8, this page has float32: '${EXPORT}'`);
  }
}

/**
 * Checks that this page computes all that a graph asks for.
 * @param {string} stage of the bundle
 * @param {readonly string[]} asked names of the graph's inputs
 * @param {Iterable<string>} given names of the inputs that this page computes
 * @throws {Error} the graph asks for another
 */
export function checkInputs(stage, asked, given) {
  const names = new Set(given);
  const unknown = asked.find((name) => !names.has(name));
  if (unknown === undefined) return;
  throw new Error(
    `the graph of the ${stage} stage asks for ${quoted(unknown)}, which this page does not ` +
      `compute: ${REMEDY}`,
  );
}

/** Whether a part of a spec is more than the empty value that parts have by default. */
function isSet(value) {
  return typeof value === "object" && value !== null
    ? Object.keys(value).length > 0
    : Boolean(value);
}

function words(text) {
  return text.trim().split(/\s+/);
}

function quoted(value) {
  return `'${String(value).slice(0, 60)}'`;
}
