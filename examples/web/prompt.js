// A question to input ids, as mobilevlm/conversation.py makes them.

import { Template } from "./vendor/jinja.mjs";

const IMAGE = "<image>";

/** Stands in the ids where the visual tokens of the image go. */
export const IMAGE_TOKEN_ID = -200;

/**
 * Input ids of a question about one image, IMAGE_TOKEN_ID in the image's place: where `<image>`
 * stands in the question, else before it.
 * @param tokenizer a Tokenizer of @huggingface/tokenizers
 * @param spec the manifest's `spec`
 * @throws {Error} the question is empty, or holds what the model has no embedding for
 */
export function promptIds(tokenizer, spec, question) {
  const { conversation, decoder, inputs } = spec;
  const text = new Template(conversation.chat_template).render({
    messages: [userMessage(question, conversation.parts)],
    add_generation_prompt: true,
    bos_token: "",
    eos_token: "",
  });
  const ids = placed(tokenize(tokenizer, text, conversation), inputs.image);
  const marks = ids.filter((id) => id === IMAGE_TOKEN_ID).length;
  if (marks !== 1) {
    throw new Error(`the prompt has ${marks} marks of an image, expected one for the one image`);
  }
  const beyond = ids.find((id) => id >= decoder.vocab_size);
  if (beyond !== undefined) {
    throw new Error(
      `the question holds ${tokenizer.id_to_token(beyond)}, a token that the model has no ` +
        `embedding for: leave it out`,
    );
  }
  return ids;
}

/** @param {boolean} [parts] whether contents are lists of parts only */
function userMessage(question, parts) {
  const marks = question.split(IMAGE).length - 1;
  if (marks > 1) throw new Error(`the question has ${marks} ${IMAGE}, expected one for the one image`);
  if (!question.trim()) throw new Error("the question is empty: ask something");
  if (marks && parts) {
    const [before, after] = question.split(IMAGE).map((text) => (text ? [textPart(text)] : []));
    return { role: "user", content: [...before, { type: "image" }, ...after] };
  }
  if (marks) return { role: "user", content: question };
  return { role: "user", content: [{ type: "image" }, textPart(question)] };
}

function textPart(text) {
  return { type: "text", text };
}

/** Each piece of text beside the image is tokenized alone, with the id that begins a text before
 * the first only, unless the conversation says otherwise. */
export function tokenize(tokenizer, text, conversation) {
  if (conversation.tokenization === "joined") {
    const image = tokenizer.token_to_id(conversation.image_mark ?? IMAGE);
    return tokenizer.encode(text).ids.map((id) => (id === image ? IMAGE_TOKEN_ID : id));
  }
  if (conversation.tokenization === "images_first" && text.startsWith(IMAGE)) {
    return [IMAGE_TOKEN_ID, ...tokenizer.encode(text.slice(IMAGE.length)).ids];
  }
  return text.split(IMAGE).flatMap((piece, index) => {
    const inner = tokenizer.encode(piece, { add_special_tokens: index === 0 }).ids;
    return index === 0 ? inner : [IMAGE_TOKEN_ID, ...inner];
  });
}

/** The ids with those that stand around an image of one tile (mobilevlm/media/tiles.py). */
function placed(ids, { preparation, layout = {} }) {
  const { begin_ids = [], end_ids = [], thumbnail_ids = [], tile_ids = [] } = layout;
  const isTile = preparation.kind === "tiles" && preparation.thumbnail === "none";
  const whole = preparation.kind === "tiles" ? thumbnail_ids : [];
  const before = isTile ? (tile_ids[0]?.[0] ?? []) : whole;
  return ids.flatMap((id) =>
    id === IMAGE_TOKEN_ID ? [...begin_ids, ...before, id, ...end_ids] : [id],
  );
}
