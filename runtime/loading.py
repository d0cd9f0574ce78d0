"""Opens what a person names: a bundle, a built-in model, or GGUF files made elsewhere."""

from __future__ import annotations

import time
from functools import partial
from os import PathLike
from pathlib import Path

from mobilevlm.bundle import open_bundle
from mobilevlm.bundle_identity import steadily
from mobilevlm.errors import BundleError
from mobilevlm.plan import Plan, engine_for_limit
from mobilevlm.runtime.open_model import open_model
from mobilevlm.runtime.sequence.cache import DEFAULT_CACHE_MB
from mobilevlm.runtime.settings import check_cache_dir, check_settings
from mobilevlm.runtime.tuning.plan_file import PlanChoice
from mobilevlm.runtime.vlm import VLM


def load(
    bundle: str | PathLike[str],
    engine: str = "auto",
    threads: int | None = None,
    mmproj: str | PathLike[str] | None = None,
    cache_mb: float = DEFAULT_CACHE_MB,
    max_resident_mb: float | None = None,
    plan: Plan | PlanChoice = "auto",
    max_memory_mb: float | None = None,
    max_tiles: int | None = None,
    max_image_tokens: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
    cache_dir_mb: float | None = None,
    image_tokens: int | None = None,
) -> VLM:
    """Opens a bundle for running.

    ``bundle``: its folder, the name of a built-in model (``nano``), or a language model in a GGUF
    file made elsewhere, with its image encoder in ``mmproj``. ``engine``: ``onnx`` (ONNX Runtime),
    ``gguf`` (llama.cpp), ``hybrid`` (ONNX Runtime for the image, llama.cpp for the text) or
    ``auto``: the first of them that the bundle has artifacts for. ``threads``: for both stages, by
    default, and at most, as many as this process may use. ``cache_mb``: megabytes for what later
    requests can reuse from earlier ones (images, beginnings of prompts), besides the
    sequences themselves; 0: each request is computed from its first token. ``max_resident_mb``:
    megabytes of sparse experts that may be in memory at a time; it needs, and means, the engine
    ``ggml``. ``plan``: ``auto`` takes the one that ``mobilevlm tune`` measured for this processor,
    where there is one (``engine``, ``threads`` and ``max_resident_mb`` win over it); ``none`` does
    without. ``max_memory_mb``: the most that may be resident while one question about one image
    is answered, in megabytes, besides the limits that the system has (runtime/memory/fitting.py);
    settings that take less are chosen where they are needed. ``max_tiles``: tiles that an image is
    split into at most, where the model splits images, besides the whole made small; 1: it is not
    split. By default, and at most, as many as the checkpoint has. ``max_image_tokens``: visual
    tokens that an image becomes at most, where the model encodes images near their own size.
    ``cache_dir``: a folder in which visual tokens of images and sounds stay for later processes,
    at most ``cache_dir_mb`` megabytes of them (1000 by default); answers are the same bit for bit.
    ``image_tokens``: the most visual tokens of an image for the decoder: fewer tiles where the
    model splits images, then fewer rows of the encoder. Answers become worse, text reading first
    (docs/explanation/runtime.md).

    Raises:
        MemoryLimitError: the model needs more than a limit. Nothing was loaded.
        BundleError: no bundle there, damaged, or nothing in it that the engine can run.
        ReplacedError: exports replace the bundle again and again.
    """
    from mobilevlm.runtime.builtin_bundle import bundle_path  # not for who imports

    limits = (max_resident_mb, max_memory_mb, max_tiles, max_image_tokens, image_tokens)
    check_settings(bundle, engine, threads, plan, cache_mb, *limits)
    check_cache_dir(cache_dir, cache_dir_mb)
    engine = engine_for_limit(engine, max_resident_mb)
    start = time.perf_counter()
    path = bundle_path(Path(bundle), engine)
    check_paths(path, mmproj)
    opened = partial(
        open_model,
        engine=engine,
        threads=threads,
        cache_mb=cache_mb,
        start=start,
        max_resident_mb=max_resident_mb,
        max_memory_mb=max_memory_mb,
        max_tiles=max_tiles,
        max_image_tokens=max_image_tokens,
        cache_dir=cache_dir,
        cache_dir_mb=cache_dir_mb,
        image_tokens=image_tokens,
    )
    if mmproj is not None:
        from mobilevlm.gguf.model import gguf_bundle
        from mobilevlm.gguf.tokenizer import gguf_tokenizer
        from mobilevlm.runtime.engines.llama.pair import pair_bundle

        if (pair := pair_bundle(path, Path(mmproj), engine, threads)) is not None:
            return opened(pair)
        described, header = gguf_bundle(path, Path(mmproj))
        return opened(described, tokenizer=gguf_tokenizer(header))
    return steadily(path, lambda: opened(open_bundle(path), plan=plan))


def check_paths(path: Path, mmproj: str | PathLike[str] | None) -> None:
    """That a GGUF file comes with its image encoder, and a bundle alone.

    Raises:
        BundleError: it does not, or the folder is a checkpoint.
    """
    if path.suffix == ".gguf":
        if mmproj is None:
            raise BundleError(
                f"{path}: its image encoder is in a file of its own: give it with --mmproj FILE"
            )
        return
    if mmproj is not None:
        raise BundleError(f"{path}: --mmproj belongs to a .gguf file: a bundle has its encoder")
    if (path / "config.json").is_file() and not (path / "manifest.json").is_file():
        raise BundleError(
            f"{path}: a checkpoint, not a bundle: run 'mobilevlm export {path} -o BUNDLE' first"
        )
