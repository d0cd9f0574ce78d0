"""Everyday use of the command line: prompts from anywhere, system messages, schemas, completion."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal, run_program

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"
ASK = ("run", "nano", "-n", 6)


def answer(*arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    done = run_program(*ASK, *arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_a_prompt_comes_from_the_command_a_file_or_standard_input(tmp_path: Path) -> None:
    question = "What is in the picture?"
    file = tmp_path / "question.txt"
    file.write_bytes(b"\xef\xbb\xbf" + question.encode() + b"\r\n")
    given = answer("-p", question)
    assert answer("-p", f"@{file}")["token_ids"] == given["token_ids"]
    assert (
        answer("--prompt", "-", stdin=question.encode() + b"\n")["token_ids"]
        == (given["token_ids"])
    )
    assert answer("-p", "@@home")["prompt_tokens"] == answer("-p", "xhome")["prompt_tokens"]


def test_a_system_message_changes_the_prompt() -> None:
    plain, told = answer("-p", "What is it?"), answer("-p", "What is it?", "--system", "Be brief.")
    assert told["prompt_tokens"] != plain["prompt_tokens"]


def test_an_image_may_be_a_data_uri() -> None:
    uri = f"data:image/jpeg;base64,{base64.b64encode(PHOTO.read_bytes()).decode()}"
    named = answer("-p", "What is it?", "--image", PHOTO)
    if len(uri) < 120_000:  # Linux allows 128 KiB for an argument
        assert answer("-p", "What is it?", "--image", uri)["token_ids"] == named["token_ids"]


def test_several_prompts_are_asked_of_a_model_that_is_loaded_once() -> None:
    both = ("-p", "What is it?", "-p", "How many are there?")
    done = run_program(*ASK, *both)
    alone = [run_program(*ASK, *both[start : start + 2]).stdout for start in (0, 2)]
    assert done.stdout == "".join(alone)
    assert done.stderr.count("load ") == 2


def test_json_lines_are_the_pieces_and_the_answer_of_each_prompt() -> None:
    done = run_program(*ASK, "-p", "What is it?", "-p", "Who?", "--json-lines")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.stderr == ""
    for number in (0, 1):
        own = [line for line in lines if line["prompt"] == number]
        pieces = "".join(line["piece"] for line in own[:-1])
        assert pieces == own[-1]["answer"]["text"] and own[-1]["answer"]["token_ids"]


def test_an_answer_by_a_schema_is_json(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[structured]'")
    schema = tmp_path / "schema.json"
    shape: dict[str, Any] = {
        "type": "object",
        "properties": {"shape": {"enum": ["circle", "square"]}},
    }
    shape |= {"required": ["shape"], "additionalProperties": False}
    schema.write_text(json.dumps(shape))
    done = run_program("run", "nano", "-p", "What is it?", "--json-schema", schema)
    assert json.loads(done.stdout)["shape"] in ("circle", "square")
    cut = run_program(*ASK[:2], "-n", 2, "-p", "What is it?", "--json-schema", schema)
    assert cut.returncode == 0
    assert "the answer was cut after 2 tokens and is not whole" in cut.stderr
    lines = b"What is it?\n"
    chat = run_program("chat", "nano", "--json-schema", schema, stdin=lines)
    assert json.loads(chat.stdout)["shape"] in ("circle", "square")
    rules = tmp_path / "rules.lark"
    rules.write_text('start: "yes" | "no"')
    assert run_program(*ASK, "-p", "Is it?", "--grammar", rules).stdout in ("yes\n", "no\n")


WRONG: list[tuple[tuple[object, ...], str]] = [
    (("-p", "@none.txt"), "--prompt: none.txt: No such file"),
    (("-p", "@/dev/zero"), "not a regular file"),
    (("-p", "a", "--json-schema", "none.json"), "--json-schema: none.json: No such file"),
    (("-p", "a", "--system", "@none.txt"), "--system: none.txt: No such file"),
    (("-p", "-", "--image", "-"), "give - once"),
    (("-p", "a", "-p", "b", "--json"), "use --json-lines"),
    (("-p", "a", "--json-lines", "--json"), "use --json-lines"),
    (("-p", "a", "--raw", "--system", "b"), "--system does not go with --raw"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
def test_wrong_use_is_named(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *ASK, *arguments)


def test_an_impossible_schema_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance", reason="pip install '.[structured]'")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer", "minimum": 3, "maximum": 1}')
    told = refusal(capsys, *ASK, "-p", "How many?", "--json-schema", schema)
    assert "json_schema cannot be followed: Unsatisfiable schema: minimum" in told


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    done = run_program(*ASK, "-p", "-")
    assert done.returncode == 2 and "standard input is empty" in done.stderr


@pytest.mark.parametrize(("typed", "meant"), [("rum", "run"), ("exprot", "export")])
def test_a_command_that_is_nearly_right_is_named(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"No such command '{typed}': did you mean {meant}" in refusal(capsys, typed)
    assert "did you mean" not in refusal(capsys, "xyz")


def test_a_shell_completes_commands_and_options() -> None:
    def completed(*words: str) -> list[str]:
        environment = {
            **os.environ,
            "_MOBILEVLM_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(("mobilevlm", *words)),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(
            [sys.executable, "-m", "mobilevlm"], capture_output=True, text=True, env=environment
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("ins") == ["inspect"]
    assert completed("run", "--json") == ["--json-schema", "--json", "--json-lines"]
