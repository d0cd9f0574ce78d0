"""The files that the candidates run, made once in a folder that later runs find again."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mobilevlm
from mobilevlm.builtin import checkpoint_path
from mobilevlm.bundle import Bundle, cache_folder, is_bundle, open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions
from mobilevlm.spec import GGUFType
from mobilevlm.synth.checkpoints import NAMES, write_checkpoint

TUNING = 240.0
"""Seconds that ``mobilevlm tune`` is given"""


class Artifacts:
    """``folder``: where they are kept. A file is made under another name and renamed."""

    def __init__(self, checkpoint: Path, folder: Path | None) -> None:
        self.name = checkpoint.name
        self.folder = folder or cache_folder() / "compare" / checkpoint.name
        self.folder.mkdir(parents=True, exist_ok=True)
        if str(checkpoint) in NAMES and not checkpoint.exists():
            progress.say(f"weights     random, of {checkpoint}")
            checkpoint = self._made(
                "checkpoint", lambda path: write_checkpoint(str(checkpoint), path)
            )
        self.checkpoint = checkpoint_path(checkpoint)
        self.spec = self._model().spec

    def onnx(self, recipe: str) -> Bundle:
        """The bundle of a recipe, by name or file, ONNX only."""
        return self._bundle(f"onnx-{Path(recipe).stem}", recipe, ("onnx",), None)

    def tuned(self, recipe: str) -> Bundle:
        """The same bundle (its files are linked) with the plan that ``mobilevlm tune`` finds."""
        from mobilevlm.runtime.tuning.tune import tune_bundle

        def write(path: Path) -> None:
            shutil.copytree(self.onnx(recipe).folder, path, copy_function=os.link)
            with progress.track_share("tune") as show:
                tune_bundle(path, TUNING, "onnx", show)

        return open_bundle(self._made(f"onnx-{Path(recipe).stem}-tuned", write))

    def both(self, gguf_type: GGUFType) -> Bundle:
        """The int4 bundle with a GGUF decoder of this type and llama.cpp's image encoder."""
        return self._bundle(f"all-{gguf_type}", "int4", ("onnx", "gguf"), gguf_type)

    def gguf(self, gguf_type: GGUFType) -> Bundle:
        """Only these two, or the bundle of both where it is made already."""
        if is_bundle(self.folder / f"all-{gguf_type}"):
            return self.both(gguf_type)
        return self._bundle(f"gguf-{gguf_type}", "int4", ("gguf",), gguf_type)

    def mmproj(self, kind: GGUFType) -> Path:
        """llama.cpp's image encoder in another precision than the bundles' float16."""
        from mobilevlm.export.gguf.mmproj import write_mmproj

        return self._made(
            f"mmproj-{kind}.gguf",
            lambda path: write_mmproj(self._model(), kind, path, progress.ignore),
        )

    def genai(self, threads: int) -> Path:
        """onnxruntime-genai's model folder around the int4 decoder."""
        from comparison.genai_folder import write_genai_folder

        bundle = self.onnx("int4")
        return self._made(
            f"genai-{threads}", lambda path: write_genai_folder(bundle, path, threads)
        )

    def standard_vision(self) -> Path:
        """Tower and projector in float32 as torch writes them: standard operators, static shape;
        input ``pixel_values`` ``(1, 3, size, size)``."""

        def write(path: Path) -> None:
            # torch keeps the weights of what it has written: not in the process that measures
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                process.submit(write_standard_vision, self.checkpoint, path).result()

        return self._made("vision_standard.onnx", write)

    def mnn(self, python: str, bits: int | None) -> Path:
        """MNN's file of the same, its weights in ``bits``. MNN's command ``mnnconvert`` installs a
        telemetry client into the environment that is active, so what lies under it is called."""
        source = self.standard_vision()
        quantized = ["--weightQuantBits", str(bits), "--weightQuantBlock", "128"] if bits else []

        def write(path: Path) -> None:
            arguments = ["mnnconvert", "-f", "ONNX", "--modelFile", str(source),
                         "--MNNModel", str(path), "--bizCode", "compare", *quantized]  # fmt: skip
            call = f"import _tools; _tools.mnnconvert({arguments!r})"
            done = subprocess.run([python, "-c", call], capture_output=True, text=True)
            if not path.is_file():
                raise MobileVLMError(f"MNN cannot convert {source}: {done.stdout[-200:]}")

        return self._made(f"vision-{bits or 32}.mnn", write)

    def _model(self) -> Model:
        """Not kept: its files stay mapped as long as it lives, and then no load is cold."""
        return open_checkpoint(self.checkpoint, OpenOptions())

    def _bundle(
        self, name: str, recipe: str, formats: tuple[str, ...], gguf_type: GGUFType | None
    ) -> Bundle:
        folder = self.folder / name
        if not is_bundle(folder):
            progress.say(f"bundle      {folder} is made")
            mobilevlm.export(
                self.checkpoint,
                folder,
                recipe=recipe,
                formats=formats,
                gguf_type=gguf_type,
                measure=False,
            )
        return open_bundle(folder)

    def _made(self, name: str, write: Callable[[Path], object]) -> Path:
        target = self.folder / name
        if not target.exists():
            progress.say(f"file        {target} is made")
            unfinished = self.folder / f"unfinished-{name}"
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            write(unfinished)
            unfinished.rename(target)
        return target


def write_standard_vision(checkpoint: Path, path: Path) -> None:
    """See :meth:`Artifacts.standard_vision`. Needs torch; reads no decoder."""
    import torch

    from mobilevlm.reference.model import ReferenceModel, fill_block

    warnings.simplefilter("ignore")  # torch says that its exporter is old, and what it assumes
    model = open_checkpoint(checkpoint, OpenOptions())
    with torch.device("meta"):
        reference = ReferenceModel(model.spec)
    for name in ("vision", "projector"):
        fill_block(reference.get_submodule(name), model.weights, name)
    size = model.spec.image.square.size
    torch.onnx.export(
        torch.nn.Sequential(reference.vision, reference.projector).eval(),
        (torch.zeros(1, 3, size, size),),
        path,
        input_names=["pixel_values"],
        output_names=["visual_tokens"],
        opset_version=17,
        dynamo=False,
    )
