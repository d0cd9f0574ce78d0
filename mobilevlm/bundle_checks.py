"""What a manifest says against itself and against the files that are there.

A bundle may be a stranger's: its numbers decide how much memory is taken and how long loops run. So
each is bounded before anything is built, by the bytes of the bundle's files: whatever a model
consists of has weights there.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mobilevlm.errors import BundleError
from mobilevlm.input_spec import (
    MOST_GRIDS,
    MOST_TILES,
    AnyResolution,
    AspectTiles,
    FixedImage,
    SquareImages,
    Tiles,
)
from mobilevlm.linear_groups import LinearGroup, decoder_groups, projector_groups, tower_groups
from mobilevlm.protobuf import external_files
from mobilevlm.recipe import PARTS, PREFILL
from mobilevlm.regular_file import leaves_folder

if TYPE_CHECKING:
    from mobilevlm.bundle import Artifact, Manifest
    from mobilevlm.decoder_spec import DecoderSpec
    from mobilevlm.input_spec import ConnectorSpec, ConvEncoder, Encoder
    from mobilevlm.spec import ModelSpec

MOST_POSITIONS = 1 << 20
"""Of a context"""
MOST_LAYERS = 1 << 12
MOST_STAGES = 16
"""Stages of a convolutional encoder"""
MOST_AXES = 4
"""Axes of a position"""
MOST_KERNEL = 64
"""Positions that a short convolution reads"""
MOST_EXPERTS = 1 << 16
"""Experts of all layers together"""
LEAST_BITS = 2
"""Of a weight in a file"""
SUFFIXES = {"onnx": ".onnx", "npu": ".onnx", "ort": ".ort", "gguf": ".gguf"}
"""How files that engines open end, by the format of the artifact"""
MAX_ENLARGED = 8
"""How many times as large as the tower's input an image may be made before it is cropped"""

_Check: TypeAlias = tuple[str, object, bool, str]
"""Field, value, whether it is right, and what is expected"""


def check_file(folder: Path, name: str) -> os.stat_result:
    """Return the status of a file of a bundle; raise BundleError unless it is a regular file in the
    folder (or a link of the Hugging Face cache)."""
    path = folder / name
    try:
        status = path.stat()
        outside = leaves_folder(path, folder)
    except (OSError, ValueError, RuntimeError):  # names that no file can have; links in a circle
        raise BundleError(f"{path}: the file is missing from the bundle: export it again") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file: copy or export the bundle again")
    if outside:
        raise BundleError(f"{path}: a link that leaves the bundle: put the file itself there")
    return status


def check_graph(folder: Path, name: str, listed: Iterable[str]) -> None:
    """Check that an ONNX file keeps its weights in listed files beside it, whatever the version of
    onnxruntime would open.

    Raises:
        BundleError: it names another file, or is no ONNX file.
    """
    path = folder / name
    try:
        found = external_files(path)
    except (ValueError, OSError):
        raise BundleError(
            f"{path}: damaged or no ONNX file: copy or export the bundle again"
        ) from None
    beside = Path(name).parent
    for place in sorted(found):
        if (beside / place).as_posix() not in listed or Path(place).name != place:
            raise BundleError(
                f"{path}: its weights are in {place!r:.100}, which is no file of the bundle: "
                f"export the bundle again"
            )


def check_manifest(manifest: Manifest, where: Path) -> None:
    """Check the numbers of a manifest whose files have the sizes that it says. ``where``: its path.

    Raises:
        BundleError: a number is out of its range, or contradicts another one or the files.
    """
    spec = manifest.spec
    total = sum(entry.size for entry in manifest.files.values())
    # One after the other: later checks compute with what earlier ones have found right.
    checks = chain(
        _image(spec),
        _vision(spec.image.encoder, total),
        _projector(spec, total),
        _decoder(spec.decoder, total),
        _conversation(spec),
        _recipe(manifest),
        _artifacts(manifest.artifacts),
        _stored(manifest),
    )
    for name, value, is_right, expected in checks:
        if not is_right:
            raise BundleError(
                f"{where}: {name} is {_short(value)}, expected {expected}: export the bundle again"
            )


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"


