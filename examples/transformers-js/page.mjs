// The bundle in ./bundle (or ?bundle=NAME) beside this page, by transformers.js; everything comes
// from the page's own server.
import {
  AutoModelForImageTextToText, AutoProcessor, RawImage, TextStreamer, env,
} from "@huggingface/transformers";

const element = (id) => document.getElementById(id);
const name = new URLSearchParams(location.search).get("bundle") ?? "bundle";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL(".", location.href).pathname; // a path: it looks up no URL
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", location.href).href;

async function ask(processor, model) {
  const parts = [{ type: "image" }, { type: "text", text: element("question").value }];
  const prompt = processor.apply_chat_template([{ role: "user", content: parts }], {
    add_generation_prompt: true,
  });
  const image = await RawImage.read(element("file").files[0]);
  const inputs = processor.config.image_token
    ? await processor([image], prompt)
    : await processor(prompt, [image]);
  element("answer").textContent = "";
  const streamer = new TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => (element("answer").textContent += text),
  });
  await model.generate({ ...inputs, max_new_tokens: 64, streamer });
}

async function whileBusy(work) {
  document.body.dataset.state = "busy";
  try {
    const found = await work();
    document.body.dataset.state = "ready";
    return found;
  } catch (error) {
    element("answer").textContent = String(error);
    document.body.dataset.state = "failed";
    throw error;
  }
}

const [processor, model] = await whileBusy(() =>
  Promise.all([
    AutoProcessor.from_pretrained(name),
    AutoModelForImageTextToText.from_pretrained(name, { device: "wasm" }),
  ]),
);
element("ask").onclick = () => whileBusy(() => ask(processor, model));
