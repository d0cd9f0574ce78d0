"""FastViTHD in checkpoints: its sizes by name, and its tensors as timm and as Apple's own code call
them, the latter with or without their branches fused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobilevlm.checkpoint import ListedTensors, RowRange, TensorRef
from mobilevlm.errors import CheckpointError
from mobilevlm.families.fused import Branch, FusedLayer, FusedTensors
from mobilevlm.image_encoder import ConvEncoder
from mobilevlm.linear_groups import tower_groups

TOWERS = {
    "fastvit_mci3": ConvEncoder(
        1024, (96, 192, 384, 768, 1536), (2, 12, 24, 4, 2), (4, 4, 4, 4, 4), (3, 4)
    )
}
"""By timm's names; published configurations have no sizes."""
_SIZES = {"embed_dims": "widths", "layers": "depths", "mlp_ratios": "mlp_ratios"}
"""Keys of ``model_args`` that stand in place of a table's sizes."""
_MOST = {"embed_dims": 1 << 14, "layers": 1 << 10, "mlp_ratios": 64}
_CONVOLUTIONS = ("rbr_conv.0", "rbr_scale", "lkb_origin", "small_conv")
"""Convolutions with a batch norm each whose sum a layer is before its branches are fused."""
_FUSED = ("reparam_conv", "lkb_reparam")


@dataclass(frozen=True)
class TowerNames:
    """Names of modules in one layout; ``{}`` stands for a number."""

    root: str
    stem: str
    downsamples: tuple[str, ...]
    """One for each stage; the first has none."""
    positions: tuple[str, ...]
    blocks: tuple[str, ...]
    mlp: str
    layer_scale: str
    """Ends the names of layer scales."""
    expansion: str
    squeeze: str
    excite: str
    unread: tuple[str, ...] = ()
    """Modules that features do not depend on."""

    @property
    def skipped(self) -> list[str]:
        """Regular expressions of tensors that nobody reads."""
        root = re.escape(self.root)
        modules = [rf"{root}{re.escape(module)}\." for module in self.unread]
        return [rf"{root}.*\.num_batches_tracked$", *modules]


def timm_names(spec: ConvEncoder, root: str) -> TowerNames:
    """Return the names of timm's ``FastVit``."""
    stages = [f"stages.{stage}" for stage in range(len(spec.widths))]
    return TowerNames(
        root=root,
        stem="stem.{}",
        downsamples=tuple(f"{name}.downsample.proj.{{}}" for name in stages),
        positions=tuple(f"{name}.pos_emb" for name in stages),
        blocks=tuple(f"{name}.blocks.{{}}" for name in stages),
        mlp="mlp",
        layer_scale=".gamma",
        expansion="final_conv",
        squeeze="se.fc1",
        excite="se.fc2",
    )


def apple_names(spec: ConvEncoder, root: str) -> TowerNames:
    """Return the names of Apple's ``MCi``: one list of stages and of what is between them."""
    downsamples, positions, blocks, count = [], [], [], 0
    for stage in range(len(spec.widths)):
        downsamples.append(f"network.{count}.proj.{{}}")
        count += stage > 0
        positions.append(f"network.{count}")
        count += stage in spec.attention_stages
        blocks.append(f"network.{count}.{{}}")
        count += 1
    return TowerNames(
        root=root,
        stem="patch_embed.{}",
        downsamples=tuple(downsamples),
        positions=tuple(positions),
        blocks=tuple(blocks),
        mlp="convffn",
        layer_scale="",
        expansion="conv_exp",
        squeeze="se.reduce",
        excite="se.expand",
        unread=("head",),
    )


