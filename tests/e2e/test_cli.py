"""The program as a person uses it, from a checkpoint to a conversation."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, fixture_named, run_program

import mobilevlm
from mobilevlm.bundle import open_bundle

FIRST, SECOND = (fixture_named(name).image for name in ("llava_v1", "mobilevlm_v2"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``checkpoint`` and ``bundle``, made by the program."""
    folder = tmp_path_factory.mktemp("journey")
    synth = run_program("synth", "tiny", "-o", folder / "checkpoint")
    assert synth.returncode == 0 and synth.stdout == "", synth
    assert f"checkpoint {folder / 'checkpoint'}" in synth.stderr
    export = run_program(
        "export", folder / "checkpoint", "-o", folder / "bundle", "--no-measure", "--json"
    )
    assert export.returncode == 0, export
    result = json.loads(export.stdout)
    bundle = open_bundle(folder / "bundle")
    assert result == {
        "bundle": str(folder / "bundle"),
        "bytes": sum(entry.size for entry in bundle.manifest.files.values()),
        "recipe": "int4",
        "quality": {"measured": False, "note": "not wanted", "stages": {}},
        "coverage": [],
    }
    assert [line.split()[0] for line in export.stderr.splitlines()] == [
        "tower", "vision", "embeddings", "decoder", "quality", "bundle",
    ]  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bundle(made: Path) -> Path:
    return made / "bundle"


