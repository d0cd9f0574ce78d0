"""A conversation: turns about the same images, on one sequence that only grows."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Unpack

from mobilevlm.conversation import user_message
from mobilevlm.image import ImageInput
from mobilevlm.messages import Message
from mobilevlm.prompt import Clip, Prepared, Sound
from mobilevlm.runtime.answer.generation import Generation, TextStream
from mobilevlm.runtime.answer.options import TurnOptions, shows_options

if TYPE_CHECKING:
    from mobilevlm.runtime.sequence.prompts import Images
    from mobilevlm.runtime.vlm import VLM


class Chat:
    """Messages of a conversation. Each turn computes only what is new; images are encoded once."""

    def __init__(self, vlm: VLM, images: Images = (), system: str | None = None) -> None:
        self._vlm = vlm
        self._session = vlm.new_session()
        self._system: str | None = None
        self.system = system
        self.begin(images)

    @property
    def system(self) -> str | None:
        """The system message; may be set, for the turns so far too; none: the model's own.

        Raises:
            PromptError: when it is set: it is no text, too long, or the model's chat template has
                no place for one; the message stays as it was.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None:
            self._vlm.check_fits("?", 0, system=text)
        self._system = text
        self._session.told = []

    def begin(self, images: Images) -> None:
        """Forget the turns; the next question is about these images.

        Raises:
            ImageError: an image cannot be opened; the conversation stays as it was.
        """
        self._prepare(images)
        self.messages: list[Message] = []
        self._shown = 0
        self._session.told = []

    def reset(self) -> None:
        """Forget the turns; the next question is about the same images.

        Raises:
            ImageError: one can no longer be opened; the conversation stays as it was.
        """
        self.begin(self._sources)

    def show(self, images: Images) -> None:
        """Show further images with the next question.

        Raises:
            ImageError: one cannot be opened; the conversation stays as it was.
        """
        self._prepare([*self._sources, *images])
        self._session.told = []  # how a model takes an image may depend on their number

    def _prepare(self, images: Images) -> None:
        prepared = [self._prepared(image, len(images)) for image in images]
        self._sources = [
            done if hasattr(image, "read") else image  # a stream is read once
            for image, done in zip(images, prepared, strict=True)
        ]
        self.images = prepared

    def _prepared(self, shown: ImageInput | Clip | Sound, count: int) -> Clip | Prepared | Sound:
        if isinstance(shown, Clip):
            return shown
        if isinstance(shown, Sound):
            return Sound(self._vlm.prepare_audio(shown))
        return self._vlm.prepare_image(shown, images=count)

    @property
    def room(self) -> int:
        """Tokens that the context has room for after the last turn."""
        return self._session.room

    @shows_options(TurnOptions)
    def ask(self, question: str, **options: Unpack[TurnOptions]) -> TextStream:
        """Answer a question; ``options`` as in :meth:`VLM.stream`. The turn is kept when the stream
        ends, or with what was said so far when it is closed."""
        marks_in_text = options.get("special_tokens", True)
        new = len(self.images) - self._shown
        shows = self._vlm.spec.conversation.shows
        message = user_message(question, new, marks_in_text and shows == "image", shows)
        stream = self._vlm.stream(
            [*self.messages, message],
            self.images,
            session=self._session,
            system=self._system,
            **options,
        )
        shown = len(self.images)
        return TextStream(self._remember(message, shown, stream), stream.progress)

    def _remember(
        self, message: Message, shown: int, stream: TextStream
    ) -> Generator[str, None, Generation]:
        said: list[str] = []
        begun = False
        try:
            for piece in stream:
                begun = True
                said.append(piece)
                yield piece
            begun = begun or stream.generation.finish_reason != "cancelled"
            return stream.generation
        finally:
            stream.close()
            if begun:
                answer: Message = {"role": "assistant", "content": "".join(said)}
                self.messages += [message, answer]
                self._shown = shown
