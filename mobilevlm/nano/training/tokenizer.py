"""The small sentencepiece vocabulary, and prompts as ids exactly as inference makes them.

A Llama tokenizer: BPE with byte fallback and the identity normalizer, trained on the generator's
own text plus a little prose, so that common words are one token.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import sentencepiece

from mobilevlm.conversation import CONVERSATIONS
from mobilevlm.input_spec import IMAGE_TOKEN_ID
from mobilevlm.nano.pairs import INTERLEAVED, STACKED, pair_questions
from mobilevlm.nano.questions import caption, caption_question, questions
from mobilevlm.nano.scenes import COLORS, POSITIONS, SHAPES, SIZES, WORDS, sample_scene
from mobilevlm.nano.text_only import PROSE, text_questions
from mobilevlm.nano.training.model import EOS
from mobilevlm.spec import IMAGE_PLACEHOLDER

BOS = 1


def prompt_text(question: str, images: int) -> str:
    """A user's text in conversation template v1; images without a place come first."""
    first = f"{IMAGE_PLACEHOLDER}\n" * (images - question.count(IMAGE_PLACEHOLDER))
    return f"{CONVERSATIONS['v1'].system} USER: {first}{question} ASSISTANT:"


class NanoTokenizer:
    """Ids of prompts and answers; pickles, so that data workers can hold one."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._load()

    def _load(self) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        self.chunk = functools.lru_cache(maxsize=20000)(self._chunk)

    def __getstate__(self) -> bytes:
        return self.model

    def __setstate__(self, state: bytes) -> None:
        self.model = state
        self._load()

    @functools.lru_cache(maxsize=20000)  # noqa: B019 (one tokenizer per process)
    def ends(self, text: str) -> tuple[int, ...]:
        """Return the place at which each token of a chunk ends in its text."""
        proto = self.processor.encode(text, return_type="proto")
        return tuple(piece.end for piece in proto.pieces)

    def _chunk(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.encode(text))

    @property
    def vocab_size(self) -> int:
        return int(self.processor.get_piece_size())

    def prompt_ids(self, text: str) -> list[int]:
        """A templated prompt as ids: BOS, then its chunks with IMAGE_TOKEN_ID between them."""
        ids = [BOS]
        for index, chunk in enumerate(text.split(IMAGE_PLACEHOLDER)):
            ids += [IMAGE_TOKEN_ID] * (index > 0) + list(self.chunk(chunk))
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """An answer and the end of the turn."""
        return [*self.chunk(answer), EOS]

    def decode(self, ids: list[int]) -> str:
        return str(self.processor.decode([token for token in ids if token > EOS]))


def load_tokenizer(path: Path) -> NanoTokenizer:
    """Reads a ``tokenizer.model``."""
    return NanoTokenizer(path.read_bytes())


def train_tokenizer(vocab_size: int = 1024, scenes: int = 3000) -> NanoTokenizer:
    """Trains the vocabulary on the generator's text; the same arguments give the same bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(scenes)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    return NanoTokenizer(model.getvalue())


def _corpus(scenes: int) -> list[str]:
    """Lines of text, each kind of word often enough to earn a piece of its own."""
    lines = PROSE.splitlines() * 20
    lines += [prompt_text("", 0), '"Answer the question', '"The second picture'] * 50
    letters = [" ".join("abcdefghijklmnopqrstuvwxyz"), " ".join("0123456789-\"'.,?!:")]
    lines += letters * 20 + [line.upper() for line in letters] * 5
    for word in (*WORDS, *COLORS, *SHAPES, *SIZES, *POSITIONS):
        lines += [f"the {word} is {word}."] * 4
    previous = sample_scene(0)
    for seed in range(1, scenes + 1):
        scene = sample_scene(seed)
        asked = [caption_question(scene), *questions(scene, 4)]
        asked += [*pair_questions(previous, scene, 1), *text_questions(seed, 2)]
        lines.append(caption(scene))
        for question in asked:
            text = question.text.replace(IMAGE_PLACEHOLDER, "")
            lines += [*filter(None, text.split("\n")), question.answer]
            # After an image a question follows a newline: its first word has no space before it.
            asked_text = question.text.removeprefix(INTERLEAVED).removeprefix(STACKED)
            lines.append(f'"{asked_text.split()[0]}')
        previous = scene
    return lines
