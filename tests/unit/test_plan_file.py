"""The file of plans: what is taken from it, and that nothing in it can stop a bundle."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import BundleOf, refusal, run_program

import mobilevlm
from mobilevlm.bundle import Bundle, open_bundle
from mobilevlm.errors import BundleError, MemoryLimitError, PlanWarning
from mobilevlm.plan import Plan, available_processors
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import Limit
from mobilevlm.runtime.tuning import plan_file
from mobilevlm.runtime.tuning.plan_file import PLAN, TunedPlan, read_plan, settle_plans, write_plan

MOST_THREADS = 4 * available_processors()
ONE = Plan("onnx", vision_threads=1, decoder_threads=1, spinning=False, prefill_from=40)


@pytest.fixture
def bundle(bundle_of: BundleOf, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle_of("tiny", "fast"), tmp_path / "bundle")))


def settle_plan(*given: Any) -> Plan:
    """The one that a bundle is to run by."""
    return settle_plans(*given)[0]


def tuned(bundle: Bundle, *plans: Plan) -> TunedPlan:
    return TunedPlan(bundle.digest, plans, (), 60.0, 1.0, True)


def change(bundle: Bundle, **values: Any) -> None:
    """Change a field of the only plan in the file."""
    path = bundle.path(PLAN)
    data = json.loads(path.read_text())
    [processor] = data["processors"].values()
    processor["plans"][0].update(values)
    path.write_text(json.dumps(data))


def test_what_is_written_is_read_and_used(bundle: Bundle) -> None:
    write_plan(bundle, tuned(bundle, ONE))
    found = read_plan(bundle)
    assert found is not None and found.plans == (ONE,)
    with mobilevlm.load(bundle.folder) as vlm:  # the manifest does not know the file
        assert vlm.plan == ONE and vlm.threads == 1
    with mobilevlm.load(bundle.folder, plan="none") as vlm:
        assert vlm.plan == Plan("onnx")
    tiles = replace(ONE, tiles_at_once=65)
    write_plan(bundle, tuned(bundle, tiles))
    assert settle_plan(bundle, "auto", None, "auto") == tiles
    assert "tiles at once 65" in tiles.describe()


def test_what_was_asked_for_wins(bundle: Bundle) -> None:
    write_plan(bundle, tuned(bundle, Plan("hybrid"), ONE))
    assert settle_plan(bundle, "onnx", None, "auto") == ONE
    found = settle_plan(bundle, "onnx", 2, "auto")
    assert found == replace(ONE, vision_threads=2, decoder_threads=2)
    assert settle_plan(bundle, "onnx", None, replace(ONE, prefill_from=9)).prefill_from == 9
    with pytest.raises(BundleError, match="lacks the GGUF artifact"):
        settle_plan(bundle, "gguf", None, "auto")


def test_an_engine_that_is_no_longer_installed_is_passed_over(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(bundle, tuned(bundle, Plan("hybrid"), ONE))
    monkeypatch.setattr(plan_file, "installed_extras", lambda: {"gguf": ["llama_cpp"]})
    assert settle_plan(bundle, "auto", None, "auto") == ONE


def test_graphs_for_npus_need_no_llama_cpp(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "installed_extras", lambda: {"gguf": ["llama_cpp"]})
    found = plan_file._plans_for(tuned(bundle, Plan("ggml"), Plan("npu"), ONE), "auto")
    assert found == [Plan("npu"), ONE]


def test_other_processors_keep_theirs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(bundle, tuned(bundle, ONE))
    with monkeypatch.context() as patch:
        patch.setattr(plan_file, "processor_key", lambda: "another")
        assert read_plan(bundle) is None
        write_plan(bundle, tuned(bundle, Plan("onnx", prefill_chunk=128)))
    assert settle_plan(bundle, "auto", None, "auto") == ONE
    assert len(json.loads(bundle.path(PLAN).read_text())["processors"]) == 2
    assert [path.name for path in bundle.folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged plan"),
        (b"{", "damaged plan"),
        (b"\xff\xfe", "damaged plan"),
        (b"[" * 100_000, "damaged plan"),
        (b"[]", "no plan of this program's version"),
        (b'{"schema_version": 2, "processors": {}}', "no plan of this program's version"),
        (b'{"schema_version": 1, "processors": []}', "no plan of this program's version"),
    ],
)
def test_a_damaged_file_is_passed_over_with_a_line(
    bundle: Bundle, content: bytes, message: str
) -> None:
    bundle.path(PLAN).write_bytes(content)
    with pytest.warns(PlanWarning, match=message) as caught:
        assert settle_plan(bundle, "auto", None, "auto") == Plan("onnx")
    assert len(caught) == 1
    with pytest.warns(PlanWarning, match=message):
        write_plan(bundle, tuned(bundle, ONE))
    assert settle_plan(bundle, "auto", None, "auto") == ONE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder_threads": -1}, f"decoder_threads is -1, expected 0 to {MOST_THREADS}"),
        ({"decoder_threads": MOST_THREADS + 1}, f"expected 0 to {MOST_THREADS}"),
        ({"vision_threads": 10**400}, f"expected 0 to {MOST_THREADS}"),
        ({"vision_threads": 1.0}, "vision_threads: expected int, found 1.0"),
        ({"decoder_threads": True}, "decoder_threads: expected int, found True"),
        ({"max_resident_mb": float("nan")}, "max_resident_mb is nan"),
        ({"max_resident_mb": 10**400}, "max_resident_mb: expected float"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_weights": "gone"}, "expected one of 'mapped', 'released', 'packed'"),
        ({"engine": "gone"}, "engine 'gone' is not known"),
        ({"spinning": "no"}, "expected bool"),
        ({"draft_tokens": 999}, "draft_tokens is 999"),
        ({"tiles_at_once": 0}, "tiles_at_once is 0, expected 1 to 65"),
        ({"tiles_at_once": 66}, "tiles_at_once is 66, expected 1 to 65"),
        ({"tiles_at_once": True}, "tiles_at_once: expected int, found True"),
    ],
)
def test_values_that_no_engine_takes_are_passed_over(
    bundle: Bundle, values: dict[str, Any], message: str
) -> None:
    write_plan(bundle, tuned(bundle, ONE))
    change(bundle, **values)
    with pytest.warns(PlanWarning, match=message):
        assert settle_plan(bundle, "auto", None, "auto") == Plan("onnx")


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_regular_file_is_passed_over_at_once(bundle: Bundle, kind: str) -> None:
    """Opening a FIFO would wait for a writer, reading a device would never end."""
    path = bundle.path(PLAN)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.warns(PlanWarning, match="not a regular file: not used"):
        assert settle_plan(bundle, "auto", None, "auto") == Plan("onnx")


def test_a_plan_of_another_export_is_passed_over(bundle: Bundle) -> None:
    write_plan(bundle, replace(tuned(bundle, ONE), bundle="0" * 64))
    with pytest.warns(PlanWarning, match="measured on another export"):
        assert settle_plan(bundle, "auto", None, "auto") == Plan("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle_plan(bundle, "auto", None, "none")


def megabytes(bundle: Bundle, plan: Plan) -> float:
    """Return the megabytes of the peak."""
    return estimate(bundle.manifest, plan).peak / 1e6


def test_a_plan_beyond_the_memory_that_a_person_allows_gives_way_with_a_line(
    bundle: Bundle,
) -> None:
    packed = replace(ONE, vision_weights="packed", prefill_weights="packed", vision_threads=2)
    mapped = replace(packed, vision_weights="mapped", prefill_weights="mapped")
    write_plan(bundle, tuned(bundle, packed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit = megabytes(bundle, packed) + 0.01
        with mobilevlm.load(bundle.folder, max_memory_mb=limit) as vlm:
            assert vlm.plan == packed
    for plan in (mapped, replace(mapped, memory="compact")):
        limit = megabytes(bundle, plan) + 0.01
        said = rf"takes \d+ MB, the limit is {limit:.0f} MB \(--max-memory\): instead plan onnx"
        with pytest.warns(PlanWarning, match=said) as caught:
            vlm = mobilevlm.load(bundle.folder, max_memory_mb=limit)
        assert vlm.plan == plan and len(caught) == 1
        vlm.close()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # of a plan of one's own, as of the defaults, nothing is said
        mobilevlm.load(bundle.folder, plan=packed, max_memory_mb=limit).close()
        mobilevlm.load(bundle.folder, plan="none", max_memory_mb=limit).close()


def test_the_fastest_engine_gives_way_to_one_that_fits_unless_it_was_asked_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_file, "installed_extras", lambda: {"gguf": []})
    write_plan(bundle, tuned(bundle, Plan("hybrid"), ONE))
    parts = bundle.manifest.artifacts
    [decoder] = [part for part in parts if part.stage == "decoder"]
    gguf = replace(decoder, format="gguf", precision="q4_0")
    both = replace(bundle, manifest=replace(bundle.manifest, artifacts=(*parts, gguf)))
    least = replace(ONE, memory="in turn")
    limits = [Limit("asked", 1e6 * megabytes(bundle, least) + 1, "here")]

    def fitted(engine: str) -> Plan:
        first, *others = settle_plans(both, engine, None, "auto")
        return fit_plan(both, first, limits, others)

    with pytest.warns(PlanWarning, match="instead plan onnx: .*memory in turn"):
        assert fitted("auto") == least
    with pytest.raises(MemoryLimitError, match=r"\(here\): raise it"):
        fitted("hybrid")


# The program


def test_tune_writes_a_plan_that_the_other_verbs_use(bundle: Bundle) -> None:
    done = run_program("tune", bundle.folder, "--budget", "2s", "--engine", "onnx", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["plans"][0]["engine"] == "onnx" and written["candidates"]
    assert written == json.loads(run_program("bench", bundle.folder, "--plan", "--json").stdout)
    shown = run_program("bench", bundle.folder, "--plan").stdout
    assert "chosen" in shown and "plan onnx: " in shown
    change(bundle, decoder_threads=1, prefill_from=77)
    options = ("--no-image", "--runs", "1", "--new-tokens", "2", "--json")
    benched = json.loads(run_program("bench", bundle.folder, *options).stdout)
    assert benched["threads"] == 1 and "prefill from 77" in benched["plan"]
    benched = json.loads(run_program("bench", bundle.folder, *options, "--no-plan").stdout)
    assert benched["plan"] == "plan onnx: the defaults"
    bundle.path(PLAN).write_text("{")
    done = run_program("run", bundle.folder, "--prompt", "Who?", "--max-new-tokens", "1")
    assert done.returncode == 0
    assert done.stderr.count("mobilevlm: warning: ") == 1 and "damaged plan" in done.stderr


def test_tune_tries_what_fits_and_its_plan_is_used_without_a_word(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = megabytes(bundle, Plan("onnx", memory="in turn")) + 0.1
    given = ("--budget", "1s", "--max-memory", f"{limit}MB", "--json")
    done = run_program("tune", bundle.folder, *given)
    assert done.returncode == 0, done.stderr
    [plan] = json.loads(done.stdout)["plans"]
    assert plan["memory"] == "in turn"
    options = ("--no-image", "--runs", "1", "--new-tokens", "2", "--json")
    done = run_program("bench", bundle.folder, *options, "--max-memory", f"{limit}MB")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert "memory in turn" in json.loads(done.stdout)["plan"]
    refused = refusal(capsys, "tune", bundle.folder, "--max-memory", f"{limit - 1}MB")
    assert "(--max-memory)" in refused


def test_wrong_use_is_told_in_a_line(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a time, as in 60s" in refusal(
        capsys, "tune", bundle.folder, "--budget", "soon"
    )
    assert "expected a time" in refusal(capsys, "tune", bundle.folder, "--budget", "0s")
    assert "lacks the GGUF artifact" in refusal(capsys, "tune", bundle.folder, "--engine", "gguf")
    assert "run 'mobilevlm tune" in refusal(capsys, "bench", bundle.folder, "--plan")