def _whole(part: str, values: dict[str, int], least: int = 1) -> Iterator[_Check]:
    for name, value in values.items():
        yield f"{part}.{name}", value, least <= value < 1 << 31, f"{least} or more"


def _positive(part: str, values: dict[str, float]) -> Iterator[_Check]:
    for name, value in values.items():
        yield f"{part}.{name}", value, 0 < value < math.inf, "a positive number"


def _weights(part: str, count: int, total: int) -> _Check:
    """Check that so many weights may be in the files."""
    what = f"the number of weights that {part} needs"
    return what, count, count * LEAST_BITS <= 8 * total, f"what {total} bytes of files can hold"


def _size(groups: Iterable[LinearGroup]) -> int:
    return sum(group.size for group in groups)


def _image(spec: ModelSpec) -> Iterator[_Check]:
    image, edge = spec.image.preparation, spec.image.encoder.image_size
    if not isinstance(image, SquareImages):
        yield "image.kind", image.kind, False, "one of squares, which encoders here take"
        return
    yield from _whole("image", {"size": image.size})
    yield "image.size", image.size, image.size == edge, f"the tower's {_short(edge)}"
    if isinstance(image, AspectTiles):
        yield from _whole("image", {"min_tiles": image.min_tiles, "max_tiles": image.max_tiles})
        is_right = image.min_tiles <= image.max_tiles <= MOST_TILES
        yield "image.max_tiles", image.max_tiles, is_right, f"min_tiles to {MOST_TILES}"
    elif isinstance(image, AnyResolution):
        yield from _any_resolution(image)
    else:
        longest = image.shortest_edge if isinstance(image, FixedImage) else image.longest_edge
        name = "shortest_edge" if isinstance(image, FixedImage) else "longest_edge"
        yield from _whole("image", {name: longest})
        most = MAX_ENLARGED * image.size
        yield f"image.{name}", longest, longest <= most, f"at most {_short(most)}"
    projector, is_assembled = spec.image.connector, isinstance(image, AnyResolution)
    is_right = projector.newline == is_assembled and (projector.kind == "mlp" or not is_assembled)
    yield "projector.newline", projector.newline, is_right, "one of any_resolution and an MLP"
    if isinstance(image, Tiles) and spec.image.layout.tile_ids:
        marks, count = spec.image.layout.tile_ids, image.most_per_edge
        is_right = len(marks) >= count <= min(map(len, marks))
        yield "layout.tile_ids", len(marks), is_right, f"{count} rows and columns at least"
    for name, value in (("mean", image.mean), ("std", image.std)):
        is_right = all(0 <= item <= 1 for item in value) and (name == "mean" or min(value) > 0)
        yield f"image.{name}", value, is_right, "shares of the brightest value"


def _any_resolution(image: AnyResolution) -> Iterator[_Check]:
    counts = {"most_tiles": image.most_tiles, "max_tiles": image.max_tiles}
    yield from _whole("image", counts, 0)
    count = len(image.grids)
    yield "image.grids", count, 0 < count <= MOST_GRIDS, f"1 to {MOST_GRIDS}"
    is_right = all(
        min(grid) > 0 and grid[0] * grid[1] <= MOST_TILES for grid in image.grids[:MOST_GRIDS]
    )
    expected = f"rows and columns of up to {MOST_TILES} tiles"
    yield "image.grids", image.grids[:MOST_GRIDS], is_right, expected


def _vision(vision: Encoder, total: int) -> Iterator[_Check]:
    if vision.kind == "conv":
        yield from _conv_encoder(vision, total)
        return
    numbers = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    yield from _whole("vision", numbers)
    yield from _positive("vision", {"layer_norm_eps": vision.layer_norm_eps})
    yield _layers("vision.num_hidden_layers", vision.num_hidden_layers)
    hidden, heads = vision.hidden_size, vision.num_attention_heads
    yield "vision.hidden_size", hidden, hidden % heads == 0, f"a multiple of {_short(heads)} heads"
    patch, edge = vision.patch_size, vision.image_size
    yield "vision.patch_size", patch, patch <= edge, f"at most the image's {_short(edge)}"
    positions = vision.num_positions + 3 * patch**2
    yield _weights("vision", _size(tower_groups(vision)) + hidden * positions, total)


