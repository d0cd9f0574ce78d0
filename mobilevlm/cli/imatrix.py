"""``mobilevlm imatrix``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mobilevlm.cli.options import checkpoint_options, output_option
from mobilevlm.console import progress

EXAMPLES = """\b
Examples:
  mobilevlm imatrix MobileVLM_V2-1.7B -o importance.gguf
  mobilevlm imatrix MobileVLM_V2-1.7B -o importance.gguf --calibration samples.jsonl
  mobilevlm export MobileVLM_V2-1.7B -o bundle --format gguf --gguf-type q4_k_m \\
    --imatrix importance.gguf

\b
A line of samples.jsonl ("answer" may be left out):
  {"image": "photo.jpg", "prompt": "What is this?", "answer": "A cat."}
"""


@click.command("imatrix", epilog=EXAMPLES)
@output_option("path", "File to write, in llama.cpp's format.", "FILE.gguf")
@click.option(
    "--calibration",
    default="own",
    show_default=True,
    metavar="own|scenes|FILE.jsonl",
    help="Data to run the model on: its own answers, drawn scenes, or a file of samples.",
)
@checkpoint_options
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    checkpoint: Path,
    path: Path,
    calibration: str,
    quiet: bool,
    **origin: Any,
) -> None:
    """Run a CHECKPOINT on calibration data and write how strong each input of the decoder's
    matrices is; GGUF export then rounds the weights that matter better."""
    progress.enable(not quiet)
    from mobilevlm.export.gguf.imatrix_file import export_imatrix

    export_imatrix(checkpoint, path, calibration=calibration, **origin)
