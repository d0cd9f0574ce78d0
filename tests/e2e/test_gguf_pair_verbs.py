"""The commands on a pair of GGUF files that llama.cpp alone knows, as a person uses them."""

from __future__ import annotations

import json
import os

import pytest
from conftest import DATA, run_program

from mobilevlm.cli import main

if os.environ.get("MOBILEVLM_WITHOUT_LLAMA") == "1":
    pytest.skip("asked to go without llama.cpp", allow_module_level=True)

from pairs import Pair, qwen_vl_pair, smolvlm_pair

IMAGE = str(DATA / "smolvlm2" / "image.png")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return smolvlm_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def files(pair: Pair) -> list[str]:
    return [str(pair[0]), "--mmproj", str(pair[1])]


def test_run_answers_as_the_official_code(files: list[str], capsys: Capture) -> None:
    told = json.loads((DATA / "smolvlm2" / "expected.json").read_text())
    asked = ("--prompt", told["user_prompt"], "--image", IMAGE, "--max-new-tokens", "24")
    main(["run", *files, *asked, "--json"])
    assert json.loads(capsys.readouterr().out)["token_ids"] == told["generated_ids"]


def test_chat_keeps_the_image(files: list[str]) -> None:
    said = f"/image {IMAGE}\nWhat is it?\nAnd why?\n".encode()
    done = run_program("chat", *files, "--max-new-tokens", "4", stdin=said)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr


@pytest.mark.parametrize("image", [("--image", IMAGE), (), ("--no-image",)])
def test_bench_measures_every_stage(
    image: tuple[str, ...], files: list[str], capsys: Capture
) -> None:
    main(["bench", *files, *image, "--runs", "1", "--new-tokens", "4", "--json"])
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["samples"] for row in result["rows"]}
    assert all(rows["decode"]) and all(rows["first token"])
    assert result["engine"] == "gguf"
    visual = {("--image", IMAGE): 52, (): 68, ("--no-image",): 0}[image]
    assert result["visual_tokens"] == visual


def test_eval_asks_about_one_and_several_images(files: list[str], capsys: Capture) -> None:
    main(["eval", *files, "--questions", "12", "--no-blind", "--json"])
    assert json.loads(capsys.readouterr().out)["kinds"]["two_images"]["asked"] == 1


def test_inspect_tells_architecture_and_projector(
    pair: Pair, tmp_path_factory: pytest.TempPathFactory, capsys: Capture
) -> None:
    other = qwen_vl_pair(tmp_path_factory.mktemp("other"))
    said = {}
    for path in (*pair, *other):
        main(["inspect", str(path)])
        said[path] = capsys.readouterr().out
    model, mmproj = (said[path] for path in pair)
    assert "architecture llama\n" in model and "hidden_size 72" in model
    assert "architecture clip, projector idefics3\n" in mmproj
    assert "architecture qwen2vl\n" in said[other[0]]
    assert not any("cannot be run" in text for text in said.values())
    for text in (mmproj, said[other[1]]):
        assert "engine gguf runs it if llama.cpp can" in text
    main(["inspect", str(other[1]), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["projector"] == "qwen2vl_merger" and data["llama_cpp_alone"]
    assert data["obstacle"] is None
