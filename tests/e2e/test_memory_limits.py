"""Models under real limits of memory, in processes of their own on one core."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import refusal, run_program

from mobilevlm.bundle import read_manifest
from mobilevlm.cli import main
from mobilevlm.plan import MemorySetting, Plan
from mobilevlm.runtime.memory.estimate import estimate

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux only")
UNDER = """
import os, resource, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import onnxruntime
from mobilevlm.cli import main
from mobilevlm.runtime import load
from mobilevlm.runtime.memory.limits import in_use
kind, size = getattr(resource, sys.argv[1]), int(sys.argv[2])
if size < 0:  # what is in use by now, and so much more
    size = int(in_use()[kind == resource.RLIMIT_DATA]) - size
resource.setrlimit(kind, (size, size))
main(sys.argv[3:])
"""
MEASURE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy as np
from mobilevlm.plan import Plan
from mobilevlm.runtime import load
from mobilevlm.runtime.machine import peak_memory_mb
with load(sys.argv[1], plan=Plan(sys.argv[2], memory=sys.argv[3])) as vlm:
    picture = np.full((192, 192, 3), 128, np.uint8)
    found = vlm.generate("What color is the star?", [picture], max_new_tokens=16, ignore_eos=True)
    print(peak_memory_mb(), found.prompt_tokens + 16)
"""
WITHIN = 0.15


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both built-in models, int4."""
    base = tmp_path_factory.mktemp("built-in")
    for name in ("nano", "nano-moe"):
        main(["export", name, "-o", str(base / name), "--no-measure", "--quiet"])
    return {name: base / name for name in ("nano", "nano-moe")}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "grey.png"
    Image.new("RGB", (192, 192), (128, 128, 128)).save(path)
    return path


def under(kind: str, size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The program with a limit set first, on one core."""
    command = [sys.executable, "-c", UNDER, kind, str(size), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
@pytest.mark.parametrize("name", ["nano", "nano-moe"])
def test_built_in_models_answer_within_512_mb_on_one_core(
    kind: str, name: str, bundles: dict[str, Path], picture: Path
) -> None:
    question = ("--image", picture, "--prompt", "What color is the star?", "--json")
    done = under(kind, 512_000_000, "run", bundles[name], *question)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]


@pytest.mark.parametrize(
    ("kind", "what"), [("RLIMIT_AS", "address space"), ("RLIMIT_DATA", "data")]
)
def test_a_model_beyond_a_limit_is_refused_with_its_need_before_it_is_loaded(
    kind: str, what: str, bundles: dict[str, Path]
) -> None:
    done = under(kind, -4_000_000, "run", bundles["nano"], "--prompt", "What?")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f" MB of {what}, the limit is " in done.stderr


def test_what_a_person_allows_chooses_the_setting_or_refuses(
    bundles: dict[str, Path], picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, _ = read_manifest(bundles["nano"])
    least = estimate(manifest, Plan("onnx", memory="in turn")).peak / 1e6
    given = ("run", bundles["nano"], "--image", picture, "--prompt", "What?")
    found = refusal(capsys, *given, "--max-memory", f"{least - 1:.0f}MB")
    assert f"takes {least:.0f} MB of memory" in found and "(--max-memory)" in found
    done = run_program(
        "bench", bundles["nano"], "--runs", 1, "--max-memory", f"{least + 1:.0f}MB", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "memory in turn" in json.loads(done.stdout)["plan"]


@pytest.mark.parametrize("setting", ["fast", "compact", "in turn"])
@pytest.mark.parametrize("name", ["nano", "nano-moe"])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    name: str, setting: MemorySetting, bundles: dict[str, Path]
) -> None:
    command = [sys.executable, "-c", MEASURE, str(bundles[name]), "onnx", setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured, positions = done.stdout.split()
    manifest, _ = read_manifest(bundles[name])
    plan = Plan("onnx", memory=setting)
    told = estimate(manifest, plan, int(positions)).peak / 1e6
    assert abs(told / float(measured) - 1) < WITHIN, (told, measured)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of version 1 below this process's own, if the system lets us make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        made = Path("/sys/fs/cgroup/memory") / name.lstrip("/") / f"mobilevlm-test-{os.getpid()}"
        if "memory" in controllers.split(","):
            try:
                made.mkdir()
            except OSError:
                break
            yield made
            made.rmdir()
            return
    pytest.skip("no control group of memory can be made here")


def test_a_control_group_bounds_a_model_that_runs_and_doctor_shows_it(
    group: Path, bundles: dict[str, Path], picture: Path
) -> None:
    (group / "memory.limit_in_bytes").write_text("160000000")
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    program = [*enter, sys.executable, "-m", "mobilevlm"]
    given = ["run", str(bundles["nano"]), "--image", str(picture), "--prompt", "What?", "--json"]
    done = subprocess.run([*program, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]
    done = subprocess.run([*program, "doctor", "--json"], capture_output=True, text=True)
    limits = json.loads(done.stdout)["memory_limits"]
    assert any(item["kind"] == "cgroup" and item["bytes"] < 161e6 for item in limits)


MANY = """
import sys
import numpy as np
from mobilevlm.runtime import load
with load(sys.argv[1], threads=1, cache_mb=float(sys.argv[3])) as vlm:
    for seed in range(int(sys.argv[2])):
        image = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)
        print(*vlm.generate("What is it?", [image], max_new_tokens=1, ignore_eos=True).token_ids)
"""


def test_more_images_than_a_control_group_has_room_for_are_answered_as_without_a_cache(
    group: Path, bundles: dict[str, Path]
) -> None:
    """Without bounds the cache of 256 MB took 1.4 MB an image, and the kernel ended the process."""
    (group / "memory.limit_in_bytes").write_text("100000000")
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    program = [sys.executable, "-c", MANY, str(bundles["nano"]), "55"]
    bounded = subprocess.run([*enter, *program, "256"], capture_output=True, text=True)
    assert bounded.returncode == 0, bounded.stderr
    free = subprocess.run([*program, "0"], capture_output=True, text=True)
    assert bounded.stdout == free.stdout and bounded.stdout.count("\n") == 55


def test_an_image_that_needs_more_than_a_person_allows_is_refused_before_it_is_decoded(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    from PIL import Image

    path = tmp_path / "large.png"
    Image.new("RGB", (9000, 9000)).save(path)
    given = ("run", bundles["nano"], "--prompt", "What?", "--max-memory", "200MB", "--image", path)
    done = run_program(*given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "9000 × 9000 pixels takes" in done.stderr and "(--max-memory)" in done.stderr
    assert done.stdout == ""
