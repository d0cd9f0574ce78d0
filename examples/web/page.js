// The page: image and question go to the worker, its answers are shown as they come.

import { Board } from "./board.js";

const MAX_NEW_TOKENS = 64;
const SETUP = "run 'npm ci && npm run vendor' in the page's folder";

const elements = Object.fromEntries(
  ["answers", "ask", "file", "form", "note", "progress", "question", "status", "suggestions", "warning"].map(
    (id) => [id, document.getElementById(id)],
  ),
);
const statusText = document.getElementById("status-text");

/** `?bundle=FOLDER`, by default bundle/ beside the page; `?threads=N`. */
const options = new URLSearchParams(location.search);
const bundleFolder = (options.get("bundle") ?? "bundle").replace(/\/$/, "");
const bundleUrl = new URL(`${bundleFolder}/`, location.href).href;

const worker = new Worker("worker.js", { type: "module" });
const board = new Board(suggest);
/** The answer that is coming, as its list item. */
let entry = null;
/** Settled when the last image file has been read. */
let opening = Promise.resolve();

worker.addEventListener("message", ({ data }) => HANDLERS[data.type](data));
worker.addEventListener("error", (event) => {
  event.preventDefault();
  fail(event.message ?? `the page's scripts cannot be loaded: ${SETUP}`);
});
worker.postMessage({ type: "load", url: bundleUrl, threads: Number(options.get("threads")) });
say("Reading the model…");

elements.form.addEventListener("submit", async (event) => {
  event.preventDefault();
  await opening;
  if (entry) worker.postMessage({ type: "stop" });
  else if (!elements.ask.disabled) ask(elements.question.value);
});
elements.file.addEventListener("change", () => open(elements.file.files[0]));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
  else warn("there is no image file in what was dropped: drop a PNG or JPEG file");
});
addEventListener("paste", (event) => open(event.clipboardData.files[0]));

const HANDLERS = {
  progress({ loaded, total }) {
    elements.progress.hidden = false;
    elements.progress.value = loaded / total;
    say(`Reading the model: ${megabytes(loaded)} of ${megabytes(total)}`);
    if (loaded === total) say("Starting the model…");
  },
  ready({ name, threads, loadSeconds }) {
    elements.progress.hidden = true;
    const count = threads === 1 ? "1 thread" : `${threads} threads`;
    say(`${name} is ready: loaded in ${seconds(loadSeconds)}, ${count}`);
    elements.ask.disabled = false;
    document.body.dataset.state = "ready";
    if (name.startsWith("nano")) {
      elements.note.textContent =
        "This small model knows drawn scenes of coloured shapes and short texts. It cannot read photos.";
    }
  },
  text({ text }) {
    entry.querySelector(".answer").textContent += text;
  },
  answer({ tokens, timings }) {
    const { preprocess, vision, firstToken, tokensPerSecond } = timings;
    const parts = [
      vision ? `image ${seconds(preprocess + vision)}` : "image known",
      `first token ${seconds(firstToken)}`,
      `${tokens.length}\u00a0tokens`,
    ];
    if (tokensPerSecond) parts.push(`${Math.round(tokensPerSecond)}\u00a0tokens/s`);
    entry.querySelector(".timings").textContent = parts.join(" · ");
    entry.dataset.tokens = tokens.join(" ");
    finish();
  },
  error({ during, message }) {
    if (during === "load") return fail(message);
    const answer = entry.querySelector(".answer");
    answer.textContent = message;
    answer.classList.add("error");
    finish();
  },
};

function ask(question) {
  entry = document.createElement("li");
  entry.append(board.thumbnail());
  for (const name of ["asked", "answer", "timings"]) {
    const line = document.createElement("p");
    line.className = name;
    entry.append(line);
  }
  entry.querySelector(".asked").textContent = question;
  entry.setAttribute("aria-busy", "true");
  elements.answers.prepend(entry);
  entry.scrollIntoView({ block: "nearest", behavior: "smooth" });
  elements.ask.textContent = "Stop";
  document.body.dataset.state = "answering";
  worker.postMessage({
    type: "ask",
    image: board.image(),
    question,
    maxNewTokens: MAX_NEW_TOKENS,
  });
}

function finish() {
  entry.removeAttribute("aria-busy");
  entry = null;
  elements.ask.textContent = "Ask";
  document.body.dataset.state = "ready";
}

function open(file) {
  opening = openFile(file);
}

async function openFile(file) {
  elements.file.value = "";
  if (!file) return;
  const wrong = `${file.name}: not an image that this browser reads: choose a PNG or JPEG file`;
  warn((await board.open(file)) ? "" : wrong);
  document.body.dataset.opened = file.name;
}

/** Says what is wrong with the last file, or that nothing is. */
function warn(message) {
  elements.warning.textContent = message;
}

/** Offers questions that fit the image. */
function suggest(questions) {
  const buttons = questions.map((question) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: question });
    button.addEventListener("click", () => {
      elements.question.value = question;
      elements.form.requestSubmit();
    });
    item.append(button);
    return item;
  });
  elements.suggestions.replaceChildren(...buttons);
  elements.question.value = questions[0];
}

function say(text) {
  statusText.textContent = text;
}

function fail(message) {
  say(message);
  elements.progress.hidden = true;
  elements.status.classList.add("error");
  elements.status.setAttribute("role", "alert");
  document.body.dataset.state = "failed";
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)}\u00a0ms` : `${value.toFixed(1)}\u00a0s`;
}
