// The model in a thread of its own, so that the page stays alive while it computes.
//
// In:  { type: "load", url, threads }, { type: "stop" },
//      { type: "ask", image: { source, id }, question, maxNewTokens }
// Out: { type: "progress", loaded, total }, { type: "ready", … }, { type: "text", text },
//      { type: "answer", … }, { type: "error", during, message }

import { openModel } from "./model.js";

let model = null;
let stopAsked = false;

addEventListener("message", async ({ data }) => {
  if (data.type === "stop") {
    stopAsked = true;
    return;
  }
  try {
    if (data.type === "load") await load(data);
    else await ask(data);
  } catch (error) {
    postMessage({ type: "error", during: data.type, message: explained(error) });
  }
});

async function load({ url, threads: wanted }) {
  model = await openModel(url, wanted, (loaded, total) =>
    postMessage({ type: "progress", loaded, total }),
  );
  const { threads, loadSeconds, spec } = model;
  postMessage({ type: "ready", name: spec.name, threads, loadSeconds });
}

/** `picture` is the former name of `image`, for one version. */
async function ask({ image, picture, question, maxNewTokens }) {
  stopAsked = false;
  const onText = (text) => postMessage({ type: "text", text });
  const answer = await model.answer(image ?? picture, question, maxNewTokens, onText, async () => {
    await nextMessages();
    return stopAsked;
  });
  postMessage({ type: "answer", ...answer });
}

/** Lets messages be handled that have arrived: computing leaves no room for them. */
function nextMessages() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(null);
  });
}

/** One line that a person understands. */
function explained(error) {
  const message = String(error?.message ?? error)
    .trim()
    .split("\n")
    .at(-1);
  return /alloc|out of memory/i.test(message)
    ? `the browser has not enough memory for this model: choose a smaller one (${message})`
    : message;
}
