// An image to the uint8 pixels that the vision stage takes: the same values as mobilevlm/image.py
// and mobilevlm/media, and so as the reference code, which pads or not and resizes with Pillow's
// filters. An image that other settings would split is one tile.
//
// An image is { data, width, height }: RGB bytes, row by row.

/** Longer images are not padded to a square. */
const MAX_PADDED_EDGE = 32768;
/** Fractional bits of the filter's weights (Pillow, Resample.c: 32 bits hold 8 of the value, 2 of
 * the overshoot). */
const PRECISION_BITS = 22;

/**
 * RGB pixels (size, size, 3) of an image, before mean and standard deviation.
 * @param image { data, width, height }
 * @param spec the image input's `preparation`
 * @throws {Error} the image is too long to be padded to a square
 */
export function preprocess(image, spec) {
  const { kind = "fixed_image", size } = spec;
  const filter = FILTERS[spec.resample ?? "bicubic"];
  if (kind === "tiles") {
    const [width, height] = scaled(image, spec.longest_edge);
    return resize(resize(image, width, height, filter), size, size, filter).data;
  }
  if (kind === "aspect_tiles") return resize(image, size, size, filter).data;
  if (kind === "any_resolution") return padAndResize(image, padColor(spec), size, filter).data;
  return centerCrop(resized(image, spec, filter), size);
}

/** Width and height with a longer edge of `longest` and an even shorter one. */
function scaled({ width, height }, longest) {
  const ratio = width / height;
  const short = Math.trunc(width >= height ? longest / ratio : longest * ratio);
  const even = Math.max(short + (short % 2), 1);
  return width >= height ? [longest, even] : [even, longest];
}

function resized(image, spec, filter) {
  const { aspect, size, shortest_edge: edge } = spec;
  if (aspect === "resize") return resize(image, size, size, filter);
  if (aspect === "pad") return padAndResize(image, padColor(spec), edge, filter);
  return resizeShortestEdge(image, edge, filter);
}

function padColor(spec) {
  return spec.mean.map((value) => Math.trunc(value * 255));
}

/** Pads to a square, the image at half of what is added, and resizes it to `edge`. Rows that are
 * all padding come out as padding, so only the image's own are resized. */
function padAndResize({ data, width, height }, color, edge, filter) {
  const long = Math.max(width, height);
  if (long > MAX_PADDED_EDGE) {
    throw new Error(
      `image of ${width} × ${height} pixels: longer than ${MAX_PADDED_EDGE}: scale it down or ` +
        `cut it first`,
    );
  }
  const left = (long - width) >> 1;
  const top = (long - height) >> 1;
  const narrow = filled(edge, long, color);
  const strip = filled(long, 1, color);
  for (let y = 0; y < height; y++) {
    strip.data.set(data.subarray(y * width * 3, (y + 1) * width * 3), left * 3);
    narrow.data.set(resizeRows(strip, edge, filter).data, (top + y) * edge * 3);
  }
  return resizeColumns(narrow, edge, filter);
}

function resizeShortestEdge(image, edge, filter) {
  const { width, height } = image;
  const short = Math.min(width, height);
  const long = Math.max(width, height);
  const longEdge = Math.trunc((edge * long) / short);
  const [newWidth, newHeight] = width <= height ? [edge, longEdge] : [longEdge, edge];
  if (longEdge > 64 * edge) {
    // A needle: only its middle survives the crop. An even rest leaves the middle where it is.
    const keep = 4 * short + ((long - 4 * short) % 2);
    const start = (long - keep) / 2;
    const [x, y, w, h] = width <= height ? [0, start, width, keep] : [start, 0, keep, height];
    return resizeShortestEdge(cut(image, x, y, w, h), edge, filter);
  }
  return resize(image, newWidth, newHeight, filter);
}

/** The centre; an edge shorter than `size` is padded with black, as in the reference. */
function centerCrop(image, size) {
  const wide = Math.max(image.width, size);
  const high = Math.max(image.height, size);
  if (wide !== image.width || high !== image.height) {
    const canvas = filled(wide, high, [0, 0, 0]);
    const left = Math.ceil((wide - image.width) / 2);
    const top = Math.ceil((high - image.height) / 2);
    for (let y = 0; y < image.height; y++) {
      const row = image.data.subarray(y * image.width * 3, (y + 1) * image.width * 3);
      canvas.data.set(row, ((top + y) * wide + left) * 3);
    }
    image = canvas;
  }
  return cut(image, (wide - size) >> 1, (high - size) >> 1, size, size).data;
}

