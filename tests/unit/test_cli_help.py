"""Help is quick and complete: it imports nothing that a verb needs to work."""

from __future__ import annotations

import re
import subprocess
import sys

import click
import pytest
from conftest import refusal

from mobilevlm import __version__
from mobilevlm.cli import VERBS, program

HEAVY = ("onnxruntime", "torch", "transformers", "onnx", "onnxscript", "onnx_ir", "numpy",
         "tokenizers", "safetensors", "sentencepiece", "PIL", "jinja2", "rich")  # fmt: skip

PROGRAM = f"""\
import sys
from mobilevlm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_the_heavy_modules_are_installed_here() -> None:
    """Else the tests below could not fail."""
    from importlib.util import find_spec

    missing = {name for name in HEAVY if find_spec(name) is None}
    assert missing <= {"transformers"}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_verb_and_imports_nothing(flag: str) -> None:
    out = run(flag)
    assert out.endswith("imported:\n")
    for verb, meaning in VERBS.items():
        assert f"  {verb}" in out and meaning in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_it_and_imports_neither_onnxruntime_nor_torch(verb: str) -> None:
    out = run(verb, "--help")
    assert out.startswith(f"Usage: mobilevlm {verb} ")
    assert out.endswith("imported:\n")


def test_version_is_that_of_the_distribution() -> None:
    assert run("--version").splitlines()[0] == f"mobilevlm, version {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["run", "bundle"], "Missing option '-p' / '--prompt' ('mobilevlm run --help' tells more)"),
        (["run"], "Missing argument 'BUNDLE'"),
        (["run", "bundle", "--prompt", "a", "--imagee", "b"], "No such option '--imagee'"),
        (["run", "bundle", "--prompt", "a", "--threads", "0"], "'--threads'"),
        (["run", "bundle", "--prompt", "a", "--top-k", "many"], "'--top-k'"),
        (["run", "bundle", "--prompt", "a", "--max-tiles", "0"], "'--max-tiles'"),
        (["eval", "bundle", "--max-tiles", "2", "--no-tiles"], "do not go together"),
        (["run", "bundle", "--prompt", "a", "--engine", "gpu"], "'gpu' is not one of"),
        (["export", "checkpoint"], "Missing option '-o' / '--output'"),
        (["bench", "bundle", "--new-tokens", "1"], "'--new-tokens'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_gives_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *arguments)


def test_no_help_text_is_broken_inside_a_name() -> None:
    for name in program.list_commands(click.Context(program)):
        command = program.get_command(click.Context(program), name)
        assert command is not None
        with click.Context(command, info_name=name, terminal_width=80) as context:
            lines = command.get_help(context).splitlines()
        for line in lines:
            assert not re.search(r"[\w-]-$", line), f"{name}: {line}"
            assert "\u2011" not in line


def test_the_help_of_export_names_every_recipe() -> None:
    from mobilevlm.export.recipes.named import RECIPES

    named = set(re.findall(r"[a-z0-9-]+", run("export", "--help")))
    assert set(RECIPES) <= named
