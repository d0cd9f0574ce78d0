// The image of the page: a scene that is drawn with the tools, or a file that was opened.

import {
  COLORS,
  EDGE,
  SHAPES,
  SIZES,
  cellCenter,
  drawScene,
  drawShape,
  emptyScene,
  itemAt,
  questionsAbout,
  randomScene,
  withItem,
  withoutCell,
} from "./scene.js";

/** Pixels of the shown canvas for each of the model's. */
const SHOWN_SCALE = 4;
const QUESTIONS = [
  "Describe the picture.",
  "What is in the picture?",
  "How many shapes are there?",
];
const ARROWS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -3, ArrowDown: 3 };

export class Board {
  /** What the model is asked about; another image has another id. */
  id = 0;
  #scene = randomScene();
  #earlier = [];
  #file = null;
  #cursor = null;
  #canvas = document.getElementById("canvas");
  #photo = document.getElementById("photo");

  #onChange;

  /** @param {(questions: string[]) => void} onChange called after each change of the image with
   * questions that fit it */
  constructor(onChange) {
    this.#onChange = onChange;
    this.#canvas.width = this.#canvas.height = EDGE * SHOWN_SCALE;
    addChoices("shapes", SHAPES, shapeIcon);
    addChoices("colors", Object.keys(COLORS), colorIcon);
    addChoices("sizes", Object.keys(SIZES), sizeIcon);
    this.#canvas.addEventListener("click", (event) => this.#click(event));
    this.#canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#canvas.addEventListener("blur", () => this.#point(null));
    onClick("random", () => this.#change(randomScene()));
    onClick("clear", () => this.#change(emptyScene()));
    onClick("undo", () => this.#undo());
    this.#show();
  }

  /**
   * Shows an image file instead of a scene.
   * @returns {Promise<boolean>} false where the browser cannot read it: the image stays
   */
  async open(file) {
    const url = URL.createObjectURL(file);
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      return false;
    }
    URL.revokeObjectURL(this.#photo.src);
    this.#photo.src = url;
    this.#file = file;
    this.#show();
    return true;
  }

  /** { source, id }: a file, or the pixels of the scene. */
  image() {
    if (this.#file) return { source: this.#file, id: this.id };
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = EDGE;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    drawScene(context, this.#scene);
    return { source: context.getImageData(0, 0, EDGE, EDGE), id: this.id };
  }

  /** The image in small, for the list of answers. */
  thumbnail() {
    const canvas = document.createElement("canvas");
    canvas.className = "thumbnail";
    canvas.width = canvas.height = 96;
    const shown = this.#file ? this.#photo : this.#canvas;
    const [width, height] = [
      shown.naturalWidth ?? shown.width,
      shown.naturalHeight ?? shown.height,
    ];
    const edge = Math.min(width, height);
    const corner = [(width - edge) / 2, (height - edge) / 2];
    if (edge) canvas.getContext("2d").drawImage(shown, ...corner, edge, edge, 0, 0, 96, 96);
    return canvas;
  }

  #change(scene) {
    if (!this.#file) this.#earlier.push(this.#scene);
    this.#scene = scene;
    this.#file = null;
    this.#show();
  }

  #undo() {
    if (this.#file) this.#file = null;
    else if (this.#earlier.length) this.#scene = this.#earlier.pop();
    this.#show();
  }

  #put(x, y) {
    this.#change(withItem(this.#scene, itemAt(x, y, ...["shapes", "colors", "sizes"].map(chosen))));
  }

  #click({ offsetX, offsetY }) {
    const scale = EDGE / this.#canvas.clientWidth;
    this.#cursor = null;
    this.#put(offsetX * scale, offsetY * scale);
  }

  #key(event) {
    const { key } = event;
    if (key in ARROWS) this.#point(this.#cursor === null ? 4 : moved(this.#cursor, ARROWS[key]));
    else if (this.#cursor === null) return;
    else if (key === "Enter" || key === " ") {
      const { x, y } = cellCenter(this.#cursor);
      this.#put(x, y);
    } else if (key === "Delete" || key === "Backspace") {
      this.#change(withoutCell(this.#scene, this.#cursor));
    } else return;
    event.preventDefault();
  }

  #point(cell) {
    this.#cursor = cell;
    this.#draw();
  }

  #show() {
    this.id += 1;
    this.#canvas.hidden = this.#file !== null;
    this.#photo.hidden = this.#file === null;
    document.getElementById("tools").hidden = this.#file !== null;
    document.getElementById("undo").textContent = this.#file ? "Back to the scene" : "Undo";
    this.#draw();
    this.#onChange(this.#file ? QUESTIONS : questionsAbout(this.#scene));
  }

  #draw() {
    const context = this.#canvas.getContext("2d");
    drawScene(context, this.#scene, SHOWN_SCALE);
    const names = this.#scene.items.map(({ size, color, shape }) => `${size} ${color} ${shape}`);
    this.#canvas.setAttribute("aria-label", `Your scene: ${names.join(", ") || "empty"}`);
    if (this.#cursor === null) return;
    const { x, y } = cellCenter(this.#cursor);
    const edge = (EDGE / 3) * SHOWN_SCALE;
    context.lineWidth = 6;
    context.strokeStyle = "white";
    context.strokeRect(
      x * SHOWN_SCALE - edge / 2 + 6,
      y * SHOWN_SCALE - edge / 2 + 6,
      edge - 12,
      edge - 12,
    );
  }
}

/** A cell beside another, where there is one. */
function moved(cell, step) {
  const next = cell + step;
  const leavesRow = Math.abs(step) === 1 && Math.floor(next / 3) !== Math.floor(cell / 3);
  return next < 0 || next > 8 || leavesRow ? cell : next;
}

/** Radio buttons with images. */
function addChoices(id, names, icon) {
  const group = document.getElementById(id);
  names.forEach((name, index) => {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: id, value: name, checked: index === 0 });
    if (id === "sizes") input.checked = name === "large";
    input.setAttribute("aria-label", name);
    label.title = name;
    label.append(input, icon(name));
    group.append(label);
  });
}

function chosen(id) {
  return document.querySelector(`input[name=${id}]:checked`).value;
}

function shapeIcon(shape) {
  return icon({ shape, size: 13, color: "CanvasText" });
}

function colorIcon(color) {
  const swatch = icon({ shape: "circle", size: 13, color });
  swatch.className = "swatch";
  return swatch;
}

function sizeIcon(size) {
  return icon({ shape: "circle", size: SIZES[size] / 2, color: "CanvasText" });
}

function icon(item) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  // Canvas colours know no themes, so the icons take the page's text colour.
  const color = item.color === "CanvasText" ? getComputedStyle(document.body).color : item.color;
  drawShape(context, { ...item, color, x: 16, y: 16, angle: 0 });
  return canvas;
}

function onClick(id, action) {
  document.getElementById(id).addEventListener("click", action);
}
