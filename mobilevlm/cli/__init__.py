"""The command line: one module per verb, imported when the verb is used."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mobilevlm._version import __version__
from mobilevlm.console.standard_streams import open_closed_streams
from mobilevlm.console.terminal import filled, plain
from mobilevlm.errors import (
    AudioWarning,
    CacheWarning,
    FileWarning,
    ImageWarning,
    MissingExtraError,
    MobileVLMError,
    PlanWarning,
    PrecisionWarning,
    QualityError,
    require,
)
from mobilevlm.waiting import wait_asleep

VERBS = {
    "demo": "Let the built-in model answer questions about a new image.",
    "export": "Turn a checkpoint into a bundle.",
    "export-matrix": "Export many checkpoints by many recipes and compare.",
    "search": "Find how many bits each layer needs.",
    "imatrix": "Measure which weights matter, for GGUF files.",
    "targets": "List the devices that exports are checked for.",
    "run": "Ask one question about images.",
    "chat": "Talk about images.",
    "draw": "Draw what a text says, with a model that makes images.",
    "batch": "Ask about many images: a folder or a table.",
    "serve": "Answer clients of OpenAI's API over HTTP.",
    "list": "List models on this machine.",
    "inspect": "Show what is in a bundle or a checkpoint.",
    "bench": "Measure latency on this machine or a device.",
    "tune": "Find the fastest settings for a bundle on this machine.",
    "eval": "Measure how many questions are answered right.",
    "report": "Show score, speed, memory and energy of bundles in one table.",
    "verify": "Compare a bundle with its checkpoint.",
    "doctor": "Show what this machine can run.",
    "synth": "Write a checkpoint with random weights.",
}

_MODULES = {"list": "listing", "export-matrix": "export_matrix"}
"""Modules of verbs that have another name: a module here must not hide a builtin"""

COMPLETION = "_MOBILEVLM_COMPLETE"
"""Variable by which a shell asks for completion (docs/how-to/cli.md)."""
TORCH_VERBS = ("export", "search", "imatrix", "inspect", "verify")
"""Those that may run torch's reference."""


class _Verbs(click.Group):
    """Finds the command of a verb in the module of its name, so that ``--help`` imports nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            if near := difflib.get_close_matches(cmd_name, VERBS, cutoff=0.5):
                ctx.fail(f"No such command {cmd_name!r}: did you mean {' or '.join(near)}?")
            return None
        if cmd_name in TORCH_VERBS:
            wait_asleep()  # read when torch is loaded
        module = _MODULES.get(cmd_name, cmd_name)
        command: click.Command = importlib.import_module(f"mobilevlm.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mobilevlm")
@click.option("--debug", is_flag=True, help="Show a traceback with errors.")
def program(debug: bool) -> None:
    """Small vision-language models on devices: export a checkpoint, run it without torch.

    \b
    mobilevlm export checkpoint/ -o bundle/
    mobilevlm run bundle/ --image photo.jpg --prompt "What is in the picture?"
    """


class HelpFormatter(click.HelpFormatter):
    """Help texts whose lines are never broken at the hyphen of a name."""

    def write_text(self, text: str) -> None:
        """Write a paragraph."""
        super().write_text(_HYPHEN.sub(_NO_BREAK, text))

    def write_dl(
        self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2
    ) -> None:
        """Write terms and their explanations."""
        rows = [(term, _HYPHEN.sub(_NO_BREAK, text)) for term, text in rows]
        super().write_dl(rows, col_max, col_spacing)

    def getvalue(self) -> str:
        """Return the text."""
        return super().getvalue().replace(_NO_BREAK, "-")


_HYPHEN = re.compile(r"-(?=[\w-])")
_NO_BREAK = "\u2011"
click.Context.formatter_class = HelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit: 0 success, 1 a check or limit failed, 2 wrong input."""
    open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    if asked := os.environ.get(COMPLETION):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(program, {}, "mobilevlm", COMPLETION, asked))
    debug = "--debug" in arguments[:1]
    for stream in (sys.stdout, sys.stderr):  # an answer may hold what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = _format_warning
    try:
        # Not program.main: that one turns a closed pipe into exit code 1.
        with program.make_context("mobilevlm", list(arguments)) as context:
            program.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _show_usage_error(error)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MobileVLMError, OSError, MemoryError, ModuleNotFoundError) as error:
        missing = _missing_extra(error)
        if missing is None and isinstance(error, ModuleNotFoundError):
            raise  # ours, or of a library that is broken
        if debug:
            traceback.print_exc()
        error = missing or error
        lines = str(error).splitlines() if isinstance(error, QualityError) else [_describe(error)]
        for line in lines:
            print(filled(f"mobilevlm: error: {plain(line)}", sys.stderr), file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, MobileVLMError) else 2)


def _missing_extra(error: Exception) -> MissingExtraError | None:
    """Return what to say where a package of an extra is not installed."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    from mobilevlm.runtime.machine import EXTRAS

    module = error.name or ""
    for extra, modules in EXTRAS.items():
        if any(module == name or module.startswith(f"{name}.") for name in modules):
            return require(module, extra, "this command")
    return None


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Ours as a line for people, others with the place that they come from."""
    if issubclass(
        category,
        (AudioWarning, CacheWarning, FileWarning, ImageWarning, PlanWarning, PrecisionWarning),
    ):
        return filled(f"mobilevlm: warning: {plain(message)}", sys.stderr) + "\n"
    if category is UserWarning and "PIL" in Path(filename).parts:
        return ""  # about metadata that nobody asked for
    return f"{filename}:{lineno}: {category.__name__}: {plain(message)}\n"


def _show_usage_error(error: click.ClickException) -> None:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # no arguments at all: the whole help
        error.show()
        return
    place = context.command_path if context else "mobilevlm"
    message = " ".join(error.format_message().split()).rstrip(".")
    line = f"mobilevlm: error: {plain(message)} ('{place} --help' tells more)"
    print(filled(line, sys.stderr), file=sys.stderr)


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory: close other programs, or use a smaller model or recipe"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}no space left on the disk: free some and run the same command again"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{error.filename}: on a read-only file system: give a place that can be written"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def show_json(data: Any) -> None:
    """Prints one JSON object on stdout."""
    import json

    text = json.dumps(data, indent=2, ensure_ascii=False)
    print(re.sub("[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text))