def _conv_encoder(vision: ConvEncoder, total: int) -> Iterator[_Check]:
    stages = len(vision.widths)
    yield "vision.widths", vision.widths, 1 <= stages <= MOST_STAGES, f"1 to {MOST_STAGES} stages"
    for name in ("widths", "depths", "mlp_ratios"):
        values = getattr(vision, name)
        is_right = len(values) == stages and all(1 <= value < 1 << 31 for value in values)
        yield f"vision.{name}", values, is_right, f"{stages} numbers"
    numbers = {
        "image_size": vision.image_size,
        "head_dim": vision.head_dim,
        "expansion": vision.expansion,
        "squeeze_ratio": vision.squeeze_ratio,
    }
    yield from _whole("vision", numbers)
    yield from _positive("vision", {"layer_norm_eps": vision.layer_norm_eps})
    yield _layers("vision.depths", sum(vision.depths))
    edge, stride = vision.image_size, vision.stride
    yield "vision.image_size", edge, edge % stride == 0, f"a multiple of {_short(stride)}"
    attending = vision.attention_stages
    is_right = all(0 <= stage < stages for stage in attending)
    is_right = is_right and list(attending) == sorted(set(attending))
    yield "vision.attention_stages", attending, is_right, "stages, in order"
    for stage, (before, width) in enumerate(zip((1, *vision.widths), vision.widths, strict=False)):
        heads = vision.head_dim if stage in attending else 1
        is_right = width % before == 0 and width % heads == 0
        yield "vision.widths", width, is_right, f"multiples of {_short(before)} and {_short(heads)}"
    yield "vision.squeeze_ratio", vision.squeeze_size, vision.squeeze_size > 0, "channels left over"
    yield _weights("vision", _size(tower_groups(vision)), total)


def _layers(name: str, count: int) -> _Check:
    return name, count, count <= MOST_LAYERS, f"at most {MOST_LAYERS}"


def _projector(spec: ModelSpec, total: int) -> Iterator[_Check]:
    projector, vision = spec.image.connector, spec.image.encoder
    whole = {
        "depth": projector.depth,
        "out_size": projector.out_size,
        "factor": projector.factor,
    }
    yield from _whole("projector", whole)
    yield _layers("projector.depth", projector.depth)
    for name, value, expected in (
        ("in_size", projector.in_size, vision.hidden_size),
        ("grid", projector.grid, vision.grid),
        ("out_size", projector.out_size, spec.decoder.hidden_size),
    ):
        yield f"projector.{name}", value, value == expected, str(expected)
    is_grid = 0 <= projector.out_grid <= projector.grid
    yield "projector.out_grid", projector.out_grid, is_grid, f"0 to {projector.grid}"
    if projector.kind == "mlp_downsample":
        squares = -(-projector.grid // projector.factor)
        fits = projector.out_grid == squares
        yield "projector.out_grid", projector.out_grid, fits, f"{squares}"
    has_queries = (projector.qformer is not None) == (projector.kind == "qformer")
    yield "projector.kind", projector.kind, has_queries, "that of its parts"
    yield from _qformer(projector, total)
    yield "the number of visual tokens", projector.num_tokens, projector.num_tokens > 0, "1 or more"
    yield _weights("projector", _size(projector_groups(projector)), total)


def _qformer(projector: ConnectorSpec, total: int) -> Iterator[_Check]:
    queries = projector.qformer
    if queries is None:
        return
    numbers = {
        "hidden_size": queries.hidden_size,
        "intermediate_size": queries.intermediate_size,
        "num_hidden_layers": queries.num_hidden_layers,
        "num_attention_heads": queries.num_attention_heads,
        "cross_attention_frequency": queries.cross_attention_frequency,
        "num_queries": queries.num_queries,
    }
    yield from _whole("qformer", numbers)
    texts = {"vocab_size": queries.vocab_size, "max_positions": queries.max_positions}
    yield from _whole("qformer", texts, 0)
    yield from _positive("qformer", {"layer_norm_eps": queries.layer_norm_eps})
    yield _layers("qformer.num_hidden_layers", queries.num_hidden_layers)
    hidden, heads = queries.hidden_size, queries.num_attention_heads
    yield "qformer.hidden_size", hidden, hidden % heads == 0, f"a multiple of {_short(heads)} heads"
    rows = queries.num_queries + queries.vocab_size + queries.max_positions
    yield _weights("qformer", hidden * rows, total)


def _decoder(decoder: DecoderSpec, total: int) -> Iterator[_Check]:
    numbers = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_attention_heads": decoder.num_attention_heads,
        "num_key_value_heads": decoder.num_key_value_heads,
        "head_dim": decoder.head_dim,
        "context_length": decoder.context_length,
    }
    yield from _whole("decoder", numbers)
    yield from _whole("decoder", {"encoder_layers": decoder.encoder_layers}, 0)
    floats = {
        "norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": decoder.rope_scaling,
        "attention_scale": decoder.score_scale,
        "embed_scale": decoder.embed_scale,
        "sliding_rope_theta": decoder.sliding_rope_theta,
        "attention_softcap": decoder.attention_softcap,
        "logit_softcap": decoder.logit_softcap,
    }
    given = {name: value for name, value in floats.items() if value is not None}
    yield from _positive("decoder", given)
    for name in ("num_hidden_layers", "encoder_layers"):
        yield _layers(f"decoder.{name}", getattr(decoder, name))
    length = decoder.context_length
    yield "decoder.context_length", length, length <= MOST_POSITIONS, f"at most {MOST_POSITIONS}"
    heads, groups = decoder.num_attention_heads, decoder.num_key_value_heads
    expected = f"a divisor of {_short(heads)} heads"
    yield "decoder.num_key_value_heads", groups, heads % groups == 0, expected
    channels, most = decoder.rotary_channels, decoder.head_dim
    is_right = 0 <= channels <= most and channels % 2 == 0
    yield "decoder.rotary_dim", channels, is_right, f"an even number up to {_short(most)}"
    start = decoder.start_token_id
    is_right = 0 <= start < decoder.vocab_size
    yield "decoder.start_token_id", start, is_right, "an id of the vocabulary"
    yield from _blocks(decoder)
    buckets = decoder.relative_positions
    if buckets is not None:
        values = {"num_buckets": buckets.num_buckets, "max_distance": buckets.max_distance}
        yield from _whole("decoder.relative_positions", values)
        yield _weights("decoder.relative_positions", buckets.num_buckets * heads, total)
    yield from _experts(decoder)
    yield _weights("decoder", _size(decoder_groups(decoder)), total)


