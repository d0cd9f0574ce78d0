"""Tokens around the images of a language model in a GGUF file, as llama.cpp has them beside each
projector (ggml-org/llama.cpp, tools/mtmd/mtmd.cpp): no key of a file names them."""

from __future__ import annotations

from mobilevlm.errors import BundleError
from mobilevlm.gguf.encoder import Encoder
from mobilevlm.gguf.file import GgufFile
from mobilevlm.gguf.tokenizer import gguf_tokenizer
from mobilevlm.input_spec import LayoutSpec, Tiles
from mobilevlm.media.tiles import marked_layout
from mobilevlm.spec import IMAGE_PLACEHOLDER

_TILES = ("<fake_token_around_image>", "<global-img>", "<image>")
"""Tokens of Idefics3: around images, before the image made small, and for a visual token."""
_ASPECT_TILES = ("<img>", "</img>", "<IMG_CONTEXT>")
"""Tokens of InternVL: before and behind an image, and for a visual token."""


def image_layout(file: GgufFile, encoder: Encoder) -> tuple[LayoutSpec, str]:
    """Return the ids around images, and the text that a chat template writes for one. ``file``: of
    the language model, its vocabulary checked.

    Raises:
        BundleError: the vocabulary lacks one of the tokens.
    """
    if encoder.projector.kind != "mlp_downsample":
        return LayoutSpec(), IMAGE_PLACEHOLDER
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    split = encoder.image if isinstance(encoder.image, Tiles) else None
    marks = _ASPECT_TILES if split is None else _TILES
    for mark in marks:
        if mark not in tokens:
            raise BundleError(
                f"{file.path}: the vocabulary lacks {mark!r}, which stands for images or around "
                f"them beside this image encoder: take both files of one model"
            )
    first, second, mark = marks
    row_id = tokens.index(mark)
    if split is None:
        begin, end = ((tokens.index(text),) for text in (first, second))
        return LayoutSpec(begin_ids=begin, end_ids=end, row_id=row_id), mark
    tokenizer = gguf_tokenizer(file)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    return marked_layout(ids, split, first, second, row_id), mark
