// Asks a bundle about an image, by transformers.js in Node:
//   mobilevlm export CHECKPOINT -o bundle --target transformers-js
//   npm install && node ask.mjs bundle photo.jpg "What is this?"
import path from "node:path";
import {
  AutoModelForImageTextToText, AutoProcessor, RawImage, TextStreamer, env,
} from "@huggingface/transformers";

const [bundle, photo, question] = process.argv.slice(2);
if (question === undefined) {
  console.error('usage: node ask.mjs BUNDLE IMAGE "QUESTION"');
  process.exit(2);
}
const folder = path.resolve(bundle);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);

const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name);
const parts = [{ type: "image" }, { type: "text", text: question }];
const prompt = processor.apply_chat_template([{ role: "user", content: parts }], {
  add_generation_prompt: true,
});
const image = await RawImage.read(photo);
// Its processors disagree about the order.
const inputs = processor.config.image_token
  ? await processor([image], prompt)
  : await processor(prompt, [image]);
const streamer = new TextStreamer(processor.tokenizer, {
  skip_prompt: true,
  skip_special_tokens: true,
});
await model.generate({ ...inputs, max_new_tokens: 64, streamer });
