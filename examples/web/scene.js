// Scenes as the built-in models know them (mobilevlm/nano/scenes.py, drawing.py): flat shapes, each
// in its own cell of a 3 × 3 grid, on a muted background.

/** Pixels along an edge of the image that the model sees. */
export const EDGE = 192;
const CELL = EDGE / 3;

export const COLORS = {
  red: "rgb(214 32 36)",
  orange: "rgb(245 132 18)",
  yellow: "rgb(246 222 40)",
  green: "rgb(36 150 52)",
  blue: "rgb(32 74 206)",
  purple: "rgb(134 40 164)",
  white: "rgb(248 248 248)",
  black: "rgb(22 22 22)",
};
export const SHAPES = ["circle", "square", "triangle", "star", "heart", "cross", "ring", "moon"];
/** Half the extent in pixels. */
export const SIZES = { small: 11, medium: 18, large: 26 };
const PLACES = [
  "at the top left",
  "at the top",
  "at the top right",
  "on the left",
  "in the center",
  "on the right",
  "at the bottom left",
  "at the bottom",
  "at the bottom right",
];

/** An empty scene: { background: { kind, first, second, angle }, items: [] }. */
export function emptyScene() {
  return {
    background: { kind: "plain", first: [146, 150, 148], second: [0, 0, 0], angle: 0 },
    items: [],
  };
}

/** A shape at a point, kept inside the point's cell: { shape, color, size, cell, x, y, angle }. */
export function itemAt(x, y, shape, color, size, angle = 0) {
  const column = cellIndex(x);
  const row = cellIndex(y);
  return {
    shape,
    color,
    size,
    angle,
    cell: row * 3 + column,
    x: nearCenter(x, column, size),
    y: nearCenter(y, row, size),
  };
}

/** The scene with an item, instead of what was in its cell. */
export function withItem(scene, item) {
  return { ...scene, items: [...withoutCell(scene, item.cell).items, item] };
}

export function withoutCell(scene, cell) {
  return { ...scene, items: scene.items.filter((item) => item.cell !== cell) };
}

/** The middle of a cell. */
export function cellCenter(cell) {
  return { x: CELL * ((cell % 3) + 0.5), y: CELL * (Math.floor(cell / 3) + 0.5) };
}

/** Two to five shapes. */
export function randomScene() {
  const cells = [0, 1, 2, 3, 4, 5, 6, 7, 8].sort(() => Math.random() - 0.5);
  const count = 2 + Math.floor(Math.random() * 4);
  const background = {
    kind: choice(["plain", "gradient", "stripes"]),
    first: mutedColor(),
    second: mutedColor(),
    angle: Math.random() * Math.PI,
  };
  const items = cells.slice(0, count).map((cell) => {
    const { x, y } = cellCenter(cell);
    const [dx, dy] = [Math.random() * 40 - 20, Math.random() * 40 - 20];
    const kind = [choice(SHAPES), choice(Object.keys(COLORS)), choice(Object.keys(SIZES))];
    return itemAt(x + dx, y + dy, ...kind, Math.random() * 0.6 - 0.3);
  });
  return { background, items };
}

/** Questions that fit a scene. */
export function questionsAbout({ items }) {
  if (!items.length) return ["What do you see?", "How many shapes are there?"];
  const item = choice(items);
  const other = choice(items);
  const color = choice(Object.keys(COLORS));
  return [
    "Describe the picture.",
    "How many shapes are there?",
    `What is ${PLACES[item.cell]}?`,
    `Where is the ${other.color} ${other.shape}?`,
    `Is there ${color === "orange" ? "an" : "a"} ${color} ${item.shape}?`,
    `What size is the ${item.color} ${item.shape}?`,
  ];
}

/** Draws a scene onto a canvas context, `scale` of its pixels for each of the model's. */
export function drawScene(context, scene, scale = 1) {
  context.save();
  context.scale(scale, scale);
  drawBackground(context, scene.background);
  for (const item of scene.items) drawShape(context, item);
  context.restore();
}

