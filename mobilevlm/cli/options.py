"""Options and output that verbs share."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mobilevlm.console.terminal import filled, plain, typed
from mobilevlm.plan import ENGINE_CHOICES

if TYPE_CHECKING:
    from mobilevlm.runtime import VLM, Generation
    from mobilevlm.runtime.tuning.plan_file import PlanChoice

F = TypeVar("F", bound=Callable[..., Any])


_DOWNLOAD = "mobilevlm.download"
"""Under which a context remembers ``--download``"""


def from_hub(context: click.Context, option: Any, given: Path | None) -> Path | None:
    """Fetch a model that is given by its id, if ``--download`` was said and it is not there."""
    if given is not None and context.meta.get(_DOWNLOAD):
        from mobilevlm.hub_cache import fetch, find_snapshot, is_hub_id

        if is_hub_id(given) and find_snapshot(given.as_posix()) is None:
            fetch(given.as_posix())
    return given


def _remember(context: click.Context, option: Any, said: bool) -> None:
    context.meta[_DOWNLOAD] = said


download_option = click.option(
    "--download",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember,
    help="Fetch checkpoints that are given as org/name from the Hugging Face hub, if its local "
    "cache does not have them ([hub] extra).",
)
base_option = click.option(
    "--base",
    type=click.Path(path_type=Path),
    callback=from_hub,
    metavar="DIR",
    help="Whole model that CHECKPOINT, an adapter, is merged into: a LoRA folder of PEFT or LLaVA, "
    "a projector alone (mm_projector.bin), or delta weights.",
)


def checkpoint_options(function: F) -> F:
    """CHECKPOINT, ``--vision-tower``, ``--conversation``, ``--variant`` and ``--base``: the options
    are what :class:`mobilevlm.families.OpenOptions` takes."""
    for decorate in (
        base_option,
        click.option("--variant", metavar="NAME",
                     help="Official behaviour, where a family has several (VILA: vila1.5, "
                     "current), if the checkpoint does not tell the right one."),
        click.option("--conversation", metavar="NAME",
                     help="Conversation: v1, llava_v1, phi …, if the family's default is wrong."),
        download_option,
        click.option("--vision-tower", type=click.Path(path_type=Path), callback=from_hub,
                     help="Folder of the vision tower, if it is not beside the checkpoint."),
        click.argument("checkpoint", type=click.Path(path_type=Path), callback=from_hub),
    ):  # fmt: skip
        function = decorate(function)
    return function


def _megabytes(context: Any, option: Any, value: str | None) -> float | None:
    """``800MB`` or ``1.5GB`` as a number of megabytes."""
    if value is None:
        return None
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])B", value, re.IGNORECASE)
    if number is None:
        raise click.BadParameter(f"{value!r}: expected a size, as in 800MB or 1.5GB")
    return float(number[1]) * {"M": 1, "G": 1000}[number[2].upper()]


def output_option(name: str, text: str, metavar: str | None = None) -> Callable[[F], F]:
    """``-o``, which must be given, with its help; the function gets it as ``name``."""
    return click.option("-o", "--output", name, required=True, type=click.Path(path_type=Path),
                        metavar=metavar, help=text)  # fmt: skip


def html_option(text: str) -> Callable[[F], F]:
    """``--html``, with its help."""
    return click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                        help=text)  # fmt: skip


def format_options(function: Callable[..., None]) -> Callable[..., None]:
    """``--format`` and ``--json``, which the function gets as ``form``."""

    @functools.wraps(function)
    def gathered(form: str, as_json: bool, **given: Any) -> None:
        function(form="json" if as_json else form, **given)

    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
        click.option("--format", "form", type=click.Choice(["table", "md", "json"]),
                     default="table", show_default=True),
    ):  # fmt: skip
        gathered = decorate(gathered)
    return gathered


def engine_option(text: str) -> Callable[[F], F]:
    """``--engine``, with its help."""
    return click.option("--engine", type=click.Choice(ENGINE_CHOICES), default="auto",
                        show_default=True, help=text)  # fmt: skip


def max_memory_option(text: str) -> Callable[[F], F]:
    """``--max-memory``, with its help."""
    return click.option("--max-memory", "max_memory_mb", callback=_megabytes, metavar="512MB",
                        help=text)  # fmt: skip


threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads to use. Default: all that this process may use.",
)


image_tokens_option = click.option(
    "--image-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Visual tokens of an image for the decoder at most: fewer tiles, then fewer rows. Faster, "
    "and less exact, reading text above all. Default: all.",
)


@dataclass(frozen=True)
class ModelOptions:
    """Options for a model and how it runs; as ``mobilevlm.load`` takes them."""

    bundle: Path
    mmproj: Path | None
    engine: str
    threads: int | None
    max_memory_mb: float | None
    max_resident_mb: float | None
    plan: PlanChoice
    max_tiles: int | None
    max_image_tokens: int | None
    image_tokens: int | None
    cache_dir: Path | None = None
    cache_dir_mb: float | None = None

    def open(self) -> VLM:
        """The model, loaded."""
        from mobilevlm.runtime import load

        return load(**vars(self))

    def words(self) -> list[str]:
        """The options once more, for the program on another machine, without files."""
        sizes = {"--max-memory": self.max_memory_mb, "--max-resident": self.max_resident_mb}
        said = [f"{name}={size}MB" for name, size in sizes.items() if size is not None]
        if self.threads is not None:
            said.append(f"--threads={self.threads}")
        if self.plan == "none":
            said.append("--no-plan")
        if self.max_tiles is not None:
            said.append(f"--max-tiles={self.max_tiles}")
        if self.max_image_tokens is not None:
            said.append(f"--max-image-tokens={self.max_image_tokens}")
        if self.image_tokens is not None:
            said.append(f"--image-tokens={self.image_tokens}")
        return [f"--engine={self.engine}", *said]


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """BUNDLE, ``--mmproj``, ``--engine``, ``--threads``, ``--max-memory``, ``--max-resident``,
    ``--no-plan``, ``--image-tokens``, ``--max-image-tokens``, ``--max-tiles`` and ``--no-tiles``,
    which the function gets as ``model``."""

    @functools.wraps(function)
    def gathered(**given: Any) -> None:
        if given.pop("no_tiles"):
            if given["max_tiles"] is not None:
                raise click.UsageError("--no-tiles and --max-tiles do not go together: give one")
            given["max_tiles"] = 1
        names = [field.name for field in fields(ModelOptions) if field.name in given]
        said = {name: given.pop(name) for name in names}
        function(model=ModelOptions(**said), **given)

    for decorate in (
        click.option("--no-tiles", is_flag=True,
                     help="Do not split images: each is one square, as --max-tiles 1."),
        click.option("--max-tiles", type=click.IntRange(1), metavar="N",
                     help="Tiles that an image is split into at most, by models that do. Default: "
                          "as many as the checkpoint has."),
        click.option("--max-image-tokens", type=click.IntRange(1), metavar="N",
                     help="Visual tokens that an image becomes at most, by models that encode "
                          "images near their own size. Default: as many as the checkpoint has."),
        image_tokens_option,
        click.option("--no-plan", "plan", flag_value="none", default="auto",
                     help="Do without the settings that 'mobilevlm tune' found."),
        click.option("--max-resident", "max_resident_mb", callback=_megabytes, metavar="800MB",
                     help="Memory for sparse experts: the others stay on the disk "
                     "(engine ggml)."),
        max_memory_option("The most that may be resident: slower settings that take less are "
                          "chosen, or the model is refused before it is loaded."),
        threads_option,
        engine_option("What runs the stages."),
        click.option("--mmproj", type=click.Path(path_type=Path), metavar="FILE",
                     help="The image encoder, if BUNDLE is a .gguf file made elsewhere."),
        click.argument("bundle", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        gathered = decorate(gathered)
    return gathered


def cache_dir_options(function: F) -> F:
    """``--cache-dir`` and ``--cache-dir-size``."""
    for decorate in (
        click.option("--cache-dir-size", "cache_dir_mb", callback=_megabytes, metavar="1GB",
                     help="The most that --cache-dir may hold. Default: 1GB."),
        click.option("--cache-dir", type=click.Path(path_type=Path), metavar="DIR",
                     help="Keep the visual tokens of images and sounds in files there, so that the "
                     "next start need not encode them again."),
    ):  # fmt: skip
        function = decorate(function)
    return function


def sampling_options(function: F) -> F:
    """How tokens are chosen and when the answer ends."""
    for decorate in (
        click.option("--draft-tokens", type=int, metavar="N",
                     help="Tokens to guess from the text so far and to check at once; the answer "
                     "stays the same. 0: none. Default: 4 with llama.cpp and --temperature 0."),
        click.option("--stop", multiple=True, metavar="TEXT",
                     help="Text that ends the answer; repeatable.",
                     callback=lambda context, option, texts: tuple(map(typed, texts))),
        click.option("--seed", type=int, help="Seed of sampling: the same one repeats an answer."),
        click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
        click.option("--min-p", type=float, default=0.0, show_default=True,
                     help="Least probability, as a share of the likeliest token's."),
        click.option("--top-p", type=float, default=1.0, show_default=True,
                     help="Draw among the likeliest tokens that reach this probability."),
        click.option("--top-k", type=int, default=0, show_default=True,
                     help="Draw among the k likeliest tokens (0: all)."),
        click.option("--temperature", type=float, default=0.0, show_default=True,
                     help="0: always the likeliest token."),
        click.option("-n", "--max-new-tokens", type=int, default=256, show_default=True,
                     help="Most tokens of an answer."),
    ):  # fmt: skip
        function = decorate(function)
    return function


plain_text_option = click.option(
    "--plain-text", "special_tokens", is_flag=True, flag_value=False, default=True,
    help="Read special tokens (</s>) and <image> in the text as ordinary words.",
)  # fmt: skip


def _bits_per_weight(context: Any, option: Any, value: str | None) -> float | None:
    """``4.5bpw`` as a number."""
    if value is None:
        return None
    number = re.fullmatch(r"(\d+(?:\.\d+)?)bpw", value)
    if number is None:
        raise click.BadParameter(f"{value!r}: expected bits per weight, as in 4.5bpw")
    return float(number[1])


def goal_options(function: F) -> F:
    """``--budget`` and ``--max-kl``: what a search for mixed precision must reach."""
    for decorate in (
        click.option("--max-kl", type=click.FloatRange(0, min_open=True), metavar="NATS",
                     help="Give the decoder's layers as few bits as keep the divergence of its "
                          "answers below this."),
        click.option("--budget", callback=_bits_per_weight, metavar="BITSbpw",
                     help="Give the decoder's layers so many bits per weight on average, scales "
                          "included, where they matter most."),
    ):  # fmt: skip
        function = decorate(function)
    return function


def show_timings(answer: Generation) -> None:
    """One line on stderr."""
    times, drafts = answer.timings, answer.drafts
    known = f", {answer.reused.tokens} known" if answer.reused.tokens else ""
    parts = [
        f"load {times.load:.2f} s",
        f"vision {times.vision:.2f} s",
        f"prefill {times.prefill:.2f} s ({answer.prompt_tokens} tokens{known})",
        f"first token after {times.ttft:.2f} s",
        f"{len(answer.token_ids)} tokens",
    ]
    if times.tokens_per_second:
        parts.append(f"{times.tokens_per_second:.1f} tokens/s")
    if drafts.proposed:
        parts.append(f"{drafts.accepted} of {drafts.proposed} guesses right")
    if drafts.note:
        parts.append(f"nothing guessed: {plain(drafts.note)}")
    line = filled("; ".join(parts), sys.stderr)
    click.secho(line, err=True, dim=True)  # no colour codes but on a terminal
