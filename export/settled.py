"""Settings of an export as they follow from what a person said: formats, recipe and limits, the
model, and its jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError, require
from mobilevlm.export.formats import Job
from mobilevlm.export.formats.gguf import gguf_jobs
from mobilevlm.export.formats.npu import fixed_context, npu_jobs, with_fewer_tiles
from mobilevlm.export.formats.onnx import onnx_jobs
from mobilevlm.export.quality.limits import with_limits
from mobilevlm.export.quantize.rotation import rotation_obstacle
from mobilevlm.export.recipes.file import find_recipe
from mobilevlm.export.recipes.layer_formats import DECODER_ROLES, expand_layers
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.export.targets import Target, find_target
from mobilevlm.export.targets.checks import check_tools
from mobilevlm.export.targets.obstacles import check_drawing
from mobilevlm.export.targets.other_runtimes import fit_runtime
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions
from mobilevlm.recipe import LinearFormat, Recipe, WeightBits
from mobilevlm.runtime.machine import int8_weight_bits
from mobilevlm.spec import GGUFType, KVCache, ModelSpec

JOBS: dict[str, Callable[[Model, Recipe], list[Job]]] = {
    "onnx": onnx_jobs,
    "gguf": gguf_jobs,
    "npu": npu_jobs,
}
"""Makers of each format's jobs."""
FORMATS = tuple(JOBS)


@dataclass(frozen=True)
class Wishes:
    """Arguments of an export beside the checkpoint and the bundle; the fields are parameters of
    :func:`mobilevlm.export.pipeline.export`."""

    recipe: str | None
    formats: Sequence[str] | None
    measure: bool
    gguf_type: GGUFType | None
    imatrix: str | PathLike[str] | None
    calibration: str | PathLike[str] | None
    weight_bits: WeightBits | None
    kv_cache: KVCache | None
    target: str | None
    limits: Mapping[str, float] | None
    require_measured: bool


@dataclass(frozen=True)
class Settled:
    """Settings that follow from the wishes, whatever the model."""

    formats: tuple[str, ...]
    recipe: Recipe
    target: Target | None


def settle(wishes: Wishes) -> Settled:
    """Return formats and recipe, and the target where there is one.

    Raises:
        MobileVLMError: wishes that contradict each other, or a name that is not known.
        TargetError: a tool that the target needs is missing.
    """
    formats, bits = wishes.formats, wishes.weight_bits
    goal = None if wishes.target is None else find_target(wishes.target)
    if goal is not None:
        if wishes.recipe is not None or formats is not None or bits is not None:
            raise MobileVLMError(
                f"target {goal.name} settles recipe, format and weight bits: leave them out"
            )
        formats, bits = goal.formats, goal.weight_bits
        check_tools(goal)
    formats = tuple(formats or ("onnx",))
    for name in formats:
        if name not in FORMATS:
            raise MobileVLMError(f"format {name!r} is not known: expected {', '.join(FORMATS)}")
    recipe = goal.settled() if goal else find_recipe(wishes.recipe or "int4")
    if wishes.limits:
        if not wishes.measure:
            raise MobileVLMError("--limit is checked by measuring: leave --no-measure out")
        recipe = with_limits(recipe, wishes.limits)
    if wishes.require_measured:
        if not wishes.measure:
            raise MobileVLMError("--require-measured asks for measuring: leave --no-measure out")
        if find_spec("torch") is None:
            raise require("torch", "reference", "--require-measured")
    if wishes.gguf_type is not None:
        recipe = dataclasses.replace(recipe, gguf=wishes.gguf_type)
    if wishes.kv_cache is not None:
        recipe = _with_kv_cache(recipe, wishes.kv_cache, formats)
    if wishes.imatrix is not None or wishes.calibration is not None:
        recipe = _with_data(recipe, wishes.imatrix, wishes.calibration, formats)
    return Settled(formats, _with_weight_bits(recipe, bits, formats), goal)


def settle_model(said: Settled, model: Model) -> tuple[Model, Recipe, list[Job]]:
    """Return the model as the formats have room for it, the recipe with an entry for each layer,
    and the jobs of all formats."""
    if said.target is not None and said.target.max_tiles:
        model = with_fewer_tiles(model, said.target.max_tiles)
    if said.target is not None:
        check_drawing(said.target, model.spec)
    model = fit_runtime(said.target, model)
    if "npu" in said.formats:
        model = fixed_context(model, said.recipe)
    recipe = in_stored_blocks(said.recipe, model)
    if "onnx" in said.formats:
        recipe = _as_possible(recipe, model.spec)
    recipe = expand_layers(recipe, model.spec, quiet=recipe.name in RECIPES)
    jobs = [job for form in said.formats for job in JOBS[form](model, recipe)]
    _check_vision(model, jobs)
    return model, recipe, jobs


def open_source(
    checkpoint: Path, options: OpenOptions, mmproj: Path | None, formats: Sequence[str]
) -> Model:
    """A checkpoint folder, a pair of GGUF files, or a language model in one alone."""
    if checkpoint.suffix != ".gguf":
        if mmproj is not None:
            raise MobileVLMError(f"{checkpoint}: --mmproj goes with a GGUF file, this is none")
        return open_checkpoint(checkpoint, options)
    if options != OpenOptions() or "gguf" in formats:
        raise MobileVLMError(
            f"{checkpoint}: a GGUF file becomes ONNX only, and carries its tower and conversation: "
            f"leave --format, --vision-tower, --conversation, --variant and --base out"
        )
    try:
        from mobilevlm.export.gguf.source import open_gguf
    except ImportError as error:
        raise require(error.name or "gguf", "export", f"reading {checkpoint}") from None
    return open_gguf(checkpoint, mmproj)


