"""Made-up BPE tokenizers of any size, sentencepiece's or tiktoken's: English words, then invented
ones.

Every piece is reachable: its own text is encoded as that one piece.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, product

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from mobilevlm.errors import require
from mobilevlm.tokenizers.pieces import SPACE, byte_level_name
from mobilevlm.tokenizers.tokenizer import begin_with

_SPECIAL = (("<unk>", 2), ("<s>", 3), ("</s>", 3))
_NORMAL, _BYTE = 1, 6
_BPE = 2

MIN_VOCABULARY = len(_SPECIAL) + 256 + 1 + (ord("~") - ord("!") + 1)
"""Special pieces, bytes, the space piece and printable ASCII."""

_ENDINGS = "ing ed er ly tion ment ness able est al en es"
_ONSETS = "b c d f g h l m n p r s t v br ch gr pl sh st tr"
_WORDS = """
the of and a to in is it you that he was for on are with as his they be at one have this from or had
by but some what there we can out other were all your when up use how said an each she which do
their time if will way about many then them would like so these her long make thing see him two has
look more day could go come did my no most number who over know water than call first people may
down side been now find any new work part take get place made live where after back little only
round man year came show every good me give our under name very through just form much great think
say help low line before turn cause same mean differ move right boy old too does tell set three want
air well also play small end put home read hand large add even land here must big high such follow
act why ask men change went light kind off need house picture image photo try us again animal point
world near build self earth father head stand own page should country found answer school grow study
still learn plant cover food sun four thought let keep eye never last door between city tree cross
since hard start might story saw far sea draw left late run while press close night real life few
stop open seem together next white black red blue green yellow brown car dog cat bird book paper
group always music those both mark often letter until mile river feet care second enough plain girl
usual young ready above ever though feel talk street table chair window shows sitting standing
holding wearing person woman child several
"""


def tokenizer_model(vocab_size: int) -> bytes:
    """A serialized sentencepiece model of exactly ``vocab_size`` pieces (``tokenizer.model``).

    Raises:
        MissingExtraError: sentencepiece is not installed.
        ValueError: ``vocab_size`` is below :data:`MIN_VOCABULARY`.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {MIN_VOCABULARY}")
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise require("sentencepiece", "export", "writing a tokenizer") from None
    model = sentencepiece_model_pb2.ModelProto()
    for text, kind in _SPECIAL:
        model.pieces.add(piece=text, score=0.0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_BYTE)
    for rank, text in enumerate(_pieces(vocab_size - len(model.pieces))):
        model.pieces.add(piece=text, score=-float(rank), type=_NORMAL)
    trainer = model.trainer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = _BPE, vocab_size, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    rules = model.normalizer_spec
    rules.name, rules.add_dummy_prefix = "identity", True
    rules.remove_extra_whitespaces, rules.escape_whitespaces = False, True
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def tiktoken_ranks(count: int) -> bytes:
    """A tiktoken file of ``count`` ranks: the bytes, then the same words as above."""
    letters = ord("~") - ord(" ") + 1
    words = [piece for piece in _pieces(count - 256 + letters) if len(piece) > 1]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word.replace(SPACE, " ").encode() for word in words]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    return b"".join(lines)


def byte_level_tokenizer(size: int) -> Tokenizer:
    """A tokenizer of GPT-2's kind with OPT's special tokens, ``size`` tokens and ``<image>``."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = _byte_level(size - len(special), special, ["<image>"])
    begin_with(tokenizer, "</s>")
    return tokenizer


def chat_tokenizer(count: int, special: Sequence[str]) -> Tokenizer:
    """A tokenizer of GPT-2's kind with ``count`` tokens, and special ones after them (Qwen2)."""
    return _byte_level(count, [], special)


def _byte_level(count: int, before: Sequence[str], after: Sequence[str]) -> Tokenizer:
    """Return bytes and words as ``count`` tokens, and special ones before and after them."""
    words, merges = _words_and_merges(count)
    vocabulary = {text: index for index, text in enumerate([*before, *words])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in [*before, *after]]
    )
    return tokenizer


@lru_cache(maxsize=1)
def _words_and_merges(count: int) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Return so many bytes and words, and the merges that make the words."""
    words = [byte_level_name(bytes([byte])) for byte in range(256)]
    merges: list[tuple[str, str]] = []
    ranks = {letter: rank for rank, letter in enumerate(words)}
    for word in _words():
        parts = _split(byte_level_name(word.replace(SPACE, " ").encode()), ranks)
        for end in range(2, len(parts) + 1):
            if len(words) == count:
                break
            left, whole = "".join(parts[: end - 1]), "".join(parts[:end])
            merges.append((left, parts[end - 1]))
            ranks[whole] = len(ranks)
            words.append(whole)
        if len(words) == count:
            break
    return tuple(words), tuple(merges)


def _pieces(count: int) -> list[str]:
    """``count`` pieces, best first. A word joins by merging, from the left, the pieces that it
    falls into so far; since later pieces rank lower, nothing that comes later parts it again."""
    ranks = {SPACE: 0} | {chr(code): code - 32 for code in range(ord("!"), ord("~") + 1)}
    for word in _words():
        parts = _split(word, ranks)
        for end in range(2, len(parts) + 1):
            if len(ranks) == count:
                return list(ranks)
            ranks["".join(parts[:end])] = len(ranks)
    raise AssertionError(f"not enough words for {count} pieces")


def _split(word: str, ranks: dict[str, int]) -> list[str]:
    """Byte-pair encoding: merges the best-ranked neighbours until none is a piece."""
    parts = list(word)
    while len(parts) > 1:
        joined = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, index = min(joined)
        if rank == len(ranks):
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def _words() -> Iterator[str]:
    """English words and endings, then invented words of one to three syllables."""
    words = _WORDS.split()
    yield from (SPACE + word for word in words)
    yield from _ENDINGS.split()
    yield from (SPACE + word.capitalize() for word in words[:100])
    syllables = [
        "".join(sounds)
        for sounds in product(_ONSETS.split(), "aeiou", ["", "l", "m", "n", "r", "s", "t"])
    ]
    shuffled = random.Random(0)
    shuffled.shuffle(syllables)
    yield from syllables
    yield from (SPACE + syllable for syllable in syllables)
    while True:
        yield SPACE + "".join(shuffled.choices(syllables, k=shuffled.choice((2, 2, 3))))
