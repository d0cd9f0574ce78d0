// Tokens to text as they come, as runtime/answer/text.py: whole characters only, ending at stop strings.

const SPACE = "\u2581"; // stands for a space inside sentencepiece's pieces
const BYTE = /^<0x([0-9A-F]{2})>$/;

/** Text of a growing list of tokens. Bytes of an unfinished character are held back. */
export class Detokenizer {
  #tokenizer;
  #special;
  #byteLevel;
  #strips;
  #bytes = new TextDecoder("utf-8", { ignoreBOM: true });
  #begun = false;

  /** @param description the content of tokenizer.json, which `tokenizer` was made from */
  constructor(tokenizer, description) {
    this.#tokenizer = tokenizer;
    const special = description.added_tokens.filter((token) => token.special);
    this.#special = new Set(special.map((token) => token.id));
    const { type, decoders = [] } = description.decoder;
    this.#byteLevel = type === "ByteLevel";
    this.#strips = decoders.some((decoder) => decoder.type === "Strip");
  }

  /** The text that this token completes: often a word, sometimes nothing. */
  add(token) {
    const piece = this.#tokenizer.id_to_token(token);
    if (piece === undefined || this.#special.has(token)) return this.finish();
    if (this.#byteLevel) return this.#decode(bytesOf(piece));
    const strips = this.#strips && !this.#begun;
    this.#begun = true;
    const byte = BYTE.exec(piece);
    if (byte) return this.#decode(Uint8Array.of(parseInt(byte[1], 16)));
    const text = piece.replaceAll(SPACE, " ");
    return this.finish() + (strips && text.startsWith(" ") ? text.slice(1) : text);
  }

  /** What was held back: an unfinished character comes out as U+FFFD. */
  finish() {
    return this.#bytes.decode();
  }

  #decode(bytes) {
    return this.#bytes.decode(bytes, { stream: true });
  }
}

/** Cuts text at the first stop string; holds back what may become one. */
export class StopStrings {
  #stops;
  #held = "";

  constructor(stops) {
    this.#stops = stops.filter((stop) => stop);
  }

  /** { text, stopped }: what may be shown, and whether a stop string was reached. */
  add(piece) {
    const text = this.#held + piece;
    const found = this.#stops.map((stop) => text.indexOf(stop)).filter((index) => index >= 0);
    if (found.length) {
      this.#held = "";
      return { text: text.slice(0, Math.min(...found)), stopped: true };
    }
    const keep = Math.max(0, ...this.#stops.map((stop) => overlap(text, stop)));
    this.#held = text.slice(text.length - keep);
    return { text: text.slice(0, text.length - keep), stopped: false };
  }

  /** What was held back, when the text ends without a stop string. */
  finish() {
    const held = this.#held;
    this.#held = "";
    return held;
  }
}

/** How many last characters of `text` begin `stop`. */
function overlap(text, stop) {
  for (let count = Math.min(text.length, stop.length - 1); count > 0; count--) {
    if (text.endsWith(stop.slice(0, count))) return count;
  }
  return 0;
}

/** The bytes that a piece of a byte-level vocabulary stands for (GPT-2's table). */
function bytesOf(piece) {
  const characters = [...piece];
  return characters.every((character) => BYTE_OF.has(character))
    ? Uint8Array.from(characters, (character) => BYTE_OF.get(character))
    : new TextEncoder().encode(piece); // an added token is its own text
}

const BYTE_OF = new Map();
for (let byte = 0, shifted = 256; byte < 256; byte++) {
  const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  BYTE_OF.set(String.fromCodePoint(visible ? byte : shifted++), byte);
}
