// Image files to RGB bytes, by the browser's decoders.

/** The longest edge that canvases of all browsers have. */
const LONGEST_EDGE = 16384;

/**
 * The RGB bytes of an image file, or of drawn pixels: turned upright by its EXIF orientation,
 * alpha over white, colours as they are stored.
 * @param {Blob | ImageData} source
 * @returns {Promise<{data, width, height}>}
 * @throws {Error} no image that this browser reads, or one that is too large
 */
export async function decodeImage(source) {
  if (source instanceof ImageData) return withoutAlpha(source);
  let bitmap;
  try {
    bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("not an image that this browser reads: choose a PNG or JPEG file");
  }
  const { width, height } = bitmap;
  if (Math.max(width, height) > LONGEST_EDGE) {
    throw new Error(
      `image of ${width} × ${height} pixels: longer than ${LONGEST_EDGE}: scale it down`,
    );
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return withoutAlpha(context.getImageData(0, 0, width, height));
}

/** Opaque RGBA pixels as RGB. */
function withoutAlpha({ data, width, height }) {
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    rgb[to] = data[from];
    rgb[to + 1] = data[from + 1];
    rgb[to + 2] = data[from + 2];
  }
  return { data: rgb, width, height };
}
