// Answers of transformers.js to the requests in a file, as JSON on stdout; run by
// tests/e2e/test_transformers_js.py beside the package.
import fs from "node:fs";
import path from "node:path";
import {
  AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env,
} from "@huggingface/transformers";

const [folder, file] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const processor = await AutoProcessor.from_pretrained(path.basename(folder));
const model = await AutoModelForImageTextToText.from_pretrained(path.basename(folder));

async function answer({ prompt, image, pixels, count }) {
  const content = [{ type: "image" }, { type: "text", text: prompt }];
  const text = processor.apply_chat_template([{ role: "user", content }], {
    add_generation_prompt: true,
  });
  const images = [await RawImage.read(image)];
  const inputs = processor.config.image_token
    ? await processor(images, text)
    : await processor(text, images);
  const own = inputs.pixel_values;
  if (pixels)
    inputs.pixel_values = new Tensor("float32", Float32Array.from(pixels), own.dims);
  const output = await model.generate({ ...inputs, max_new_tokens: count });
  const ids = inputs.input_ids.tolist()[0].map(Number);
  return {
    ids,
    tokens: output.tolist()[0].map(Number).slice(ids.length),
    dims: own.dims,
    pixels: pixels ? null : Array.from(own.data),
  };
}

const answers = [];
for (const request of JSON.parse(fs.readFileSync(file, "utf8"))) answers.push(await answer(request));
console.log(JSON.stringify(answers));
