"""Prompts of one model: what a person says and shows, made ready to run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tokenizers import Tokenizer

from mobilevlm.conversation import official_ids, read_text, render, user_message
from mobilevlm.errors import PromptError
from mobilevlm.image import ImageInput, RoomFor
from mobilevlm.input_spec import FixedImage
from mobilevlm.instruction import with_instruction
from mobilevlm.messages import Message, check_images, read_messages, with_system
from mobilevlm.preparation import fewest_pieces, prepare, with_max_tiles
from mobilevlm.prompt import Mark, Prepared, Token, count_positions, expand
from mobilevlm.runtime.sequence.session import Prompt, check_length
from mobilevlm.spec import ModelSpec
from mobilevlm.templates.plain_text import check_text, protect

SHORT_TOKEN = 8
"""Characters. A prompt whose tokens are no longer is tokenized without a closer look."""

Images: TypeAlias = "Sequence[ImageInput]"


class PromptReader:
    """Reads prompts for one model. ``instruction_tokenizer``: of the text that the image encoder
    reads, if it reads any; ``room_for``: memory that an image may take; ``prepare``: what prepares
    images in place of the spec."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        instruction_tokenizer: Tokenizer | None,
        room_for: RoomFor,
        prepare: Callable[[ImageInput, RoomFor], Prepared] | None = None,
    ) -> None:
        self._prepare = prepare
        self.spec, self.tokenizer = spec, tokenizer
        self._instruction_tokenizer, self._room_for = instruction_tokenizer, room_for
        self._longest_token: int | None = None
        """Characters; found when a prompt is long."""

    def image(self, source: ImageInput, images: int = 1, max_tiles: int | None = None) -> Prepared:
        """Return an image of a prompt with so many as the model takes it, in no more than
        ``max_tiles``.

        Raises:
            ImageError: as of :func:`mobilevlm.preparation.prepare`.
            MobileVLMError: the model does not split images.
        """
        spec = self.spec.image
        if max_tiles is not None:
            spec = with_max_tiles(spec, max_tiles)
        if self._prepare is not None:
            return self._prepare(source, self._room_for)
        return prepare(source, spec, self._room_for, images)

    def asked_image(self, source: ImageInput, question: str, images: int) -> Prepared:
        """Return an image with all that its encoder reads when ``question`` is asked about it."""
        if self._instruction_tokenizer is None:
            return self.image(source, images)
        parts = [{"type": "text", "text": question}]
        text = render(self.spec.conversation, [{"role": "user", "content": parts}])
        return self._with_instruction(self.image(source, images), text)

    def prompt(
        self,
        prompt: str | Sequence[Message],
        images: Images,
        raw: bool,
        special_tokens: bool,
        system: str | None = None,
    ) -> tuple[Prompt, list[Message]]:
        """Return a prompt that is ready to run, and its messages."""
        start = time.perf_counter()
        text, shown, said = self._read(prompt, images, raw, special_tokens, system)
        tokens = self._tokenized(text, len(shown))
        self.check_fits(tokens)
        prepared = [
            self._with_instruction(self.image(source, len(shown)), text) for source in shown
        ]
        pieces = expand(tokens, [image.pieces for image in prepared])
        return Prompt(pieces, prepared, time.perf_counter() - start), said

    def tokens(
        self,
        prompt: str | Sequence[Message],
        images: int,
        raw: bool,
        special_tokens: bool = True,
        system: str | None = None,
    ) -> list[Token]:
        """Return a prompt's ids, with a mark for each of so many images."""
        text, shown, _ = self._read(prompt, [b""] * images, raw, special_tokens, system)
        return self._tokenized(text, len(shown))

    def official_ids(
        self,
        prompt: str | Sequence[Message],
        images: int | Images,
        raw: bool,
        special_tokens: bool,
        system: str | None = None,
    ) -> list[int]:
        """Return a prompt's ids as the official code has them.

        Raises:
            PromptError: they depend on the images, of which only the number is given.
        """
        given = [b""] * images if isinstance(images, int) else images
        text, shown, _ = self._read(prompt, given, raw, special_tokens, system)
        tokens, image = self._tokenized(text, len(shown)), self.spec.image
        if image.layout.row_id is None:
            return official_ids(tokens, image.layout)
        fixed = isinstance(image.preparation, FixedImage)
        if not fixed and any(isinstance(source, bytes) and not source for source in shown):
            raise PromptError(
                "the ids of this model depend on the size of each image: give the images, not "
                "their number"
            )
        pieces = [
            fewest_pieces(image) if fixed else self.image(source, len(shown)).pieces
            for source in shown
        ]
        return official_ids(tokens, image.layout, pieces)

    def check_fits(self, tokens: Sequence[Token]) -> None:
        """Raise PromptError if the context has no room for a prompt; the message says how many
        images it has room for."""
        images = [fewest_pieces(self.spec.image)] * tokens.count(Mark())
        length = count_positions(expand(tokens, images))
        taken = [count_positions(pieces) for pieces in images]
        check_length(length, taken, self.spec.decoder.context_length)

    def _read(
        self,
        prompt: str | Sequence[Message],
        images: Images,
        raw: bool,
        special_tokens: bool,
        system: str | None = None,
    ) -> tuple[str, Images, list[Message]]:
        """The prompt in its template, its images, and what was said."""
        check_images(images)
        if raw:
            others = {"messages": not isinstance(prompt, str), "system": system is not None}
            wrong = next((name for name, given in others.items() if given), "")
            if wrong or not special_tokens:
                wrong = wrong or "special_tokens=False"
                raise PromptError(f"raw: the text is the whole prompt, {wrong} does not go with it")
            assert isinstance(prompt, str)
            check_text(prompt)
            self._check_length(len(prompt))
            return prompt, images, []
        if isinstance(prompt, str):
            prompt = [user_message(prompt, len(images), special_tokens)]
        if system is not None:
            prompt = with_system(system, prompt)
        said = read_messages(prompt, images, special_tokens)
        self._check_length(said.characters)
        conversation = self.spec.conversation
        messages = protect(said.messages, self.tokenizer, special_tokens, conversation.image_mark)
        text = render(conversation, messages)
        _check_system(messages, text)
        return text, said.images, said.messages

    def _check_length(self, characters: int) -> None:
        """Refuse text that cannot fit into the context, before anything is done with it."""
        context = self.spec.decoder.context_length
        if characters <= context * SHORT_TOKEN:
            return
        if self._longest_token is None:
            self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        most = context * self._longest_token
        if characters > most:
            raise PromptError(
                f"the prompt has {characters} characters, the context of {context} tokens holds "
                f"{most} at the very most: shorten it"
            )

    def _tokenized(self, text: str, images: int) -> list[Token]:
        conversation, vocab_size = self.spec.conversation, self.spec.decoder.vocab_size
        return read_text(self.tokenizer, conversation, text, images, vocab_size)

    def _with_instruction(self, image: Prepared, text: str) -> Prepared:
        return with_instruction(image, self._instruction_tokenizer, text, self.spec)


def _check_system(messages: Sequence[Message], text: str) -> None:
    """Refuse a system message that a template leaves out of the prompt's ``text``.

    Raises:
        PromptError: it does.
    """
    for message in messages:
        said = message["content"]
        if message["role"] == "system" and isinstance(said, str) and said.strip() not in text:
            raise PromptError(
                "this model's chat template has no place for a system message: say it in the "
                "question"
            )
