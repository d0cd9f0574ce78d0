"""``mobilevlm search``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import checkpoint_options, goal_options, output_option
from mobilevlm.console import progress

EXAMPLES = """\b
Examples:
  mobilevlm search MobileVLM_V2-1.7B -o plan.toml --budget 3.5bpw
  mobilevlm search MobileVLM_V2-1.7B -o plan.toml --max-kl 0.02 --data samples.jsonl
  mobilevlm export MobileVLM_V2-1.7B -o bundle --recipe plan.toml
"""


@click.command("search", epilog=EXAMPLES)
@output_option("path", "Recipe file to write.", "FILE.toml")
@click.option(
    "--recipe",
    default="int4",
    show_default=True,
    metavar="NAME|FILE.toml",
    help="Recipe for everything but the decoder's layers.",
)
@goal_options
@click.option(
    "--quantizer",
    type=click.Choice(["rtn", "mse", "hqq", "gptq"]),
    default="gptq",
    show_default=True,
    help="Method that rounds weights to 2 and 4 bits.",
)
@click.option(
    "--experts",
    type=click.Choice(["plain", "fused"]),
    default="plain",
    show_default=True,
    help="Formats for each sparse expert, or one for all experts of a layer (the faster operator).",
)
@click.option(
    "--calibration",
    metavar="own|scenes|FILE.jsonl",
    help="Data for gptq, instead of the recipe's.",
)
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    help="Samples to measure on; their answers count.",
)
@checkpoint_options
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw divergence over size ([plots] extra).",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    checkpoint: Path,
    path: Path,
    recipe: str,
    budget: float | None,
    max_kl: float | None,
    quantizer: Any,
    experts: Any,
    calibration: str | None,
    data: str,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
    **origin: Any,
) -> None:
    """Find how many bits each layer of the decoder of a CHECKPOINT needs, and write a recipe file
    (needs torch)."""
    progress.enable(not quiet)
    from mobilevlm.export.search.recipe import search_recipe
    from mobilevlm.export.search.search import Goal
    from mobilevlm.model import OpenOptions
    from mobilevlm.plain_types import to_dict

    found = search_recipe(
        checkpoint,
        path,
        Goal(budget, max_kl),
        recipe=recipe,
        quantizer=quantizer,
        experts=experts,
        calibration=calibration,
        data=data,
        options=OpenOptions(**origin),
        plot=plot,
    )
    if as_json:
        show_json(
            {
                "recipe": str(path),
                "bits_per_weight": found.bits_per_weight,
                "bytes": found.allocation.size,
                "kl": found.effect.kl,
                "predicted_kl": found.allocation.kl,
                "top1_agreement": found.effect.top1_agreement,
                "layers": {
                    unit.name: {**to_dict(option.layers), "kl": option.kl, "bytes": option.size}
                    for unit, option in zip(found.units, found.allocation.options, strict=True)
                },
            }
        )
    else:
        progress.say(f"next        mobilevlm export {checkpoint} -o BUNDLE --recipe {path}")
