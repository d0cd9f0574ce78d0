"""``mobilevlm bench``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import ModelOptions, format_options, model_options
from mobilevlm.console import progress
from mobilevlm.plan import engine_for_limit

if TYPE_CHECKING:
    from mobilevlm.image import ImageInput
    from mobilevlm.prompt import Sound
    from mobilevlm.runtime.bench.bench import BenchResult


_SOUND_SECONDS = 5
"""Noise that a model hears while it is measured."""


@click.command(
    "bench",
    epilog="\b\nExamples:\n  mobilevlm bench bundle/ --image photo.jpg --runs 5\n"
    "  mobilevlm bench bundle/ --device ssh://pi@raspberrypi.local --format md",
)
@model_options
@click.option("--image", metavar="FILE", help="Image to ask about; default: a grey one.")
@click.option("--no-image", is_flag=True, help="Text only, without an image or a sound.")
@click.option(
    "--text-tokens",
    type=click.IntRange(1),
    default=56,
    show_default=True,
    help="Length of the prompt without the image.",
)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option(
    "--draft-tokens",
    type=click.IntRange(0, 64),
    default=0,
    show_default=True,
    help="Tokens to guess and check at once.",
)
@click.option(
    "--codes",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Codes of an image to draw and decode in each run, where the model makes images.",
)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--plan",
    "show_plan_only",
    is_flag=True,
    help="Show what 'mobilevlm tune' chose for this machine and why, and measure nothing.",
)
@click.option(
    "--device",
    metavar="DEVICE",
    help="Measure on a device: ssh://[user@]host[:port], or adb[:serial] for Android. "
    "Missing files are copied there.",
)
@click.option(
    "--device-python",
    metavar="COMMAND",
    help="Command that starts Python on the device. Default: python3.",
)
@click.option(
    "--device-folder",
    metavar="FOLDER",
    help="Folder for files on the device. Default: ~/.cache/mobilevlm/device; on Android "
    "/data/local/tmp/mobilevlm.",
)
@format_options
def command(
    model: ModelOptions,
    image: str | None,
    no_image: bool,
    text_tokens: int,
    new_tokens: int,
    draft_tokens: int,
    codes: int,
    runs: int,
    form: str,
    show_plan_only: bool,
    device: str | None,
    device_python: str | None,
    device_folder: str | None,
) -> None:
    """Measure latency per stage of BUNDLE on this machine, or on a device."""
    if device is None and (device_python or device_folder):
        raise click.UsageError("--device-python and --device-folder belong to --device")
    if device is not None and show_plan_only:
        raise click.UsageError("--plan shows what was chosen for this machine, not for --device")
    progress.enable()
    if show_plan_only:
        _show_plan(model.bundle, model.engine, form == "json")
        return
    if device is not None:
        from mobilevlm.runtime.bench.devices.measuring import bench_on_device

        options = [
            *model.words(),
            f"--text-tokens={text_tokens}",
            f"--new-tokens={new_tokens}",
            f"--draft-tokens={draft_tokens}",
            f"--codes={codes}",
            f"--runs={runs}",
            *(["--no-image"] if no_image else []),
        ]
        result = bench_on_device(
            device,
            model.bundle,
            options,
            engine=engine_for_limit(model.engine, model.max_resident_mb),
            mmproj=model.mmproj,
            image=Path(image) if image and not no_image else None,
            python=device_python,
            folder=device_folder,
        )
        _show(result, form)
        return
    import numpy as np

    from mobilevlm.prompt import Sound
    from mobilevlm.runtime.bench.bench import run_bench

    with model.open() as vlm:
        shown: ImageInput | Sound | None = None if no_image else image
        if not no_image and not image and vlm.spec.has_images:
            edge = vlm.spec.image.usual_edge
            shown = np.full((edge, edge, 3), 128, np.uint8)
        if not no_image and not image and vlm.spec.has_sound:
            rate = vlm.spec.audio.mel.sampling_rate
            samples = np.random.default_rng(0).normal(0, 0.1, _SOUND_SECONDS * rate)
            shown = Sound((samples.astype(np.float32), rate))
        with progress.track("runs", runs + 1) as advance:
            result = run_bench(
                vlm,
                shown,
                text_tokens=text_tokens,
                new_tokens=new_tokens,
                runs=runs,
                draft_tokens=draft_tokens,
                codes=codes,
                advance=advance,
            )
    _show(result, form)


def _show(result: BenchResult, form: str) -> None:
    from mobilevlm.runtime.bench.bench import (
        as_markdown,
        described_machine,
        percentiles,
        summary,
    )

    if form == "json":
        show_json(dataclasses.asdict(result))
    elif form == "md":
        print(as_markdown(result))
    else:
        from mobilevlm.console.tables import Column, Table, say, show

        say(summary(result))
        say(described_machine(result))
        columns = (Column(name, True, True) for name in ("p50", "p90", "p99"))
        table = Table((Column("stage", True), Column("unit", True), *columns))
        for row in result.rows:
            table.add(row.name, row.unit, *percentiles(row))
        show(table)


def _show_plan(path: Path, engine: str, as_json: bool) -> None:
    from mobilevlm.bundle import open_bundle
    from mobilevlm.cli.tune import show_plan
    from mobilevlm.errors import BundleError
    from mobilevlm.plain_types import to_dict
    from mobilevlm.runtime.builtin_bundle import bundle_path
    from mobilevlm.runtime.tuning.plan_file import read_plan

    bundle = open_bundle(bundle_path(path, engine))
    tuned = read_plan(bundle)
    if tuned is None:
        raise BundleError(
            f"{path}: no plan for this processor: run 'mobilevlm tune {path}', which measures"
        )
    if as_json:
        show_json(to_dict(tuned))
    else:
        show_plan(tuned)
