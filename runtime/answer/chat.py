"""A conversation: turns about the same pictures, on one sequence that only grows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Unpack

from mobilevlm.conversation import user_message
from mobilevlm.image import ImageInput
from mobilevlm.messages import Message
from mobilevlm.runtime.answer.generation import Generation, TextStream
from mobilevlm.runtime.answer.options import TurnOptions, shows_options
from mobilevlm.runtime.vlm import VLM


class Chat:
    """Keeps the messages. Each turn computes only what is new; pictures are encoded once."""

    def __init__(
        self, vlm: VLM, images: Sequence[ImageInput] = (), system: str | None = None
    ) -> None:
        self._vlm = vlm
        self._session = vlm.new_session()
        self._system = system
        self.begin(images)

    @property
    def system(self) -> str | None:
        """The system message; may be set, for the turns so far too."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._system = text
        self._session.told = []

    def begin(self, images: Sequence[ImageInput]) -> None:
        """Forgets the turns; the next question is about these pictures.

        Raises:
            ImageError: a picture cannot be opened; the conversation stays as it was.
        """
        self.images = [self._vlm.prepare_image(image, images=len(images)) for image in images]
        self.messages: list[Message] = []
        self._session.told = []

    @property
    def room(self) -> int:
        """Tokens that the context has room for after the last turn."""
        return self._session.room

    @shows_options(TurnOptions)
    def ask(self, question: str, **options: Unpack[TurnOptions]) -> TextStream:
        """Answers; ``options`` as in :meth:`VLM.stream`. The turn is kept when the stream ends, or
        with what was said so far when it is closed."""
        first = not self.messages
        marks_in_text = options.get("special_tokens", True)
        message = user_message(question, len(self.images) if first else 0, marks_in_text)
        stream = self._vlm.stream(
            [*self.messages, message],
            self.images,
            session=self._session,
            system=self._system,
            **options,
        )
        return TextStream(self._remember(message, stream), stream.progress)

    def _remember(self, message: Message, stream: TextStream) -> Generator[str, None, Generation]:
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
