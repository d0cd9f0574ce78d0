"""Prompts of one model: what a person says and shows, made ready to run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import Tokenizer

from mobilevlm.conversation import official_ids, read_text, render, user_message
from mobilevlm.errors import PromptError
from mobilevlm.image import ImageInput, RoomFor
from mobilevlm.input_spec import FixedImage, InputSpec
from mobilevlm.message_parts import VideoFile
from mobilevlm.messages import (
    Conversation,
    Message,
    check_images,
    read_messages,
    with_clips,
    with_system,
)
from mobilevlm.preparation import fewest_pieces, prepare, with_max_tiles
from mobilevlm.prompt import (
    Clip,
    Mark,
    Piece,
    Prepared,
    Sound,
    Token,
    count_positions,
    count_rows,
    expand,
)
from mobilevlm.runtime.sequence.session import Prompt, check_length
from mobilevlm.spec import IMAGE_PLACEHOLDER, ModelSpec
from mobilevlm.templates.plain_text import check_text, protect, protect_data

if TYPE_CHECKING:
    from mobilevlm.runtime.answer.video import Video

SHORT_TOKEN = 8
"""Characters. A prompt whose tokens are no longer is tokenized without a closer look."""

Images: TypeAlias = "Sequence[ImageInput | Clip | Sound]"
"""Inputs beside a prompt: images and clips, or sounds."""
_BLANK = Sound(b"")
"""Stands for a sound that is not looked at."""
Tools: TypeAlias = "Sequence[Mapping[str, Any]]"


class PromptReader:
    """Reads prompts for one model. ``instruction_tokenizer``: of the text that the image encoder
    reads, if it reads any; ``room_for``: memory that an image may take; ``prepare``: what prepares
    images in place of the spec; ``image_tokens``: visual tokens that an image is made at most."""

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        instruction_tokenizer: Tokenizer | None,
        room_for: RoomFor,
        prepare: Callable[[ImageInput, RoomFor], Prepared] | None = None,
        image_tokens: int | None = None,
    ) -> None:
        self._prepare, self._image_tokens = prepare, image_tokens
        self.spec, self.tokenizer = spec, tokenizer
        self._instruction_tokenizer, self._room_for = instruction_tokenizer, room_for
        self._longest_token: int | None = None
        """Characters; found when a prompt is long."""

    def image(
        self, source: ImageInput | Sound, images: int = 1, max_tiles: int | None = None
    ) -> Prepared:
        """Return an image of a prompt with so many as the model takes it, in no more than
        ``max_tiles``; or a sound.

        Raises:
            ImageError: as of :func:`mobilevlm.preparation.prepare`.
            MobileVLMError: the model does not split images.
        """
        if isinstance(source, Sound):
            return self.sound(source)
        spec = self.spec.image
        if max_tiles is not None:
            spec = with_max_tiles(spec, max_tiles)
        if self._prepare is not None:
            return self._prepare(source, self._room_for)
        image = prepare(source, spec, self._room_for, images)
        if self._image_tokens is None:
            return image
        from mobilevlm.reduction import with_fewer_rows  # for who asks for fewer

        return with_fewer_rows(image, self._image_tokens)

    def _fewest(self, spec: InputSpec) -> tuple[Piece, ...]:
        """Return the pieces of the image or sound that takes the fewest positions."""
        pieces, most = fewest_pieces(spec), self._image_tokens
        if most is None or count_rows(pieces) <= most:
            return pieces
        from mobilevlm.reduction import pooled_size, with_rows

        if not isinstance(spec.preparation, FixedImage):
            return with_rows(pieces, 1)
        grid = spec.connector.out_grid
        return with_rows(pieces, math.prod(pooled_size((grid, grid), most)))

    def sound(self, source: Sound, positions: int | None = None) -> Prepared:
        """Return a sound as the model takes it. ``positions``: room in the prompt; that of the
        whole context when not given.

        Raises:
            AudioError: it is missing or damaged, no sound, or too long for the context.
            MobileVLMError: the model takes no sound.
        """
        if self.spec.sound_as_image:
            return self._heard_as_image(source)
        from mobilevlm.audio import prepare_sound  # for models that hear

        room = self.spec.decoder.context_length if positions is None else positions
        return prepare_sound(source.source, self.spec.audio, room, self._room_for)

    def _heard_as_image(self, source: Sound) -> Prepared:
        """Return a sound as the image that the model's image encoder reads."""
        from mobilevlm.media.sound_image import read_sound_image  # for a model that hears so

        if isinstance(source.source, Prepared):
            return self.image(source.source)
        preparation = self.spec.image.preparation
        assert isinstance(preparation, FixedImage)
        return self.image(read_sound_image(source.source, preparation.size))

    def _shown(
        self, shown: Sequence[ImageInput | Sound], tokens: Sequence[Token]
    ) -> list[Prepared]:
        """Return the images or sounds of a prompt with these ids and marks. Each sound has the room
        that the ids and the sounds before it leave."""
        left = self.spec.decoder.context_length - len(tokens) + tokens.count(Mark())
        found: list[Prepared] = []
        for source in shown:
            if isinstance(source, Sound):
                found.append(self.sound(source, left))
                left -= count_positions(found[-1].pieces)
            else:
                found.append(self.image(source, len(shown)))
        return found

    def clip(self, source: Video | str | PathLike[str], frames: int | None = None) -> Clip:
        """Return a video as the model takes it. ``frames``: how many of them, in place of the
        model's own number.

        Raises:
            ImageError: it is missing or damaged, or too large.
            PromptError: its frames alone take more positions than the context has.
            MissingExtraError: PyAV is not installed.
        """
        from mobilevlm.media.clip import clip_of, prepare_clip
        from mobilevlm.runtime.answer import video as reading

        self._check_takes_images()
        video = source if isinstance(source, reading.Video) else reading.open_video(source)
        known = clip_of(self.spec.image)
        sampled = reading.sample_frames(video, known, frames)
        self.check_fits([Mark()] * len(reading.blank_clip(video, self.spec, frames).images))
        read = reading.decode_frames(video, sampled.places, self._room_for)
        if known is not None:
            return prepare_clip(read, sampled, self.spec.image, self._room_for)
        tiles = reading.frame_tiles(self.spec)
        return Clip(tuple(self.image(frame, max_tiles=tiles) for frame in read))

    def asked_image(self, source: ImageInput | Sound, question: str, images: int) -> Prepared:
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
        tools: Tools = (),
    ) -> tuple[Prompt, list[Message]]:
        """Return a prompt that is ready to run, and its messages. ``tools``: definitions of those
        that the model may call."""
        start = time.perf_counter()
        text, shown, said = self._read(prompt, images, raw, special_tokens, system, tools)
        tokens = self._tokenized(text, len(shown))
        self.check_fits(tokens)
        prepared = [self._with_instruction(item, text) for item in self._shown(shown, tokens)]
        pieces = expand(tokens, [image.pieces for image in prepared])
        heard = self.spec.decoder.sound_rank > 0 and len(prepared) > 0
        return Prompt(pieces, prepared, time.perf_counter() - start, heard), said

    def tokens(
        self,
        prompt: str | Sequence[Message],
        images: int | Images,
        raw: bool,
        special_tokens: bool = True,
        system: str | None = None,
        tools: Tools = (),
    ) -> list[Token]:
        """Return a prompt's ids, with a mark for each of these or so many images."""
        text, shown, _ = self._read(prompt, self._given(images), raw, special_tokens, system, tools)
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
        given = self._given(images)
        text, shown, _ = self._read(prompt, given, raw, special_tokens, system)
        tokens = self._tokenized(text, len(shown))
        image = self.spec.encoded
        if image is None:
            return [token for token in tokens if isinstance(token, int)]
        if self.spec.has_sound:
            if _BLANK in shown:
                raise PromptError(
                    "the ids of this model depend on the length of each sound: give the sounds, "
                    "not their number"
                )
            heard = [item.pieces for item in self._shown(shown, tokens)]
            return official_ids(tokens, image.layout, heard)
        if image.layout.row_id is None:
            return official_ids(tokens, image.layout)
        fixed = isinstance(image.preparation, FixedImage)
        if not fixed and any(isinstance(source, bytes) and not source for source in shown):
            raise PromptError(
                "the ids of this model depend on the size of each image: give the images, not "
                "their number"
            )
        if fixed:
            pieces = [self._fewest(image)] * len(shown)
        else:
            pieces = [item.pieces for item in self._shown(shown, tokens)]
        return official_ids(tokens, image.layout, pieces)

    def _given(self, images: int | Images) -> Images:
        """Return images, or what stands for so many images or sounds."""
        if not isinstance(images, int):
            return images
        return [_BLANK] * images if self.spec.has_sound else [b""] * images

    def check_fits(self, tokens: Sequence[Token]) -> None:
        """Raise PromptError if the context has no room for a prompt; the message says how many
        images it has room for. A sound takes one position at least."""
        count, encoded = tokens.count(Mark()), self.spec.encoded
        fewest = () if encoded is None else self._fewest(encoded)
        images = [fewest] * count if count else []
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
        tools: Tools = (),
    ) -> tuple[str, list[ImageInput | Sound], list[Message]]:
        """The prompt in its template, its images or sounds, and what was said."""
        check_images(images)
        marks_in_text = special_tokens and not self.spec.has_sound
        if images or (isinstance(prompt, str) and marks_in_text and IMAGE_PLACEHOLDER in prompt):
            self._check_takes(images or [b""])
        if raw:
            others = {
                "messages": not isinstance(prompt, str),
                "system": system is not None,
                "tools": bool(tools),
            }
            wrong = next((name for name, given in others.items() if given), "")
            if wrong or not special_tokens:
                wrong = wrong or "special_tokens=False"
                raise PromptError(f"raw: the text is the whole prompt, {wrong} does not go with it")
            assert isinstance(prompt, str)
            check_text(prompt)
            self._check_length(len(prompt))
            return prompt, _plain(images), []
        if isinstance(prompt, str):
            shows = self.spec.conversation.shows
            prompt = [user_message(prompt, len(images), marks_in_text, shows)]
        if system is not None:
            prompt = with_system(system, prompt)
        read = read_messages(prompt, images, marks_in_text)
        self._check_takes(read.images)
        said = self._with_clips(read, marks_in_text)
        self._check_length(said.characters + (len(str(tools)) if tools else 0))
        conversation = self.spec.conversation
        if any(message["role"] == "tool" or "tool_calls" in message for message in said.messages):
            from mobilevlm.tools import check_places, tool_places

            places = tool_places(conversation.chat_template, conversation.parts)
            check_places(places, said.messages)
        how = (self.tokenizer, special_tokens, conversation.image_mark)
        messages = protect(said.messages, *how)
        text = render(conversation, messages, protect_data(tools, *how) if tools else ())
        _check_system(messages, text)
        return text, said.images, said.messages

    def _with_clips(self, said: Conversation, marks_in_text: bool) -> Conversation:
        """Return a conversation with the frames of its videos in their places."""
        images = [
            self.clip(source.path) if isinstance(source, VideoFile) else source
            for source in said.images
        ]
        return with_clips(Conversation(said.messages, images), marks_in_text)

    def _check_takes_images(self) -> None:
        """Raise PromptError if the model takes no images."""
        self._check_takes([b""])

    def _check_takes(self, shown: Sequence[object]) -> None:
        """Raise PromptError if the model does not take what goes with a prompt."""
        for source in shown:
            kind = "audio" if isinstance(source, Sound) else "image"
            if kind not in self.spec.shown:
                what = "no sound: leave it out" if kind == "audio" else "no images: leave them out"
                raise PromptError(f"{self.spec.name}: this model takes {what}")

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
        if self._instruction_tokenizer is None:
            return image
        from mobilevlm.instruction import with_instruction  # for who reads it

        return with_instruction(image, self._instruction_tokenizer, text, self.spec)


def _plain(images: Images) -> list[ImageInput | Sound]:
    """Return the images or sounds of a prompt whose text is complete, those of clips among them.

    Raises:
        PromptError: a clip has texts, which such a prompt has itself.
    """
    found: list[ImageInput | Sound] = []
    for image in images:
        parts = image.parts if isinstance(image, Clip) else (image,)
        if any(isinstance(part, str) for part in parts) and isinstance(image, Clip):
            raise PromptError(
                "raw: this model reads the times of a video's frames in the prompt, which raw text "
                "has itself: write them there, and give the images of the clip (Clip.images)"
            )
        found.extend(parts)
    return found


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
