"""Artifacts for NPUs: graphs of fixed shapes and standard operators, in fixed point or in float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mobilevlm.console import progress
from mobilevlm.console.progress import Advance
from mobilevlm.errors import require
from mobilevlm.export.calibration.data import find_samples
from mobilevlm.export.calibration.stages import calibration_key
from mobilevlm.export.formats import (
    EMBEDDINGS,
    ENCODED,
    Job,
    Written,
    encoder_settings,
    make_job,
    refuse,
)
from mobilevlm.export.recipes.layer_formats import bits_per_weight
from mobilevlm.input_spec import MOST_TILES, FixedImage, Tiled
from mobilevlm.linear_groups import linear_groups
from mobilevlm.model import Model
from mobilevlm.plain_types import to_dict
from mobilevlm.preparation import most_pieces, with_max_tiles
from mobilevlm.prompt import count_positions
from mobilevlm.recipe import QDQ, Recipe
from mobilevlm.spec import ModelSpec, with_image


def npu_jobs(model: Model, recipe: Recipe) -> list[Job]:
    """All stages of a model as graphs for NPUs: float ones have elementary operators. The decoder
    is two graphs with one file of weights."""
    try:
        from mobilevlm.export.fixed_shapes.decoder import author_qdq_decoder
        from mobilevlm.export.fixed_shapes.float_decoder import author_float_decoder
        from mobilevlm.export.fixed_shapes.vision import author_qdq, check_onnx
        from mobilevlm.export.graph import author
    except ImportError as error:
        raise require(error.name or "onnxscript", "export", "exporting for NPUs") from None
    check_onnx()
    refuse(_refusals(model.spec, recipe))
    if recipe.is_rotated:
        progress.say("rotation    left out of graphs for NPUs")
        recipe = recipe.without_rotation()
    if recipe.is_float:
        recipe = replace(recipe, operators="elementary")
    recipe = recipe.with_weight_bits(8, auto_only=True)
    spec, samples = model.spec, [] if recipe.is_float else find_samples(recipe.calibration, model)
    window = spec.decoder.context_length
    lengths = min(recipe.chunk_length, window), 1
    shapes = [author.ChunkShape(length, window) for length in lengths]
    table = "" if recipe.embeddings == "fp32" else f"_{recipe.embeddings}"
    tower, suffix = (
        "" if recipe.is_float else f"_{part.precision}" for part in (recipe.tower, recipe.decoder)
    )
    prefill, token = (f"npu/decoder_{part}{suffix}.onnx" for part in ("prefill", "token"))
    shared = f"npu/decoder{suffix}.onnx_data"

    def write_vision(path: Path, advance: Advance) -> Written:
        if recipe.is_float:
            return author.author_encoded(model.weights, spec, recipe, path, advance)
        return author_qdq(samples, model.weights, spec, recipe, path, advance)

    def write_table(path: Path, advance: Advance) -> Written:
        return author.author_embeddings(model.weights, spec, recipe, path, advance)

    def write_decoder(path: Path, advance: Advance) -> Written:
        paths = [path, path.parent / Path(token).name]
        data = path.parent / Path(shared).name
        if recipe.is_float:
            return author_float_decoder(model, recipe, paths, shapes, data, advance)
        return author_qdq_decoder(model, samples, recipe, paths, shapes, data, advance)

    key = [] if recipe.is_float else calibration_key(model, samples)
    form = [recipe.layer_norm, recipe.operators]
    images, decoder = encoder_settings(spec), to_dict(spec.decoder)
    sizes = [to_dict(shape) for shape in shapes]
    language = [*images, decoder, to_dict(recipe.decoder), form, sizes, key]
    # Of images it is calibrated with all.
    prefixes = ("decoder.", *ENCODED)
    return [
        make_job(
            model, "npu", "vision", recipe.tower.precision,
            _with_data(f"npu/vision_encoder{tower}.onnx"), ENCODED,
            [*images, to_dict(recipe.tower), form, key], write_vision,
            bits_per_weight=_bits(spec, recipe, ENCODED),
        ),
        make_job(
            model, "npu", "embeddings", recipe.embeddings,
            _with_data(f"npu/embed_tokens{table}.onnx"), EMBEDDINGS, [decoder], write_table,
        ),
        make_job(
            model, "npu", "decoder", recipe.decoder.precision, (prefill, token, shared), prefixes,
            language, write_decoder, bits_per_weight=_bits(spec, recipe, prefixes),
        ),
    ]  # fmt: skip


def _refusals(spec: ModelSpec, recipe: Recipe) -> list[tuple[bool, str]]:
    """Return the conditions that rule these graphs out, each with its error line."""
    missing = "no graphs for NPUs of {} yet: use --format onnx"
    if spec.has_sound:
        return [(True, missing.format("models that take sound"))]
    if not spec.has_images:
        return [(True, missing.format("language models without images"))]
    image = spec.image.preparation
    parts = {
        f"images prepared as {image.kind!r}": not isinstance(image, FixedImage | Tiled),
        "a decoder with an encoder": spec.decoder.encoder_layers > 0,
        "a decoder with learned positions": spec.decoder.learned_positions,
        "images whose rows see each other": spec.decoder.image_blocks,
        "a Q-Former": spec.image.connector.qformer is not None,
        **{f"a decoder with {part}": True for part in spec.decoder.rare_parts},
    }
    whole = recipe.is_for_npu or recipe.is_float
    return [
        *((there, missing.format(part)) for part, there in parts.items()),
        (
            not whole or recipe.needs_reference,
            f"recipe {recipe.name!r}: graphs for NPUs are in fixed point as a whole, rounded to "
            f"nearest, or in float: choose --recipe a16w8, a8w8 or fp32, or {' or '.join(QDQ)} for "
            f"all parts",
        ),
        (
            recipe.elementary and not recipe.is_float,
            f"recipe {recipe.name!r}: elementary operators are for graphs in float: leave "
            f"'operators' out",
        ),
    ]


def _with_data(path: str) -> tuple[str, str]:
    return path, f"{path}_data"


def _bits(spec: ModelSpec, recipe: Recipe, prefixes: tuple[str, ...]) -> float:
    groups = [group for group in linear_groups(spec) if f"{group.name}.".startswith(prefixes)]
    return round(bits_per_weight(recipe, groups), 4)


def fixed_context(model: Model, recipe: Recipe) -> Model:
    """Return the model with no more context than graphs of fixed shapes have room for, and images
    in no more tiles than this has room for."""
    context = min(model.spec.decoder.context_length, recipe.context_length)
    decoder = replace(model.spec.decoder, context_length=context)
    return _fitting(replace(model, spec=replace(model.spec, decoder=decoder)))


def with_fewer_tiles(model: Model, most: int) -> Model:
    """Return the model with images in no more than ``most`` tiles; as it is where none is split."""
    image = model.spec.inputs.get("image")
    if image is None or not isinstance(image.preparation, Tiled):
        return model
    preparation = with_max_tiles(image, most).preparation
    return replace(model, spec=with_image(model.spec, preparation=preparation))


def _fitting(model: Model) -> Model:
    """Return the model with images in so many tiles that the context has as much room for text."""
    room = model.spec.decoder.context_length // 2
    image = model.spec.inputs.get("image")
    if image is None or not isinstance(image.preparation, Tiled):
        return model
    if count_positions(most_pieces(image)) <= room:
        return model
    for most in range(MOST_TILES, 0, -1):
        found = with_fewer_tiles(model, most)
        if count_positions(most_pieces(found.spec.image)) <= room:
            break
    progress.say(
        f"tiles       an image becomes at most {most}, so that half of the "
        f"{model.spec.decoder.context_length} positions are for text"
    )
    return found