def sized_tower(
    path: Path, name: str, size: int, arguments: dict[str, Any], channels: Any = None
) -> ConvEncoder:
    """Return the tower of a name for images of a size. ``arguments``: ``model_args`` of config.json
    (``path``); ``channels``: of the features, where it says how many.

    Raises:
        CheckpointError: the name is not known, or a value is wrong or does not fit the others.
    """
    if name not in TOWERS:
        raise CheckpointError(
            f"{path}: the vision tower {name!r:.60} is not known: expected {', '.join(TOWERS)}"
        )
    spec = TOWERS[name]
    unknown = sorted(arguments.keys() - {*_SIZES, "inference_mode"})
    if unknown:
        raise CheckpointError(
            f"{path}: 'model_args' has {unknown[0]!r:.60}, which is not supported: expected "
            f"{', '.join(_SIZES)} or inference_mode"
        )
    if arguments.get("inference_mode", True) is not True:
        raise CheckpointError(
            f"{path}: 'inference_mode' is {arguments['inference_mode']!r:.60}, expected true: save "
            f"the tower with fused branches"
        )
    stages = len(spec.widths)
    for key in _SIZES.keys() & arguments.keys():
        values, most = arguments[key], _MOST[key]
        is_list = isinstance(values, list) and len(values) == stages
        if not is_list or any(type(item) is not int or not 0 < item <= most for item in values):
            raise CheckpointError(
                f"{path}: {key!r} is {values!r:.60}, expected {stages} numbers up to {most}"
            )
    sizes: dict[str, Any] = {
        ours: tuple(arguments[key]) for key, ours in _SIZES.items() if key in arguments
    }
    spec = replace(spec, image_size=size, **sizes)
    if size % spec.stride:
        raise CheckpointError(
            f"{path}: the image size must be a multiple of the tower's stride: found {size} and "
            f"{spec.stride}"
        )
    for stage in range(1, stages):
        before, width = spec.widths[stage - 1 : stage + 1]
        heads = spec.head_dim if stage in spec.attention_stages else 1
        if width % before or width % heads:
            raise CheckpointError(
                f"{path}: 'embed_dims' has {width} after {before}, expected a multiple of it"
                f"{f' and of {heads}' * (heads > 1)}"
            )
    if channels not in (None, spec.hidden_size):
        raise CheckpointError(
            f"{path}: the vision tower's features have {spec.hidden_size} channels, but the model "
            f"was trained with {channels!r:.60} ('hidden_size' or 'mm_hidden_size')"
        )
    return spec


def tower_refs(
    files: ListedTensors, spec: ConvEncoder, names: TowerNames
) -> tuple[FusedTensors, dict[str, TensorRef]]:
    """Return the checkpoint's tensors with the tower's layers fused, and where in them the tower's
    tensors are by canonical name.

    Raises:
        CheckpointError: a tensor is missing.
    """
    linear = {name: shape for group in tower_groups(spec) for name, shape in group.shapes.items()}
    fused = FusedTensors(files, dict(_layers(files, spec, names, linear)))
    refs = {
        f"{name}.{leaf}": TensorRef(fused, f"{name}.{leaf}")
        for name in fused.layers
        for leaf in ("weight", "bias")
    }
    for stage in spec.attention_stages:
        width = spec.widths[stage]
        for index in range(spec.depths[stage]):
            ours = f"vision.stages.{stage}.blocks.{index}"
            theirs = f"{names.root}{names.blocks[stage].format(index)}"
            for number, part in enumerate("qkv"):
                rows = RowRange(number * width, (number + 1) * width, 3 * width)
                stored = f"{theirs}.token_mixer.qkv.weight"
                refs[f"{ours}.attn.{part}_proj.weight"] = TensorRef(fused, stored, rows)
            for leaf in ("weight", "bias"):
                refs[f"{ours}.norm.{leaf}"] = TensorRef(fused, f"{theirs}.norm.{leaf}")
    return fused, refs


