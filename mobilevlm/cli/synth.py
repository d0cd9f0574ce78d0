"""``mobilevlm synth``."""

from __future__ import annotations

from pathlib import Path

import click

from mobilevlm.cli.options import output_option
from mobilevlm.console import progress


@click.command("synth", epilog="\b\nExample:\n  mobilevlm synth mobilevlm_v2_1.7b -o checkpoint/")
@click.argument("name")
@output_option("folder", "Checkpoint folder to write.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(name: str, folder: Path, seed: int, quiet: bool) -> None:
    """Write a checkpoint with random weights in the official format, to measure latency without
    downloads.

    \b
    NAME:
      blip2_opt_2.7b            lfm2_vl_450m                 qwen2.5_vl_3b
      fastvlm_0.5b              lfm2_vl_1.6b                 qwen3_vl_2b
      gemma3_4b                 moe_llava_stablelm_1.6b_4e   qwen3_5_0.8b
      internvl3.5_1b            mobilevlm_v2_0.5b            qwen3_5_2b
      janus_pro_1b              mobilevlm_v2_1.7b            smolvlm_256m
      llava_v1.5_7b             mobilevlm_v2_3b              smolvlm_500m
      llava_onevision_0.5b      gemma4_e2b                   vila_1.5_3b
      llava_2b                  tiny                         voxtral_mini_3b
    """
    progress.enable(not quiet)
    from mobilevlm.synth.checkpoints import write_checkpoint

    with progress.track_share("weights") as show:
        write_checkpoint(name, folder, seed, show)
    progress.say(f"checkpoint {folder} (random weights: its answers mean nothing)")
