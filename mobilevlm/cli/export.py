"""``mobilevlm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import checkpoint_options, goal_options, output_option
from mobilevlm.console import progress
from mobilevlm.spec import GGUF_TYPES, GGUFType, KVCache

EXAMPLES = """\b
Examples:
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-int4
  mobilevlm export llava-v1.5-7b -o llava-int8 --recipe int8 --vision-tower clip-vit-l-336
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-arm64 --weight-bits 8
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-int8 --recipe int8-calibrated
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-gguf --format gguf --gguf-type q4_k_m
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-gguf --format gguf --gguf-type q4_k_m \\
    --calibration scenes
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-small --recipe int4 --kv-cache int8
  mobilevlm export nano -o nano-ios --target ios-coreml
  mobilevlm export MobileVLM_V2-1.7B -o mobilevlm-mixed --budget 3.5bpw --plan-out plan.toml
"""


_PHOTO = '--image PHOTO --prompt "What is this?"'


@click.command("export", epilog=EXAMPLES)
@output_option("bundle", "Bundle folder to write; an older bundle there is replaced at the end.")
@click.option(
    "--target",
    metavar="NAME",
    help="Device that settles recipe, format and weight bits, and that the result is checked "
    "against ('mobilevlm targets' lists them).",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE.toml",
    help="Precision: fp32, fp16-weights, int8, int8-portable (for other runtimes), "
    "int8-calibrated, int4, int4-small, fast (int4, prefill in 8 bits), for NPUs a16w8 or a8w8, or "
    "a recipe file (default: int4).",
)
@goal_options
@click.option(
    "--plan-out",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Recipe file that --budget and --max-kl write (default: BUNDLE.toml).",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "gguf", "all", "npu"]),
    help="Artifacts to make: for ONNX Runtime (the default), for llama.cpp, both (all), or for "
    "NPUs.",
)
@click.option(
    "--gguf-type",
    type=click.Choice(GGUF_TYPES),
    help="Type of the GGUF decoder, instead of the recipe's.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE.gguf",
    help="Importance matrix to round the GGUF decoder with, from 'mobilevlm imatrix' or llama.cpp.",
)
@click.option(
    "--calibration",
    metavar="own|scenes|FILE.jsonl",
    help="Data for an importance matrix, and for gptq, awq and smoothquant: the model's own "
    "answers (default), drawn scenes, or a file of samples.",
)
@click.option(
    "--weight-bits",
    type=click.Choice(["auto", "7", "8"]),
    default="auto",
    show_default=True,
    help="Bits of int8 weights: 7 for x86 without VNNI, where 8 saturate, 8 for other devices; "
    "auto: what the recipe says, else what is right on this machine.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["fp32", "int8"]),
    help="How the ONNX decoder stores keys and values: int8 takes a fourth of the memory and makes "
    "long contexts faster, prompts a little slower (default: what the recipe says, else fp32).",
)
@click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    help="Image encoder, where CHECKPOINT is a GGUF file.",
)
@checkpoint_options
@click.option(
    "--no-measure", is_flag=True, help="Do not compare the result with the float32 reference."
)
@click.option(
    "--require-measured",
    is_flag=True,
    help="Fail where the quality of an artifact cannot be measured, instead of saying so.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="Limit of quality instead of the recipe's, as in a recipe file: decoder_kl=0.2, "
    "vision_relative_error=0.1 …; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the quality and sizes as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    checkpoint: Path,
    bundle: Path,
    target: str | None,
    recipe: str | None,
    budget: float | None,
    max_kl: float | None,
    plan_out: Path | None,
    form: str | None,
    gguf_type: GGUFType | None,
    imatrix: Path | None,
    calibration: str | None,
    weight_bits: Literal["auto", "7", "8"],
    kv_cache: KVCache | None,
    mmproj: Path | None,
    no_measure: bool,
    require_measured: bool,
    limits: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **origin: Any,
) -> None:
    """Turn a CHECKPOINT (folder of MobileVLM or LLaVA, or GGUF) into a bundle without torch."""
    progress.enable(not quiet)
    from mobilevlm.export.pipeline import export
    from mobilevlm.plain_types import to_dict

    if budget is not None or max_kl is not None:
        if form == "gguf":
            raise click.UsageError("--budget and --max-kl are for ONNX: GGUF has a type for all")
        from mobilevlm.export.search.recipe import search_recipe
        from mobilevlm.export.search.search import Goal
        from mobilevlm.model import OpenOptions

        plan = plan_out or bundle.with_name(f"{bundle.name}.toml")
        goal = Goal(budget, max_kl)
        search_recipe(
            checkpoint,
            plan,
            goal,
            recipe=recipe or "int4",
            calibration=calibration,
            options=OpenOptions(**origin),
        )
        recipe = str(plan)
        if form in (None, "onnx"):
            calibration = None  # the plan names it
    elif plan_out is not None:
        raise click.UsageError("--plan-out goes with --budget or --max-kl")
    manifest = export(
        checkpoint,
        bundle,
        recipe=recipe,
        formats=("onnx", "gguf") if form == "all" else (form,) if form else None,
        measure=not no_measure,
        gguf_type=gguf_type,
        imatrix=imatrix,
        calibration=calibration,
        mmproj=mmproj,
        weight_bits={"auto": None, "7": 7, "8": 8}[weight_bits],
        kv_cache=kv_cache,
        target=target,
        limits=_limits(limits),
        require_measured=require_measured,
        **origin,
    )
    if as_json:
        show_json(
            {
                "bundle": str(bundle),
                "bytes": sum(entry.size for entry in manifest.files.values()),
                "recipe": manifest.recipe.name,
                "quality": to_dict(manifest.quality),
                "coverage": [to_dict(part) for part in manifest.coverage],
            }
        )
    else:
        shown = '--audio SOUND --prompt "What is it?"' if manifest.spec.has_sound else _PHOTO
        progress.say(f"next        mobilevlm run {bundle} {shown}")


def _limits(given: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise click.UsageError(
                f"--limit {text[:80]!r}: expected NAME=VALUE, as decoder_kl=0.2"
            ) from None
    return found