def _layers(
    files: ListedTensors, spec: ConvEncoder, names: TowerNames, linear: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, FusedLayer]]:
    """Yield the layers with a bias by canonical name."""

    def convolution(
        ours: str, theirs: str, inputs: int, width: int, size: int
    ) -> tuple[str, FusedLayer]:
        branches = _branches(files, names.root + theirs)
        return f"vision.{ours}", FusedLayer((width, inputs, size, size), branches)

    def product(ours: str, *branches: Branch) -> tuple[str, FusedLayer]:
        return f"vision.{ours}", FusedLayer(linear[f"vision.{ours}"], branches)

    first, last = spec.widths[0], spec.widths[-1]
    yield convolution("stem.conv", names.stem.format(0), 3, first, 3)
    yield convolution("stem.depthwise", names.stem.format(1), 1, first, 3)
    yield product("stem.pointwise", *_branches(files, names.root + names.stem.format(2)))
    for stage, width in enumerate(spec.widths):
        ours = f"stages.{stage}"
        if stage:
            proj = names.downsamples[stage]
            yield convolution(f"{ours}.downsample.conv", proj.format(0), 1, width, 7)
            pointwise = _branches(files, names.root + proj.format(1))
            yield product(f"{ours}.downsample.pointwise", *pointwise)
        attends = stage in spec.attention_stages
        if attends:
            yield convolution(f"{ours}.position", names.positions[stage], 1, width, 7)
        for index in range(spec.depths[stage]):
            block = f"{ours}.blocks.{index}"
            theirs = f"{names.root}{names.blocks[stage].format(index)}"
            mixer, mlp = f"{theirs}.token_mixer", f"{theirs}.{names.mlp}"
            scale = f"{theirs}.layer_scale"
            if attends:
                factors = f"{scale}_1{names.layer_scale}"
                yield product(f"{block}.attn.out_proj", Branch(f"{mixer}.proj", factors=factors))
            else:
                shape = (width, 1, 3, 3)
                yield f"vision.{block}.mixer", FusedLayer(shape, _mixer_branches(files, mixer))
            norm = Branch(f"{mlp}.conv.conv", norm=f"{mlp}.conv.bn")
            yield f"vision.{block}.mlp.conv", FusedLayer((width, 1, 7, 7), (norm,))
            yield product(f"{block}.mlp.fc1", Branch(f"{mlp}.fc1"))
            factors = f"{scale}{'_2' if attends else ''}{names.layer_scale}"
            yield product(f"{block}.mlp.fc2", Branch(f"{mlp}.fc2", factors=factors))
    yield convolution("expansion.conv", names.expansion, 1, last * spec.expansion, 3)
    module = f"{names.root}{names.expansion}"
    yield product("expansion.squeeze", Branch(f"{module}.{names.squeeze}"))
    yield product("expansion.excite", Branch(f"{module}.{names.excite}"))


def _branches(files: ListedTensors, module: str, **more: Any) -> tuple[Branch, ...]:
    """Return what a convolution is the sum of, as far as it is stored; one that is fused if nothing
    is."""
    for name in _FUSED:
        if f"{module}.{name}.weight" in files:
            return (Branch(f"{module}.{name}", **more),)
    if f"{module}.pe.weight" in files:
        return Branch(f"{module}.pe"), Branch(None)
    found = [
        Branch(f"{module}.{name}.conv", f"{module}.{name}.bn", **more)
        for name in _CONVOLUTIONS
        if f"{module}.{name}.conv.weight" in files
    ]
    if f"{module}.rbr_skip.weight" in files:
        found.append(Branch(None, f"{module}.rbr_skip", **more))
    return tuple(found) or (Branch(f"{module}.{_FUSED[0]}"),)


def _mixer_branches(files: ListedTensors, module: str) -> tuple[Branch, ...]:
    """Return the same of a RepMixer: ``x + scale · (mixer(x) - norm(x))``."""
    if f"{module}.layer_scale" not in files:
        return _branches(files, module)
    factors = f"{module}.layer_scale"
    mixer = _branches(files, f"{module}.mixer", factors=factors)
    norm = _branches(files, f"{module}.norm", factors=factors, sign=-1)
    return (Branch(None), *mixer, *norm)