/** Pillow's resize of 8-bit channels: rows, then columns, rounded to bytes after each. Since
 * version 13 columns go first where that saves much (ImagingResampleInner of its Resample.c). */
function resize(image, width, height, filter) {
  const columnsFirst = image.height - height > Math.max(0, 2 * (image.width - width));
  return columnsFirst
    ? resizeRows(resizeColumns(image, height, filter), width, filter)
    : resizeColumns(resizeRows(image, width, filter), height, filter);
}

function resizeRows({ data, width, height }, newWidth, filter) {
  if (newWidth === width) return { data, width, height };
  const { starts, weights, taps } = filterWeights(width, newWidth, filter);
  const result = new Uint8ClampedArray(newWidth * height * 3);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < newWidth; x++, to += 3) {
      accumulate(data, (y * width + starts[x]) * 3, 3, weights, x * taps, taps, result, to);
    }
  }
  return { data: result, width: newWidth, height };
}

function resizeColumns({ data, width, height }, newHeight, filter) {
  if (newHeight === height) return { data, width, height };
  const { starts, weights, taps } = filterWeights(height, newHeight, filter);
  const result = new Uint8ClampedArray(width * newHeight * 3);
  for (let y = 0, to = 0; y < newHeight; y++) {
    for (let x = 0; x < width; x++, to += 3) {
      accumulate(data, (starts[y] * width + x) * 3, width * 3, weights, y * taps, taps, result, to);
    }
  }
  return { data: result, width, height: newHeight };
}

/** One RGB pixel: the weighted sum of `taps` pixels that lie `step` bytes apart. Sums are below
 * 2³¹, and a clamped array cuts them to a byte. */
function accumulate(data, from, step, weights, first, taps, result, to) {
  const half = 1 << (PRECISION_BITS - 1);
  let red = half;
  let green = half;
  let blue = half;
  for (let tap = first; tap < first + taps; tap++, from += step) {
    const weight = weights[tap];
    if (weight === 0) continue;
    red += data[from] * weight;
    green += data[from + 1] * weight;
    blue += data[from + 2] * weight;
  }
  result[to] = red >> PRECISION_BITS;
  result[to + 1] = green >> PRECISION_BITS;
  result[to + 2] = blue >> PRECISION_BITS;
}

/** For each new position: where its window starts, and `taps` integer weights (`precompute_coeffs`
 * and `normalize_coeffs_8bpc` of Pillow's Resample.c). */
function filterWeights(size, newSize, filter) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  const taps = Math.ceil(support) * 2 + 1;
  const starts = new Int32Array(newSize);
  const weights = new Int32Array(newSize * taps);
  for (let position = 0; position < newSize; position++) {
    const center = (position + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const count = Math.min(Math.trunc(center + support + 0.5), size) - start;
    const inverse = 1 / stretch;
    const exact = [];
    let sum = 0;
    for (let tap = 0; tap < count; tap++) {
      exact.push(filter.value((tap + start - center + 0.5) * inverse));
      sum += exact[tap];
    }
    starts[position] = start;
    for (let tap = 0; tap < count; tap++) {
      const weight = (sum === 0 ? exact[tap] : exact[tap] / sum) * (1 << PRECISION_BITS);
      weights[position * taps + tap] = Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
  return { starts, weights, taps };
}

/** Keys' cubic with a = -0.5. */
function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

function bilinear(x) {
  return Math.max(1 - Math.abs(x), 0);
}

function lanczos(x) {
  return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/** Pillow's filters, and how far from its middle each reaches. */
const FILTERS = {
  bilinear: { support: 1, value: bilinear },
  bicubic: { support: 2, value: bicubic },
  lanczos: { support: 3, value: lanczos },
};

function cut({ data, width }, left, top, newWidth, newHeight) {
  const result = new Uint8Array(newWidth * newHeight * 3);
  for (let y = 0; y < newHeight; y++) {
    const from = ((top + y) * width + left) * 3;
    result.set(data.subarray(from, from + newWidth * 3), y * newWidth * 3);
  }
  return { data: result, width: newWidth, height: newHeight };
}

function filled(width, height, color) {
  const data = new Uint8Array(width * height * 3);
  for (let index = 0; index < data.length; index += 3) data.set(color, index);
  return { data, width, height };
}
