"""Tries a pair of GGUF files in a process of its own.

llama.cpp ends the process at much that is wrong with a file. Of families of our own every key and
tensor is compared beforehand; of others only llama.cpp knows what there must be. So it opens them,
encodes an image and runs the language model once where a crash, an endless load or a demand for
memory out of all proportion ends another process than this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mobilevlm._version import __version__
from mobilevlm.bundle import cache_folder
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import BundleError, MobileVLMError
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.pair import PairFacts, check_pair
from mobilevlm.plain_types import from_dict
from mobilevlm.prompt import Prepared, Run, count_positions, in_runs
from mobilevlm.runtime.engines.llama.native import llama_library
from mobilevlm.runtime.engines.llama.pair_decoder import PairDecoder
from mobilevlm.runtime.engines.llama.pair_images import PairImages
from mobilevlm.whole_file import written_whole

SMALL, PHOTO = (64, 64, 3), (2250, 3000, 3)
"""Shapes of images that are tried: the first is encoded, the second is only prepared."""
SECONDS, BYTES_PER_SECOND = 90, 5e6
"""Time to open a pair: so much, and more by the size of the files, on the slowest of cards."""
MEMORY_FACTOR, MEMORY = 3, 3 << 30
"""Bytes that it may take: so many times the files' own, and more."""


def probe_pair(decoder: GgufFile, vision: GgufFile, threads: int) -> PairFacts:
    """Return llama.cpp's answers about a pair whose headers were checked. A pair that was tried
    before is not tried again, as long as its files are the same.

    Raises:
        BundleError: llama.cpp cannot run it, or the process that tried came to no end.
    """
    library = llama_library()  # a package that is missing is told here
    try:
        note = _note_of((*decoder.parts, *vision.parts), library.__version__)
    except RuntimeError:  # there is no home folder
        return _facts(decoder, vision, threads)
    try:
        data = json.loads(note.read_text(encoding="utf-8"))
        return from_dict(PairFacts, data, str(note), strict=True)
    except (OSError, ValueError, MobileVLMError):
        facts = _facts(decoder, vision, threads)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(note) as draft:
            draft.write_text(json.dumps(asdict(facts)), encoding="utf-8")
    except OSError:
        pass  # the pair is tried again next time
    return facts


def _note_of(paths: Iterable[Path], version: str) -> Path:
    """Return where the answers about files are kept. ``version``: of llama.cpp."""
    hasher = hashlib.blake2b(f"{__version__} {version}".encode(), digest_size=16)
    for path in paths:
        stat = path.stat()
        said = f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        hasher.update(said.encode(errors="surrogateescape"))
    return cache_folder() / "pairs" / f"{hasher.hexdigest()}.json"


def _facts(decoder: GgufFile, vision: GgufFile, threads: int) -> PairFacts:
    """Try a pair in a process of its own; errors as of :func:`probe_pair`."""
    model, mmproj = decoder.path, vision.path
    limit = SECONDS + (decoder.size + vision.size) / BYTES_PER_SECOND
    command = [sys.executable, "-m", __name__, str(model), str(mmproj), str(threads)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit, env=environment, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise BundleError(
            f"{mmproj}: llama.cpp did not open it beside {model.name} within {limit:.0f} s: "
            f"damaged, or too large for this machine"
        ) from None
    said = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0 and said:
        return from_dict(PairFacts, json.loads(said[-1]), "the answers about a pair")
    errors = [line.strip() for line in done.stderr.decode(errors="replace").splitlines()]
    if done.returncode == BundleError.exit_code and errors:
        raise BundleError(errors[-1])
    raise BundleError(
        f"{mmproj}: llama.cpp cannot run it beside {model.name}: {_cause(done.returncode, errors)}"
        f": damaged, not of one model, or of a kind that the installed llama.cpp does not know"
    )


def _cause(code: int, errors: list[str]) -> str:
    """Return how the process ended, and what was said last."""
    told = next((line for line in reversed(errors) if "GGML_ASSERT" in line or "error" in line), "")
    said = f" ({told[-160:]})" if told else ""
    try:
        return f"it ended with {signal.Signals(-code).name}{said}"
    except ValueError:
        return f"it ended with code {code}{said}"


def _limit_memory(size: int) -> None:
    """Bound the memory of this process. ``size``: of the files."""
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = MEMORY_FACTOR * size + MEMORY
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or soft > wanted:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _try(model: Path, mmproj: Path, threads: int) -> PairFacts:
    """Open a pair, run it once, and say what it is like."""
    headers = read_gguf(model), read_gguf(mmproj)
    _limit_memory(sum(header.size for header in headers))
    spec = check_pair(*headers)
    images, decoder = open_pair(*headers, spec, threads, threads)
    small = images.prepare(np.full(SMALL, 128, np.uint8))
    photo = images.prepare(np.full(PHOTO, 128, np.uint8))
    if not any(isinstance(piece, Run) for piece in small.pieces):
        raise BundleError(f"{mmproj}: llama.cpp makes nothing of an image by it: damaged")
    if (taken := count_positions(small.pieces) + 2) > spec.context_length:
        raise BundleError(
            f"{model}: a small image takes {taken - 2} tokens, the context holds "
            f"{spec.context_length}: no question about an image fits"
        )
    _run_once(decoder, images, small)
    both = small, photo
    runs = [piece.rows for image in both for piece in image.pieces if isinstance(piece, Run)]
    return PairFacts(
        images.width,
        min(runs),
        max(count_positions(image.pieces) for image in both),
        max(runs),
        bool(decoder.tokenizer.encode("").ids),
        tuple(decoder.tokenizer.ends),
    )


def open_pair(
    model: GgufFile, mmproj: GgufFile, spec: DecoderSpec, threads: int, image_threads: int
) -> tuple[PairImages, PairDecoder]:
    """Open both files of a pair.

    Raises:
        BundleError: llama.cpp cannot load one.
    """
    decoder = PairDecoder(model, spec, threads)
    images = PairImages(mmproj, decoder.model, image_threads, decoder.exact)
    decoder.has_axes, decoder.blocks = images.has_axes, images.blocks
    return images, decoder


def _run_once(decoder: PairDecoder, images: PairImages, image: Prepared) -> None:
    """Run an image between two tokens; of one in tiles the first.

    Raises:
        BundleError: results are no numbers.
    """
    [arrays] = image.arrays
    embeds, state = images.encode_runs(arrays, 1).embeds, decoder.new_state()
    decoder.append(state, [0], 0)
    for part in in_runs(image.pieces):
        if isinstance(part, Run):
            decoder.append_rows(state, decoder.placed(embeds, arrays, 0, 0), 0)
            break
        decoder.append(state, part, 0)
    if not (np.isfinite(embeds).all() and np.isfinite(decoder.step(state, 0)).all()):
        raise BundleError("llama.cpp computes no numbers from a grey image: a file is damaged")


def main() -> None:
    """Print the answers about the pair that the command line names."""
    model, mmproj, threads = sys.argv[1:]
    try:
        facts = _try(Path(model), Path(mmproj), int(threads))
    except MobileVLMError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(MobileVLMError.exit_code)
    print(json.dumps(asdict(facts)))


if __name__ == "__main__":
    main()
