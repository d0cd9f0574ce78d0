// Manifests of schema 1, which knew one image input: read as those of today, as
// mobilevlm/schema_1.py does.

const PARTS = { image: "preparation", vision: "encoder", projector: "connector" };
const LAYOUT = { image_end_ids: "end_ids", placeholder_ids: "placeholder_ids" };

/** A manifest in today's schema: the parts of a spec without inputs are those of its image input,
 * and ids around an image, which were the conversation's, are that input's layout. */
export function upgraded(manifest) {
  let { inputs, ...spec } = manifest.spec;
  if (!inputs) {
    const [image, others] = split(spec, PARTS);
    inputs = { image };
    spec = others;
  }
  const [layout, conversation] = split(spec.conversation, LAYOUT);
  if (inputs.image && Object.keys(layout).length)
    inputs = { ...inputs, image: { ...inputs.image, layout: { ...layout, ...inputs.image.layout } } };
  return { ...manifest, spec: { ...spec, inputs, conversation } };
}

/** The values of `names` under their names of today, and the others. */
function split(data, names) {
  const moved = {};
  const others = {};
  for (const [key, value] of Object.entries(data)) {
    if (key in names) moved[names[key]] = value;
    else others[key] = value;
  }
  return [moved, others];
}