def _blocks(decoder: DecoderSpec) -> Iterator[_Check]:
    yield from _whole("decoder", {"sliding_window": decoder.sliding_window}, 0)
    is_right = decoder.embed_scale == 1 or not decoder.encoder_layers
    yield "decoder.embed_scale", decoder.embed_scale, is_right, "1 beside an encoder"
    layers, window = decoder.sliding_layers, decoder.sliding_window
    is_right = _ascending(layers, decoder) and (window > 0) == (len(layers) > 0)
    yield "decoder.sliding_layers", layers, is_right, "layers of the decoder, and a sliding_window"
    is_right = not (decoder.post_norms and decoder.parallel_residual)
    yield "decoder.post_norms", decoder.post_norms, is_right, "none beside parallel_residual"
    sections, pairs = decoder.rope_sections, decoder.rotary_channels // 2
    is_right = not sections or (min(sections) >= 0 and sum(sections) == pairs)
    is_right = is_right and len(sections) <= MOST_AXES
    yield "decoder.rope_sections", sections, is_right, f"up to {MOST_AXES}, together {pairs}"
    other = "learned_positions" if decoder.learned_positions else "sliding_rope_theta"
    is_right = not (sections and getattr(decoder, other))
    yield "decoder.rope_sections", sections, is_right, f"none beside {other}"
    layers, kernel = decoder.conv_layers, decoder.conv_kernel
    is_right = _ascending(layers, decoder) and len(layers) < decoder.num_hidden_layers
    yield "decoder.conv_layers", layers, is_right, "layers of the decoder, and not all of them"
    is_right = 2 <= kernel <= MOST_KERNEL if layers else kernel == 0
    yield "decoder.conv_kernel", kernel, is_right, f"2 to {MOST_KERNEL} where there are conv_layers"
    is_right = _ascending(decoder.deep_layers, decoder)
    yield "decoder.deep_layers", decoder.deep_layers, is_right, "layers of the decoder"
    for name in (
        "qk_norm",
        "post_norms",
        "sliding_layers",
        "attention_softcap",
        "logit_softcap",
        "rope_sections",
        "conv_layers",
        "deep_layers",
    ):
        value = getattr(decoder, name)
        is_right = not (value and decoder.encoder_layers)
        yield f"decoder.{name}", value, is_right, "none beside an encoder (encoder_layers)"


