// A conversation about images with the server that this page comes from.

const LARGEST_FILE = 8_000_000; // bytes; larger files are sent smaller
const LONGEST_EDGE = 4096; // pixels, then

const get = (selector) => document.querySelector(selector);
const messages = [];
let images = []; // data URIs of the next question
let drawing = new Set(); // names of the models that make images
let running = null; // the AbortController of the answer that is being made

function element(name, options = {}, ...children) {
  const made = Object.assign(document.createElement(name), options);
  made.append(...children);
  return made;
}

function say(text) {
  get("#message").textContent = text;
}

// Images

function readAsDataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function madeSmaller(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_EDGE / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(bitmap.width * scale, bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

async function addFiles(files) {
  const found = [...files].filter((file) => file.type.startsWith("image/"));
  if (!found.length) {
    say("No image file in it.");
    return;
  }
  say("");
  for (const file of found) {
    try {
      const blob = file.size > LARGEST_FILE ? await madeSmaller(file) : file;
      images.push(await readAsDataUri(blob));
    } catch {
      say(`${file.name}: cannot be read.`);
    }
  }
  showImages();
}

function showImages() {
  const items = images.map((source, index) => {
    const remove = element("button", { type: "button", textContent: "×", title: "Remove" });
    remove.setAttribute("aria-label", `Remove image ${index + 1}`);
    remove.addEventListener("click", () => {
      images.splice(index, 1);
      showImages();
    });
    return element("li", {}, element("img", { src: source, alt: `Image ${index + 1}` }), remove);
  });
  get("#images").replaceChildren(...items);
}

get("#file").addEventListener("change", (event) => addFiles(event.target.files));
get("#capture").addEventListener("change", (event) => addFiles(event.target.files));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  addFiles(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
});

// Camera

let camera = null;

function closeCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  get("#viewfinder").close();
}

get("#camera").addEventListener("click", async () => {
  // Browsers give pages without TLS no camera, but phones take an image by themselves.
  if (!navigator.mediaDevices?.getUserMedia) {
    get("#capture").click();
    return;
  }
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    say(`No camera: ${error.message}`);
    return;
  }
  get("#video").srcObject = camera;
  get("#viewfinder").showModal();
});
get("#cancel").addEventListener("click", closeCamera);
get("#viewfinder").addEventListener("cancel", closeCamera);
get("#snap").addEventListener("click", async () => {
  const video = get("#video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  closeCamera();
  await addFiles([new File([blob], "camera.jpg", { type: blob.type })]);
});

// Requests

async function request(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  get("#access").hidden = response.status !== 401;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answers ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function showModels() {
  try {
    const found = (await (await request("v1/models")).json()).data;
    get("#model").replaceChildren(...found.map(({ id }) => element("option", { textContent: id })));
    get("#models").hidden = found.length < 2;
    drawing = new Set(found.filter(({ draws }) => draws).map(({ id }) => id));
    showDrawing();
    document.body.dataset.state = "ready";
  } catch (error) {
    say(error.message);
  }
}

function showDrawing() {
  get("#draw").hidden = !drawing.has(get("#model").value);
}

get("#model").addEventListener("change", showDrawing);
get("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", get("#key").value);
  get("#access").hidden = true;
  say("");
  showModels();
});

// Turns

function showTiming(turn, started, first, timings) {
  const parts = [`first word after ${((first - started) / 1000).toFixed(2)} s`];
  if (timings.tokens_per_second) parts.push(`${timings.tokens_per_second.toFixed(0)} tokens/s`);
  if (timings.reused_images) parts.push("image known");
  turn.append(element("p", { className: "timing", textContent: parts.join(", ") }));
}

function addTurn(role, ...children) {
  get("#hint")?.remove();
  const turn = element("article", { className: role }, ...children);
  get("#turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function userContent(question, shown) {
  if (!shown.length) return question;
  const parts = shown.map((url) => ({ type: "image_url", image_url: { url } }));
  return question ? [...parts, { type: "text", text: question }] : parts;
}

async function ask() {
  const question = get("#question").value.trim();
  const shown = images;
  if (running || !(question || shown.length)) return;
  const asked = { role: "user", content: userContent(question, shown) };
  addTurn("user", ...shown.map((src) => element("img", { src, alt: "" })), element("p", {}, question));
  const words = element("p", { className: "words" });
  const turn = addTurn("assistant", words);
  const own = new AbortController();
  [images, running] = [[], own];
  showImages();
  get("#question").value = "";
  show(true);
  let text = "";
  try {
    const started = performance.now();
    let first = started;
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        model: get("#model").value || undefined,
        messages: [...messages, asked],
        stream: true,
      }),
      signal: own.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta.content ?? "";
      if (piece && !text) first = performance.now();
      text += piece;
      words.textContent = text;
      if (event.timings) showTiming(turn, started, first, event.timings);
      turn.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (running !== own) return;
    if (error.name === "AbortError") words.append(" [stopped]");
    else turn.append(element("p", { className: "error", textContent: error.message }));
    if (!text) [images, get("#question").value] = [shown, question];
    showImages();
  }
  if (running !== own) return; // the conversation that it belongs to is gone
  if (text) messages.push(asked, { role: "assistant", content: text });
  running = null;
  show(false);
}

async function draw() {
  const prompt = get("#question").value.trim();
  if (running || !prompt) return;
  addTurn("user", element("p", {}, `Draw: ${prompt}`));
  const waiting = element("p", { className: "words", textContent: "Drawing…" });
  const turn = addTurn("assistant", waiting);
  const own = new AbortController();
  running = own;
  get("#question").value = "";
  show(true);
  try {
    const started = performance.now();
    const response = await request("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model: get("#model").value || undefined, prompt }),
      signal: own.signal,
    });
    const { data, usage } = await response.json();
    const shown = data.map(({ b64_json }) =>
      element("img", { src: `data:image/png;base64,${b64_json}`, alt: prompt }),
    );
    const seconds = (performance.now() - started) / 1000;
    const told = `${seconds.toFixed(1)} s, ${(usage.output_tokens / seconds).toFixed(0)} codes/s`;
    waiting.replaceWith(...shown);
    turn.append(element("p", { className: "timing", textContent: told }));
    turn.scrollIntoView({ block: "end" });
  } catch (error) {
    if (running !== own) return;
    if (error.name === "AbortError") waiting.append(" [stopped]");
    else waiting.replaceWith(element("p", { className: "error", textContent: error.message }));
    get("#question").value = prompt;
  }
  if (running !== own) return;
  running = null;
  show(false);
}

function show(busy) {
  get("#stop").hidden = !busy;
  get("#send").disabled = busy;
  get("#draw").disabled = busy;
  document.body.dataset.state = busy ? "busy" : "ready";
}

get("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
get("#draw").addEventListener("click", draw);
get("#question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
get("#stop").addEventListener("click", () => running?.abort());
get("#new").addEventListener("click", () => {
  running?.abort();
  running = null;
  show(false);
  messages.length = 0;
  images = [];
  showImages();
  get("#turns").replaceChildren();
  say("");
});

showModels();
