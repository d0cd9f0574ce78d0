// Copies what the page uses of the installed packages into vendor/, so that a static server has all
// of it: npm ci && npm run vendor

import { cpSync, mkdirSync, rmSync, statSync } from "node:fs";

const FILES = [
  "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
  "@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "@huggingface/jinja/dist/index.js",
];

const folder = new URL("vendor/", import.meta.url);
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder);
for (const file of FILES) {
  const name = file.split("/").at(-1);
  const target = new URL(name === "index.js" ? "jinja.mjs" : name, folder);
  cpSync(new URL(`node_modules/${file}`, import.meta.url), target);
  console.log(`${target.pathname}  ${(statSync(target).size / 1e6).toFixed(2)} MB`);
}
