// A question to input ids, as mobilevlm/conversation.py makes them.

import { Template } from "./vendor/jinja.mjs";

const IMAGE = "<image>";

/** Stands in the ids where the visual tokens of the picture go. */
export const IMAGE_TOKEN_ID = -200;

/**
 * Input ids of a question about one picture, IMAGE_TOKEN_ID in the picture's place: where `<image>`
 * stands in the question, else before it.
 * @param tokenizer a Tokenizer of @huggingface/tokenizers
 * @param spec the manifest's `spec`
 * @throws {Error} the question is empty, or holds what the model has no embedding for
 */
export function promptIds(tokenizer, spec, question) {
  const { conversation, decoder, inputs } = spec;
  const text = new Template(conversation.chat_template).render({
    messages: [userMessage(question)],
    add_generation_prompt: true,
    bos_token: "",
    eos_token: "",
  });
  const ids = tokenize(tokenizer, text, conversation, inputs.image.layout);
  const beyond = ids.find((id) => id >= decoder.vocab_size);
  if (beyond !== undefined) {
    throw new Error(
      `the question holds ${tokenizer.id_to_token(beyond)}, a token that the model has no ` +
        `embedding for: leave it out`,
    );
  }
  return ids;
}

function userMessage(question) {
  const marks = question.split(IMAGE).length - 1;
  if (marks > 1) throw new Error(`the question holds ${marks} ${IMAGE}, there is one picture`);
  if (!question.trim()) throw new Error("the question is empty: ask something");
  if (marks) return { role: "user", content: question };
  return { role: "user", content: [{ type: "image" }, { type: "text", text: question }] };
}

/** Each piece of text beside the picture is tokenized alone, with the id that begins a text before
 * the first only, unless the conversation says otherwise; `layout`: ids that follow the picture. */
export function tokenize(tokenizer, text, conversation, layout) {
  let ids;
  if (conversation.tokenization === "joined") {
    const image = tokenizer.token_to_id(IMAGE);
    ids = tokenizer.encode(text).ids.map((id) => (id === image ? IMAGE_TOKEN_ID : id));
  } else if (conversation.tokenization === "images_first" && text.startsWith(IMAGE)) {
    ids = [IMAGE_TOKEN_ID, ...tokenizer.encode(text.slice(IMAGE.length)).ids];
  } else {
    ids = text.split(IMAGE).flatMap((piece, index) => {
      const inner = tokenizer.encode(piece, { add_special_tokens: index === 0 }).ids;
      return index === 0 ? inner : [IMAGE_TOKEN_ID, ...inner];
    });
  }
  const after = layout?.end_ids ?? [];
  return ids.flatMap((id) => (id === IMAGE_TOKEN_ID ? [id, ...after] : [id]));
}
