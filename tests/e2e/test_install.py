"""Base install on a device: it runs a bundle and brings nothing of the export with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import BundleOf, fixture_named

import mobilevlm

ROOT = Path(__file__).parents[2]
NOT_ON_A_DEVICE = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors",
                   "sentencepiece", "google.protobuf")  # fmt: skip


@pytest.mark.parametrize("program", [
    "import mobilevlm.runtime",
    "import mobilevlm.runtime, sys; mobilevlm.load(sys.argv[1]).generate('Who?', max_new_tokens=2)",
])  # fmt: skip
def test_the_runtime_imports_nothing_of_the_export(program: str, bundle_of: BundleOf) -> None:
    also = ("click", "rich") if program.endswith("runtime") else ("click",)
    names = (*NOT_ON_A_DEVICE, *also, "mobilevlm.export", "mobilevlm.reference")
    program += f"\nimport sys; print(*(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(bundle_of("tiny", "int4"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\n"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the base install of this checkout (from the package index)."""
    folder = tmp_path_factory.mktemp("device")
    # A copy: building leaves files behind in the source tree.
    source = folder / "source"
    names = ("mobilevlm", "export", "runtime")
    for name in names:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*install, "-c", str(ROOT / "constraints.txt"), str(source)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder / "venv" / "bin"


def run(device: Path, *command: object) -> subprocess.CompletedProcess[str]:
    program, *arguments = map(str, command)
    return subprocess.run(
        [device / program, *arguments], capture_output=True, text=True, timeout=120, cwd=device
    )


def test_the_base_install_has_only_what_a_device_needs(device: Path) -> None:
    code = (
        "import importlib.metadata, mobilevlm, mobilevlm.runtime\n"
        "print(mobilevlm.__file__)\n"
        "print(*sorted(d.metadata['Name'] for d in importlib.metadata.distributions()))"
    )
    done = run(device, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    where, names = done.stdout.splitlines()
    assert Path(where).is_relative_to(device.parent)
    found = {name.lower().replace("_", "-") for name in names.split()}
    assert {"mobilevlm-edge", "onnxruntime", "tokenizers", "pillow"} <= found
    unwanted = {"torch", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors"}
    assert found & (unwanted | {"sentencepiece", "ml-dtypes"}) == set()


def test_the_base_install_answers_as_the_full_one(device: Path, bundle_of: BundleOf) -> None:
    bundle, image = bundle_of("tiny", "int4"), fixture_named("llava_v1").image
    done = run(
        device, "mobilevlm", "run", bundle, "--image", image,
        "--prompt", "What is it?", "--max-new-tokens", 12, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with mobilevlm.load(bundle) as vlm:
        expected = vlm.generate("What is it?", [image], max_new_tokens=12)
    assert json.loads(done.stdout)["token_ids"] == expected.token_ids


def test_the_base_install_answers_with_the_built_in_model_and_writes_nothing(
    device: Path, tmp_path: Path
) -> None:
    """By the name of the distribution, as pipx runs it."""

    def files() -> dict[Path, int]:
        places = (path for path in device.parent.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in places}

    before = files()
    done = subprocess.run(
        [device / "mobilevlm-edge", "run", "nano", "--prompt", "What can you do?", "-n", "8"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": str(device), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert files() == before


def test_the_base_install_says_what_exporting_needs(
    device: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run(device, "mobilevlm", "export", tiny_checkpoint, "-o", tmp_path / "bundle")
    assert done.returncode == 2
    assert done.stderr.startswith("mobilevlm: error: ") and done.stderr.count("\n") == 1
    assert "pip install 'mobilevlm-edge[export]'" in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_the_base_install_tells_which_extras_are_missing(device: Path) -> None:
    done = run(device, "mobilevlm", "doctor", "--json")
    extras = json.loads(done.stdout)["extras"]
    assert "onnxscript" in extras["export"] and extras["reference"] == ["torch"]
    shown = " ".join(run(device, "mobilevlm", "doctor").stdout.split())
    assert "missing torch: pip install 'mobilevlm-edge[reference]'" in shown
