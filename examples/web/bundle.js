// Reads a bundle (docs/reference/bundle.md) as `mobilevlm export --target web-wasm` wrote it.

import { EXPORT, checkRunnable } from "./checks.js";
import { upgraded } from "./schema_1.js";

const SCHEMA_VERSION = 2;
const TOKENIZER = "tokenizer.json";

/**
 * The manifest and the files that the browser needs, checked.
 * @param {string} url where the bundle's folder is, ending in a slash
 * @param {(loaded: number, total: number) => void} onProgress bytes so far and in all
 * @returns {Promise<{manifest, stages, files: Map<string, Uint8Array>}>} `stages`: artifacts by name
 * @throws {Error} no bundle there, damaged, or one that this page cannot run
 */
export async function readBundle(url, onProgress) {
  const manifest = await readManifest(url);
  const stages = Object.fromEntries(
    manifest.artifacts
      .filter((artifact) => artifact.format === "onnx")
      .map((artifact) => [artifact.stage, artifact]),
  );
  checkRunnable(manifest, stages, url);
  const wanted = [
    TOKENIZER,
    ...artifactFiles(stages.vision),
    ...artifactFiles(stages.decoder),
    manifest.embeddings.path,
    ...(manifest.system_prompt ? [manifest.system_prompt.path] : []),
  ];
  const total = wanted.reduce((sum, name) => sum + manifest.files[name].size, 0);
  let loaded = 0;
  const files = new Map();
  for (const name of wanted) {
    const bytes = await readFile(url, name, manifest.files[name], (count) => {
      loaded += count;
      onProgress(loaded, total);
    });
    files.set(name, bytes);
  }
  return { manifest, stages, files };
}

/** The content of the bundle's tokenizer.json. */
export function tokenizerDescription({ files }) {
  return JSON.parse(new TextDecoder().decode(files.get(TOKENIZER)));
}

function artifactFiles({ path, data }) {
  return [path, ...data];
}

async function readManifest(url) {
  const response = await request(url + "manifest.json");
  if (!response.ok) {
    throw new Error(`no bundle at ${url} (${response.status}): put one there with '${EXPORT}'`);
  }
  let manifest;
  try {
    manifest = await response.json();
  } catch {
    throw new Error(`${url}manifest.json is no manifest: put a bundle there with '${EXPORT}'`);
  }
  if (!(manifest.schema_version <= SCHEMA_VERSION)) {
    throw new Error(
      `${url}: a bundle of schema ${manifest.schema_version}, this page reads up to ` +
        `${SCHEMA_VERSION}: use a newer page`,
    );
  }
  return upgraded(manifest);
}

/** A file's bytes, of the size and digest that the manifest says. */
async function readFile(url, name, { size, sha256 }, onBytes) {
  const response = await request(url + name);
  if (!response.ok) {
    throw new Error(`${url}${name}: missing (${response.status}): export the bundle again`);
  }
  const bytes = new Uint8Array(size);
  let length = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (length + value.length <= size) bytes.set(value, length);
    length += value.length;
    onBytes(value.length);
  }
  if (length !== size || !(await hasDigest(bytes, sha256))) {
    throw new Error(`${url}${name}: damaged: copy the bundle again`);
  }
  return bytes;
}

/** Browsers have digests on HTTPS and on this computer alone; elsewhere the size must do. */
async function hasDigest(bytes, sha256) {
  if (!crypto.subtle) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

async function request(url) {
  try {
    return await fetch(url);
  } catch {
    throw new Error(`${url}: cannot be read: is the server still running?`);
  }
}
