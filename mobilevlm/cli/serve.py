"""``mobilevlm serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mobilevlm.cli.options import (
    cache_dir_options,
    engine_option,
    image_tokens_option,
    max_memory_option,
    threads_option,
)
from mobilevlm.console.terminal import plain

EXAMPLES = """\b
Examples:
  mobilevlm serve nano
  mobilevlm serve small/ large/ --max-memory 2GB
  mobilevlm serve cat-reader=bundle/ --host 0.0.0.0 --api-key "$KEY"
"""


@click.command("serve", epilog=EXAMPLES)
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. One that others reach needs --api-key or --no-auth.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen at; 0: a free one.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar="MOBILEVLM_API_KEY",
    help="Key that clients must send; repeatable. Or the "
    "variable MOBILEVLM_API_KEY, which other programs do not see.",
)
@click.option("--no-auth", is_flag=True, help="Answer everybody, at any address.")
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin ask (https://example.org, or *); repeatable.",
)
@click.option(
    "--allow-urls",
    is_flag=True,
    help="Fetch images from http(s) addresses that are not of private networks.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Answers that are made at the same time.",
)
@click.option(
    "--queue",
    type=click.IntRange(0, 10_000),
    default=64,
    show_default=True,
    help="Requests that may wait beside them; more are told to try again later.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.IntRange(0, 3600),
    default=30,
    show_default=True,
    help="Seconds that answers have to end after SIGTERM.",
)
@click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The image encoder, if BUNDLE is a .gguf file made elsewhere.",
)
@engine_option("What runs the stages.")
@threads_option
@max_memory_option(
    "For all models together: one that was not used for longest is closed when "
    "another needs its memory."
)
@click.option(
    "--max-tiles",
    type=click.IntRange(1),
    metavar="N",
    help="Tiles that an image is split into at most, by models that do.",
)
@image_tokens_option
@cache_dir_options
@click.option(
    "--no-plan",
    "plan",
    flag_value="none",
    default="auto",
    help="Do without the settings that 'mobilevlm tune' found.",
)
def command(
    bundles: tuple[str, ...],
    engine: str,
    threads: int | None,
    max_memory_mb: float | None,
    max_tiles: int | None,
    image_tokens: int | None,
    cache_dir: Path | None,
    cache_dir_mb: float | None,
    plan: Any,
    mmproj: Path | None,
    **said: Any,
) -> None:
    """Answer clients of OpenAI's API about images, by the models in BUNDLE ([server] extra)."""
    if mmproj is not None and len(bundles) > 1:
        raise click.UsageError("--mmproj goes with one BUNDLE")
    from mobilevlm.runtime.server.models import Loading, Models, named_models
    from mobilevlm.runtime.server.serving import serve
    from mobilevlm.runtime.server.settings import Settings

    settings = Settings(**said)
    loading = Loading(
        engine=engine,
        threads=threads,
        plan=plan,
        max_tiles=max_tiles,
        mmproj=mmproj,
        max_memory_mb=max_memory_mb,
        at_once=settings.parallel,
        image_tokens=image_tokens,
        cache_dir=cache_dir,
        cache_dir_mb=cache_dir_mb,
    )
    paths = named_models(bundles)

    def ready(address: str) -> None:
        names = plain(", ".join(paths))
        print(f"serving {names} at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)

    serve(settings, Models(paths, loading), ready)
