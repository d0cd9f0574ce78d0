"""A pair of GGUF files that llama.cpp alone knows, as a bundle."""

from __future__ import annotations

from pathlib import Path

from mobilevlm.bundle import Bundle
from mobilevlm.errors import BundleError
from mobilevlm.gguf.file import GgufFile, read_gguf
from mobilevlm.gguf.model import bundle_of_files
from mobilevlm.gguf.pair import check_pair, is_ours, pair_spec, projector_name
from mobilevlm.plan import default_threads
from mobilevlm.runtime.engines.llama.pair_probe import probe_pair


def pair_bundle(model: Path, mmproj: Path, engine: str, threads: int | None) -> Bundle | None:
    """Return a pair as a bundle that lies nowhere; none where the files call themselves a family of
    our own.

    Raises:
        BundleError: a file is damaged, llama.cpp cannot run it, or another engine was asked for.
    """
    decoder, vision = read_gguf(model), read_gguf(mmproj)
    if is_ours(decoder, vision):
        return None
    if engine not in ("auto", "gguf"):
        raise BundleError(
            f"{mmproj}: engine {engine} does not know {decoder.architecture!r:.40} with the "
            f"projector {projector_name(vision)!r:.40}, llama.cpp may: use --engine gguf"
        )
    language = check_pair(decoder, vision)
    facts = probe_pair(decoder, vision, threads or default_threads())
    spec = pair_spec(decoder, vision, language, facts)
    return bundle_of_files(decoder, vision, spec, _bytes_of_token(decoder))


def _bytes_of_token(file: GgufFile) -> int:
    """Bytes of weights that a decoding step reads: of experts those that a token uses."""
    count, used = (
        file.metadata.get(f"{file.architecture}.{key}", 0)
        for key in ("expert_count", "expert_used_count")
    )
    sparse = type(count) is int and type(used) is int and 0 < used <= count
    total = 0
    for name, tensor in file.tensors.items():
        if name == "token_embd.weight" and "output.weight" in file.tensors:
            total += tensor.row_size
        else:
            total += tensor.size * used // count if sparse and "_exps." in name else tensor.size
    return total