def _check_vision(model: Model, jobs: Sequence[Job]) -> None:
    """Raises MobileVLMError: nothing would see the images, since llama.cpp cannot."""
    forms = {(job.artifact.stage, job.artifact.format) for job in jobs}
    if ("decoder", "gguf") not in forms or ("vision", "gguf") in forms:
        return
    if model.spec.has_sound:
        if ("audio", "onnx") not in forms:
            raise MobileVLMError(
                f"{model.spec.name}: a GGUF file holds the decoder alone, which hears nothing: use "
                f"--format all, whose audio encoder is ONNX"
            )
        progress.say("audio       no GGUF file: engine hybrid uses ONNX")
        return
    if not model.spec.has_images:
        return
    from mobilevlm.export.gguf.support import check_support, obstacle

    if ("vision", "onnx") not in forms:
        check_support(model.spec)
    progress.say(f"vision      no GGUF file ({obstacle(model.spec)}): engine hybrid uses ONNX")


def _with_data(
    recipe: Recipe,
    imatrix: str | PathLike[str] | None,
    calibration: str | PathLike[str] | None,
    formats: Sequence[str],
) -> Recipe:
    """The recipe with these instead of its own."""
    if calibration is not None and set(formats) - {"gguf"} and recipe.is_calibrated:
        recipe = dataclasses.replace(recipe, calibration=str(calibration))
        if "gguf" not in formats and imatrix is None:
            return recipe
    if "gguf" not in formats:
        raise MobileVLMError(
            f"recipe {recipe.name!r} takes no calibration data for ONNX, and importance matrices "
            f"are for GGUF files: add --format gguf or all, or use gptq, awq or smoothquant"
        )
    return dataclasses.replace(
        recipe,
        gguf_imatrix=None if imatrix is None else str(Path(imatrix)),
        gguf_calibration=None if calibration is None else str(calibration),
    )


def _with_kv_cache(recipe: Recipe, kv_cache: KVCache, formats: Sequence[str]) -> Recipe:
    """The recipe with keys and values stored so."""
    if "onnx" not in formats:
        raise MobileVLMError(
            f"--kv-cache {kv_cache} is about the ONNX decoder, there is none: leave it out"
        )
    return dataclasses.replace(recipe, kv_cache=kv_cache)


def _with_weight_bits(recipe: Recipe, wanted: WeightBits | None, formats: Sequence[str]) -> Recipe:
    """The recipe with the bits of its ``int8`` weights settled."""
    if wanted is None:
        return recipe.with_weight_bits(int8_weight_bits() or 7, auto_only=True)
    if "onnx" not in formats or not recipe.has_int8:
        raise MobileVLMError(
            f"recipe {recipe.name!r} has no int8 weights in ONNX that --weight-bits {wanted} could "
            f"be about: leave it out"
        )
    return recipe.with_weight_bits(wanted, auto_only=False)


def _as_possible(recipe: Recipe, spec: ModelSpec) -> Recipe:
    """Return the recipe; a built-in one leaves out what the decoder cannot have: calibration where
    it has an encoder, and rotation.

    Raises:
        MobileVLMError: a recipe file asks for a rotation that cannot be. (Its calibration is
            refused with the graphs.)
    """
    decoders = {_as_named(named.decoder) for named in RECIPES.values()}
    is_built_in = _as_named(recipe.decoder) in decoders
    if is_built_in and spec.decoder.encoder_layers and recipe.decoder.needs_reference:
        progress.say(f"calibration left out: the decoder of {spec.name} has an encoder")
        recipe = _without_data(recipe)
    obstacle = rotation_obstacle(spec.decoder)
    if obstacle is None or not recipe.is_rotated:
        return recipe
    if not is_built_in:
        raise MobileVLMError(
            f"recipe {recipe.name!r}: decoder.scaling: the residual stream of {spec.name} cannot "
            f'be rotated, it has {obstacle}: set scaling = "none"'
        )
    progress.say(f"rotation    left out: the decoder of {spec.name} has {obstacle}")
    return recipe.without_rotation()


def _without_data(recipe: Recipe) -> Recipe:
    """Return the recipe with a decoder and head that are rounded without calibration, roles
    included."""
    layers = dict(recipe.layers)
    layers |= {key: one.without_data() for key, one in layers.items() if key in DECODER_ROLES}
    decoder, head = recipe.decoder.without_data(), recipe.lm_head.without_data()
    return dataclasses.replace(recipe, decoder=decoder, lm_head=head, layers=layers)


def _as_named(layers: LinearFormat) -> LinearFormat:
    """Return a format as it is before the bits of int8 weights are settled."""
    return dataclasses.replace(layers, weight_bits="auto")


def in_stored_blocks(recipe: Recipe, model: Model) -> Recipe:
    """Return the recipe; a built-in one with 4 bits reuses the blocks of a model in llama.cpp's
    Q4_0, so that nothing is rounded again."""
    decoder = model.spec.decoder
    last = f"{decoder.mlp_names(0)[0]}.{decoder.mlp_linears[1]}.weight"
    is_built_in = recipe.name in RECIPES and recipe.decoder == RECIPES["int4"].decoder
    if not is_built_in or model.weights.q4_0(last) is None:
        return recipe
    stored = LinearFormat("q4")
    head = recipe.lm_head if model.weights.q4_0("decoder.lm_head.weight") is None else stored
    layers = {key: one for key, one in recipe.layers.items() if key not in DECODER_ROLES}
    return dataclasses.replace(recipe, decoder=stored, lm_head=head, layers=layers)