/** Draws one shape around (x, y). */
export function drawShape(context, { shape, color, size, x, y, angle }) {
  const radius = SIZES[size] ?? size;
  context.save();
  context.translate(x, y);
  context.rotate(-angle);
  context.scale(radius, radius);
  context.fillStyle = COLORS[color] ?? color;
  context.fill(outline(shape), "evenodd");
  context.restore();
}

/** A shape's path in the square from -1 to 1, y down. */
function outline(shape) {
  const path = new Path2D();
  const disc = (x, y, radius) => {
    path.moveTo(x + radius, y);
    path.arc(x, y, radius, 0, 2 * Math.PI);
  };
  if (shape === "circle") disc(0, 0, 0.95);
  else if (shape === "ring") [1, 0.55].forEach((radius) => disc(0, 0, radius));
  else if (shape === "moon") addMoon(path);
  else {
    CORNERS[shape].forEach(([x, y]) => path.lineTo(x, y));
    path.closePath();
  }
  return path;
}

/** A disc without the disc of radius 0.8 around (0.45, -0.1): its outer arc, then the inner one back
 * between the same two points. */
function addMoon(path) {
  const [x, y, inner] = [0.45, -0.1, 0.8];
  const distance = Math.hypot(x, y);
  const toward = Math.atan2(y, x);
  const half = Math.acos((1 + distance ** 2 - inner ** 2) / (2 * distance));
  const innerHalf = Math.acos((distance ** 2 + inner ** 2 - 1) / (2 * distance * inner));
  path.arc(0, 0, 1, toward + half, toward - half + 2 * Math.PI);
  path.arc(x, y, inner, toward + Math.PI + innerHalf, toward + Math.PI - innerHalf, true);
}

const CORNERS = {
  square: [
    [-0.82, -0.82],
    [0.82, -0.82],
    [0.82, 0.82],
    [-0.82, 0.82],
  ],
  triangle: [
    [0, -1],
    [0.98, 0.78],
    [-0.98, 0.78],
  ],
  cross: [
    [-0.32, -1],
    [0.32, -1],
    [0.32, -0.32],
    [1, -0.32],
    [1, 0.32],
    [0.32, 0.32],
    [0.32, 1],
    [-0.32, 1],
    [-0.32, 0.32],
    [-1, 0.32],
    [-1, -0.32],
    [-0.32, -0.32],
  ],
  star: Array.from({ length: 10 }, (_, step) => {
    const reach = step % 2 ? 0.42 : 1.05;
    const turn = (Math.PI * step) / 5;
    return [reach * Math.sin(turn), -reach * Math.cos(turn)];
  }),
  heart: Array.from({ length: 48 }, (_, step) => {
    const t = (2 * Math.PI * step) / 48;
    const [one, two, three, four] = [1, 2, 3, 4].map((factor) => Math.cos(factor * t));
    return [Math.sin(t) ** 3, -(13 * one - 5 * two - 2 * three - four) / 15.5];
  }),
};

function drawBackground(context, { kind, first, second, angle }) {
  const css = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;
  context.fillStyle = css(first);
  if (kind !== "plain") {
    const [dx, dy] = [Math.cos(angle) * EDGE, Math.sin(angle) * EDGE];
    const middle = EDGE / 2;
    const shades = context.createLinearGradient(
      middle - dx / 2,
      middle - dy / 2,
      middle + dx / 2,
      middle + dy / 2,
    );
    const stops = kind === "stripes" ? 8 : 1;
    for (let stop = 0; stop <= stops; stop++) {
      shades.addColorStop(stop / stops, css(stop % 2 ? second : first));
    }
    context.fillStyle = shades;
  }
  context.fillRect(0, 0, EDGE, EDGE);
}

/** A middle tone that every one of COLORS stands out from. */
function mutedColor() {
  const base = 112 + Math.random() * 64;
  return [0, 0, 0].map(() => Math.round(base + Math.random() * 44 - 22));
}

function cellIndex(position) {
  return Math.min(2, Math.max(0, Math.floor(position / CELL)));
}

function nearCenter(position, index, size) {
  const middle = CELL * (index + 0.5);
  const room = 0.85 * (CELL / 2 - SIZES[size]);
  return Math.min(middle + room, Math.max(middle - room, position));
}

function choice(values) {
  return values[Math.floor(Math.random() * values.length)];
}