def _ascending(layers: tuple[int, ...], decoder: DecoderSpec) -> bool:
    """Return whether these are different layers of the decoder, in order."""
    inside = all(0 <= layer < decoder.num_hidden_layers for layer in layers)
    return inside and list(layers) == sorted(set(layers))


def _experts(decoder: DecoderSpec) -> Iterator[_Check]:
    experts = decoder.experts
    if experts is None:
        return
    layers, counts = experts.layers, experts.num_experts
    is_right = list(layers) == sorted(set(layers)) and len(layers) == len(counts) > 0
    is_right = is_right and layers[0] >= 0 and layers[-1] < decoder.num_hidden_layers
    yield "experts.layers", layers, is_right, "layers of the decoder, each with its experts"
    is_right = all(1 <= experts.top_k <= count < 1 << 16 for count in counts)
    yield "experts.num_experts", counts, is_right, f"at least top_k {_short(experts.top_k)}"
    yield (
        "the number of experts",
        sum(counts),
        sum(counts) <= MOST_EXPERTS,
        f"at most {MOST_EXPERTS}",
    )


def _conversation(spec: ModelSpec) -> Iterator[_Check]:
    for name, ids in (
        ("conversation.eos_token_ids", spec.conversation.eos_token_ids),
        ("the ids of inputs.image.layout", spec.image.layout.ids),
    ):
        is_right = all(0 <= item < spec.decoder.vocab_size for item in ids)
        yield name, ids, is_right, "ids of the vocabulary"


def _recipe(manifest: Manifest) -> Iterator[_Check]:
    recipe = manifest.recipe
    formats = {part: getattr(recipe, part) for part in (*PARTS, PREFILL)}
    for name, layers in {**formats, **recipe.layers}.items():
        size = 32 if layers is None else layers.block_size
        yield f"recipe.{name}.block_size", size, 1 <= size <= 1 << 16, "a number of weights"
    stages = {artifact.stage for artifact in manifest.artifacts}
    is_right = recipe.prefill is not None or PREFILL not in stages
    yield "recipe.prefill", recipe.prefill, is_right, "the format of the prefill graph"


def _artifacts(artifacts: tuple[Artifact, ...]) -> Iterator[_Check]:
    paths = [artifact.path for artifact in artifacts]
    for artifact in artifacts:
        path, suffix = artifact.path, SUFFIXES[artifact.format]
        yield "artifacts.path", path, paths.count(path) == 1, "a file of one artifact only"
        yield "artifacts.path", path, path.endswith(suffix), f"a file that ends in {suffix}"
        bits = artifact.bits_per_weight
        yield "artifacts.bits_per_weight", bits, bits is None or 0 < bits <= 64, "up to 64"
        if artifact.format in ("npu", "ort") and artifact.stage == "decoder" and artifact.data:
            path = artifact.data[0]  # the graph for single tokens
            yield "artifacts.data", path, path.endswith(suffix), f"a file that ends in {suffix}"


def _stored(manifest: Manifest) -> Iterator[_Check]:
    decoder, table, system = manifest.spec.decoder, manifest.embeddings, manifest.system_prompt
    if table is not None:
        shape, expected = (table.rows, table.columns), (decoder.vocab_size, decoder.hidden_size)
        yield "embeddings.rows and columns", shape, shape == expected, str(expected)
        size, item = manifest.files[table.path].size, int(table.dtype[-2:]) // 8
        end = table.offset + table.rows * table.columns * item
        is_right = table.offset >= 0 and table.offset % item == 0 and end <= size
        yield "embeddings.offset", table.offset, is_right, f"rows within {size} bytes"
    if system is not None:
        ids = system.ids
        is_right = all(0 <= item < decoder.vocab_size for item in ids)
        yield "system_prompt.ids", ids, is_right, "ids of the vocabulary"