def answered(*arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    """The one JSON object of ``run --json``."""
    done = run_program("run", *arguments, "--json", stdin=stdin)
    assert done.returncode == 0 and done.stderr == "", done
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_export_ends_with_what_to_do_next(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    done = run_program("export", made / "checkpoint", "-o", target, "--no-measure")
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f'next        mobilevlm run {target} --image PHOTO --prompt "What is this?"'
    )


def test_quiet_says_nothing(made: Path, tmp_path: Path) -> None:
    for arguments in (
        ("synth", "tiny", "-o", tmp_path / "checkpoint"),
        ("export", made / "checkpoint", "-o", tmp_path / "bundle", "--no-measure"),
    ):
        done = run_program(*arguments, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_prints_the_answer_and_on_stderr_the_timings(bundle: Path) -> None:
    question = ("--image", FIRST, "--prompt", "What is it?", "--max-new-tokens", 12)
    done = run_program("run", bundle, *question)
    assert done.returncode == 0
    assert done.stdout == answered(bundle, *question)["text"] + "\n"
    assert done.stderr.startswith("load ") and done.stderr.count("\n") == 1
    for part in ("vision", "prefill", "first token after", "12 tokens;", "tokens/s"):
        assert part in done.stderr
    assert "\x1b" not in done.stderr  # no colours where there is no terminal


def test_run_json_is_one_object_with_these_keys(bundle: Path) -> None:
    answer = answered(bundle, "--image", FIRST, "--prompt", "What is it?", "--max-new-tokens", 12)
    times = answer.pop("timings")
    assert set(times) == {
        "load", "preprocess", "vision", "prefill", "ttft", "decode", "tokens_per_second",
    }  # fmt: skip
    assert all(type(value) is float and value > 0 for value in times.values())
    assert set(answer) == {
        "text", "token_ids", "finish_reason", "prompt_tokens", "visual_tokens", "token_seconds",
        "reused", "drafts",
    }  # fmt: skip
    assert answer["reused"]["tokens"] > 0 == answer["reused"]["images"]  # the system prompt
    assert answer["text"] and answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 12 == len(answer["token_seconds"]) + 1
    assert answer["visual_tokens"] == 144 < answer["prompt_tokens"]


def test_a_picture_may_come_from_standard_input(bundle: Path) -> None:
    question = ("--prompt", "What is this?", "--max-new-tokens", 12)
    piped = answered(bundle, *question, "--image", "-", stdin=FIRST.read_bytes())
    named = answered(bundle, *question, "--image", FIRST)
    other = answered(bundle, *question, "--image", SECOND)
    assert piped["token_ids"] == named["token_ids"] != other["token_ids"]
    nothing = run_program("run", bundle, *question, "--image", "-")
    assert nothing.returncode == 2 and nothing.stderr.count("\n") == 1
    assert "standard input is empty" in nothing.stderr


def test_two_pictures_are_seen_in_their_order(bundle: Path) -> None:
    question = ("--prompt", "Is <image> like <image>?", "--max-new-tokens", 12)
    here = answered(bundle, *question, "--image", FIRST, "--image", SECOND)
    swapped = answered(bundle, *question, "--image", SECOND, "--image", FIRST)
    assert here["visual_tokens"] == swapped["visual_tokens"] == 288
    # Random weights may answer both orders alike, as they do on processors without VNNI.
    with mobilevlm.load(bundle) as vlm:
        one, other = (
            vlm.prompt_logits(question[1], order)[-1]
            for order in ([FIRST, SECOND], [SECOND, FIRST])
        )
        assert abs(one - other).max() > 0.01
        assert (
            vlm.generate(question[1], [FIRST, SECOND], max_new_tokens=12).token_ids
            == (here["token_ids"])
        )


def test_sampling_options_reach_the_sampler(bundle: Path) -> None:
    question = (bundle, "--prompt", "Tell me", "--max-new-tokens", 20)
    drawn = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--seed", 3)
    greedy = answered(*question)
    first, again = answered(*question, *drawn), answered(*question, *drawn)
    assert first["token_ids"] == again["token_ids"] != greedy["token_ids"]
    assert answered(*question, *drawn[:-1], 4)["token_ids"] != first["token_ids"]
    longer = (*question[:-1], 80)
    penalized = answered(*longer, "--repetition-penalty", 1e6)["token_ids"]
    assert len(set(penalized)) == len(penalized) > 20
    assert len(set(answered(*longer)["token_ids"])) < 80
    middle = greedy["text"][10:13]
    stopped = answered(*question, "--stop", middle, "--stop", "never said")
    assert stopped["text"] == greedy["text"][: greedy["text"].index(middle)]
    assert stopped["finish_reason"] == "stop"


def test_chat_obeys_commands_and_prints_only_answers(bundle: Path, tmp_path: Path) -> None:
    options = ("--max-new-tokens", 12, "--image", FIRST)
    lines = [
        "What is this?", "", "Why?", "/reset", "What is this?", f"/new {SECOND}",
        "What is this?", "/image none.png", "/dance", "/help", "/timings", "Why?",
        "/quit", "never asked",
    ]  # fmt: skip
    done = run_program("chat", bundle, *options, stdin="\n".join(lines).encode())
    assert done.returncode == 0, done.stderr
    first, second = (
        answered(bundle, "--prompt", "What is this?", "--max-new-tokens", 12, "--image", image)[
            "text"
        ]
        for image in (FIRST, SECOND)
    )
    answers = done.stdout.split("\n")
    # An answer of random weights may hold a line break; those of these questions do not.
    assert len(answers) == 6 and answers[5] == ""
    assert answers[0] == answers[2] == first
    assert answers[3] == second
    assert answers[1] not in answers[:1] and answers[4]
    said = done.stderr.splitlines()
    assert said[0].endswith("/help lists commands.")
    assert "error: none.png: no such image file" in said
    assert any(line.startswith("/dance: not a command.") for line in said)
    assert done.stderr.count("/quit         leave") == 2  # once after /dance, once after /help
    assert said[-1].startswith("load ") and "tokens/s" in said[-1]


def test_chat_ends_with_its_input_and_goes_on_after_a_refused_question(bundle: Path) -> None:
    text = b"what <image>\nWho?\n"
    done = run_program("chat", bundle, "--max-new-tokens", 3, stdin=text)
    assert done.returncode == 0
    assert "has 1 <image> mark, but no image was given" in done.stderr
    assert "(/reset begins anew)" in done.stderr
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr


def test_chat_with_a_missing_picture_is_refused(bundle: Path) -> None:
    done = run_program("chat", bundle, "--image", "none.png")
    assert done.returncode == 2 and "none.png: no such image file" in done.stderr


def test_inspect_shows_a_bundle(bundle: Path) -> None:
    done = run_program("inspect", bundle, environment={"COLUMNS": "200"})
    assert done.returncode == 0 and done.stderr == ""
    for part in ("onnx/decoder_model_merged_q4.onnx", "recipe int4", "quality not measured",
                 "context_length 2048"):  # fmt: skip
        assert part in done.stdout
    data = json.loads(run_program("inspect", bundle, "--json").stdout)
    assert data["schema_version"] == 2 and data["spec"]["family"] == "mobilevlm"
    assert [a["stage"] for a in data["artifacts"]] == ["vision", "embeddings", "decoder"]


def test_inspect_shows_a_checkpoint(made: Path) -> None:
    done = run_program("inspect", made / "checkpoint", environment={"COLUMNS": "200"})
    assert done.returncode == 0 and done.stderr == ""
    assert "total" in done.stdout and "ldpv2" in done.stdout
    data = json.loads(run_program("inspect", made / "checkpoint", "--json").stdout)
    # Three layers of 4 · 64² + 3 · 64 · 160 + 2 · 64, two tables of 512 · 64, the last norm.
    assert data["parameters"]["decoder"] == 3 * (4 * 64**2 + 3 * 64 * 160 + 128) + 2 * 512 * 64 + 64


def test_bench_reports_every_stage(bundle: Path) -> None:
    options = (bundle, "--runs", 2, "--new-tokens", 4, "--text-tokens", 20)
    done = run_program("bench", *options, "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["text_tokens"] == 20 and result["visual_tokens"] == 144
    assert result["new_tokens"] == 4 and result["runs"] == 2
    rows = {(row["name"], row["unit"]): row for row in result["rows"]}
    assert set(rows) == {
        ("preprocess", "ms"), ("vision", "ms"), ("prefill", "ms"), ("first token", "ms"),
        ("next token", "ms"), ("prefill", "tokens/s"), ("decode", "tokens/s"),
        ("first token, second question", "ms"), ("weights read", "GB/s"),
    }  # fmt: skip
    rates = rows["decode", "tokens/s"]["samples"], rows["weights read", "GB/s"]["samples"]
    for tokens, read in zip(*rates, strict=True):
        assert read == pytest.approx(tokens * result["token_mb"] / 1e3, abs=1e-4)
    assert len(rows["vision", "ms"]["samples"]) == 2
    assert len(rows["next token", "ms"]["samples"]) == 2 * 3
    for (_, unit), row in rows.items():
        order = [row[name] for name in ("p50", "p90", "p99") if row[name] is not None]
        assert min(row["samples"]) > 0
        assert (row["p90"] is None) == (len(row["samples"]) < 5)
        assert row["p99"] is None  # of 2 runs, or of 6 tokens
        assert order == sorted(order, reverse=unit.endswith("/s"))
    assert result["peak_memory_mb"] > 10 and result["machine"]["processor"]


def test_bench_prints_a_table_for_documents_and_one_for_people(bundle: Path) -> None:
    options = (bundle, "--runs", 1, "--new-tokens", 3, "--no-image")
    document = run_program("bench", *options, "--format", "md")
    lines = document.stdout.splitlines()
    assert "| stage | unit | p50 | p90 | p99 |" in lines
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 2 + 5 and all(line.count("|") == 6 for line in table)
    people = run_program("bench", *options)
    assert people.returncode == 0 and "next token" in people.stdout


def test_doctor_shows_what_the_machine_can_run() -> None:
    data = json.loads(run_program("doctor", "--json").stdout)
    assert "CPUExecutionProvider" in data["machine"]["providers"]
    assert data["extras"]["export"] == data["extras"]["reference"] == []  # here all is installed
    assert data["extras"]["gguf"] in ([], ["llama_cpp"])  # needs a compiler, so not everywhere
    done = run_program("doctor")
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout


# A reader that goes away, and Ctrl-C. The pipe is made small, so that the program cannot be done
# before the test acts.


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """The program after its first byte of output; it waits for the rest to be read."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilevlm", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    assert len(process.stdout.read(1)) == 1
    return process


@pytest.fixture(scope="module")
def storyteller(bundle_of: BundleOf) -> Path:
    """A bundle with a context of 4096, whose random weights never say the end token here."""
    return bundle_of("llava_v15", "fp32")


def long_output(verb: str, bundle: Path) -> tuple[object, ...]:
    """Arguments whose output does not fit into the pipe."""
    if verb == "inspect":
        return "inspect", bundle, "--json"
    return "run", bundle, "--prompt", "Tell me a long story", "--max-new-tokens", 3900


@pytest.mark.parametrize("verb", ["run", "inspect"])
def test_the_long_output_is_long(verb: str, storyteller: Path) -> None:
    """Else the tests below would end before they begin."""
    assert len(run_program(*long_output(verb, storyteller)).stdout.encode()) > 4096 + 256


@pytest.mark.parametrize("verb", ["run", "inspect"])
def test_a_reader_that_goes_away_ends_the_program_quietly(verb: str, storyteller: Path) -> None:
    with start(*long_output(verb, storyteller)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_ctrl_c_during_an_answer_ends_with_130_and_no_traceback(storyteller: Path) -> None:
    with start(*long_output("run", storyteller)) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
    assert errors.decode().strip() == ""


def test_ctrl_c_during_an_answer_of_a_chat_goes_on_with_the_conversation(storyteller: Path) -> None:
    command = ["chat", storyteller, "--max-new-tokens", 3900]
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilevlm", *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        process.stdin.write(b"Tell me a long story\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(b"/help\n", timeout=60)
        assert process.returncode == 0
    assert rest.decode(errors="replace").endswith(" [stopped]\n")
    assert "/quit         leave" in errors.decode()
    assert "Traceback" not in errors.decode()


def test_output_that_a_terminal_cannot_show_is_replaced(bundle: Path) -> None:
    arguments = ("run", bundle, "--prompt", "Tell me", "--max-new-tokens", 60)
    plain = run_program(*arguments, environment={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0 and "Traceback" not in plain.stderr
    whole = run_program(*arguments).stdout
    assert not whole.isascii()
    assert plain.stdout == whole.encode("ascii", "replace").decode()
