"""A loaded bundle that answers questions about images."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from mobilevlm.errors import MobileVLMError, PromptError
from mobilevlm.image import ImageInput
from mobilevlm.messages import Message, check_continued
from mobilevlm.plan import DRAFTING_ENGINES
from mobilevlm.preparation import fewest_pieces
from mobilevlm.prompt import (
    Clip,
    Prepared,
    Rows,
    Sound,
    SoundInput,
    as_sound,
    count_positions,
    count_rows,
    expand,
    with_sounds,
)
from mobilevlm.runtime.answer.generation import (
    AnswerSettings,
    Generation,
    Progress,
    TextStream,
)
from mobilevlm.runtime.answer.options import (
    AnswerOptions,
    check_options,
    is_structured,
    sampling_options,
    shows_options,
    stop_rules,
    top_logprobs,
)
from mobilevlm.runtime.engines import Float32
from mobilevlm.runtime.loaded_model import LoadedModel
from mobilevlm.runtime.memory.fitting import check_drawing_fits
from mobilevlm.runtime.sequence.drafting import check_draft_tokens
from mobilevlm.runtime.sequence.encoding import encode_image
from mobilevlm.runtime.sequence.prompts import Images, PromptReader, Tools
from mobilevlm.runtime.sequence.session import (
    Prompt,
    PromptChoices,
    Session,
    check_session,
)
from mobilevlm.runtime.settings import check_max_tiles

if TYPE_CHECKING:
    from PIL.Image import Image

    from mobilevlm.runtime.answer.chat import Chat
    from mobilevlm.runtime.answer.drawing import Drawn, OnProgress
    from mobilevlm.runtime.answer.grammar import Guide
    from mobilevlm.runtime.answer.tool_calls import ToolUse
    from mobilevlm.runtime.answer.video import Video
    from mobilevlm.runtime.engines.onnx.drawing import OnnxDrawing


class VLM(LoadedModel):
    """A vision-language model, ready to run.

    Weights and caches are shared by all threads and each answer has a sequence of its own, so one
    object may be used from several threads. What a prompt has in common with earlier ones is not
    computed again; the answers are the same. ``close`` (or leaving a ``with`` block) frees the
    memory.
    """

    @shows_options(AnswerOptions)
    def stream(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        **options: Unpack[AnswerOptions],
    ) -> TextStream:
        """Answer piece by piece.

        ``prompt``: the user's text, or the messages of a chat. ``images`` go where ``<image>``
        stands, else before the text; with messages they are those of image parts that bring none,
        else they go before the text of the last one (mobilevlm/messages.py). What
        :meth:`prepare_video` returned may be among them. ``options``:
        :class:`AnswerOptions`.

        Raises:
            PromptError, ImageError, MobileVLMError: before the first piece, if the input is wrong;
                a prompt too long for the context with the first piece.
            SessionError: with the first piece, if another stream or thread has the session.
            TypeError: a keyword that is no option.
        """
        check_options(options)
        if "audio" in options:
            images = with_sounds(images, options["audio"])
        _, decoder = self._engines()
        session = options.get("session")
        if session is not None:
            check_session(session, decoder)
        sampling, use = sampling_options(options), self._tool_use(options)
        forced, further = (bool(use.forced), use.ends) if use is not None else (False, ())
        rules = stop_rules(options, self.spec.conversation, forced=forced, further=further)
        drafts = self._draft_tokens(options.get("draft_tokens"), sampling.temperature)
        guide = self._guide(options, use)
        settings = AnswerSettings(sampling, rules, drafts, top_logprobs(options), guide, use)
        raw, special = options.get("raw", False), options.get("special_tokens", True)
        tools = () if use is None else use.tools
        system = options.get("system")
        ready, said = self._prompts.prompt(prompt, images, raw, special, system, tools)
        progress = Progress()
        if session is None:
            return TextStream(self._answer(ready, settings, None, progress), progress)
        if isinstance(prompt, str):
            said = []
        else:
            check_continued(session.told, said)
        pieces = self._answer(ready, settings, session, progress)
        return TextStream(_noted(session, said, pieces), progress)

    @shows_options(AnswerOptions)
    def generate(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """The whole answer; as :meth:`stream`."""
        return self.stream(prompt, images, **options).finish()

    @shows_options(AnswerOptions)
    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[Images] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[Generation]:
        """Whole answers to many prompts, one after another, in their order. ``images``: those of
        each prompt. What prompts have in common (an image, a beginning) is computed once while it
        is in the cache.

        Raises:
            PromptError: no list of prompts, or not as many lists of images.
            MobileVLMError: as of :meth:`stream`, when a prompt's turn comes; it names the prompt.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError("prompts: expected a list of prompts: use generate() for one")
        if images is not None and len(images) != len(prompts):
            raise PromptError(
                f"prompts: {len(prompts)}, but images= has lists for {len(images)}: give one list "
                f"for each, empty for none"
            )
        check_options(options)
        shown: Sequence[Images] = [()] * len(prompts) if images is None else images
        return self._batch(prompts, shown, options)

    def _batch(
        self,
        prompts: Sequence[str | Sequence[Message]],
        images: Sequence[Images],
        options: AnswerOptions,
    ) -> Iterator[Generation]:
        for number, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
            try:
                answer = self.generate(prompt, shown, **options)
            except MobileVLMError as error:
                error.args = (f"prompts[{number}]: {error}",)
                raise
            yield answer

    def chat(self, images: Images = (), system: str | None = None) -> Chat:
        """Return a conversation about these images, which keeps its turns. ``system``: its system
        message.

        Raises:
            ImageError: an image cannot be opened.
        """
        from mobilevlm.runtime.answer.chat import Chat

        return Chat(self, images, system)

    def draw(
        self,
        prompt: str,
        n: int = 1,
        guidance: float | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        on_progress: OnProgress | None = None,
    ) -> list[Image]:
        """Draw ``n`` images of what a text says, as Pillow images of the model's own size.

        ``guidance``: how closely they follow the text, the checkpoint's own scale when not given;
        1: without guidance, in half the time. ``seed``: the same one gives the same images, and the
        image after it has the next number; ``temperature``: 0 takes the most likely code each time.
        ``on_progress`` is called after each code with the number of those that are there, and of
        all; what it raises ends the drawing.

        Raises:
            MobileVLMError: this model cannot draw, or a value is outside its range.
            PromptError: the prompt is empty, or leaves no room for an image in the context.
            BundleError: the engine does not draw, or the bundle has not the artifacts.
            MemoryLimitError: drawing needs more memory than a limit.
        """
        found = self.drawn(prompt, n, guidance, seed, temperature, on_progress)
        return [drawn.image for drawn in found]

    def drawn(
        self,
        prompt: str,
        n: int = 1,
        guidance: float | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Drawn]:
        """Return images one by one as they are drawn, each with its codes; as :meth:`draw`, whose
        errors it raises before the first."""
        from mobilevlm.runtime.answer.drawing import finished

        steps = self.draw_steps(prompt, n, guidance, seed, temperature)
        return finished(steps, n * self.spec.drawing.num_tokens, on_progress)

    def draw_steps(
        self,
        prompt: str,
        n: int = 1,
        guidance: float | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> Generator[Drawn | None, None, None]:
        """Return the same for who does other work between codes: None after each of them, and each
        image when it is drawn."""
        from mobilevlm.runtime.answer.drawing import DrawOptions, check_room, draw_steps
        from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder

        _, decoder = self._engines()
        output = self.spec.drawing
        scale = output.guidance if guidance is None else guidance
        options = DrawOptions(n, scale, temperature, seed)
        ids = self.drawing_ids(prompt)
        check_room(len(ids), output, self.spec.decoder.context_length)
        if self.engine == "onnx":  # no other draws
            sequences = 1 if scale == 1 else 2
            check_drawing_fits(self.bundle, self.plan, self._limits, len(ids), sequences)
        stages = self._drawing_stages()
        assert isinstance(decoder, OnnxDecoder)
        return draw_steps(decoder, stages, output, ids, options)

    def drawing_ids(self, prompt: str) -> list[int]:
        """Return the input ids that an image is drawn from, as the official code has them. Special
        tokens in the text are words."""
        output, spec = self.spec.drawing, self.spec
        spoken = replace(spec.conversation, chat_template=output.chat_template)
        reader = PromptReader(
            replace(spec, conversation=spoken), self.tokenizer, None, self._room_for
        )
        tokens = reader.tokens(prompt, 0, raw=False, special_tokens=False)
        return [*(token for token in tokens if isinstance(token, int)), *output.begin_ids]

    def code_logits(self, prompt: str, codes: Sequence[int]) -> Float32:
        """Return the logits ``(len(codes) + 1, num_codes)`` that the codes of an image, and the
        next, are taken from, without guidance; for verification."""
        from mobilevlm.runtime.answer.drawing import code_logits
        from mobilevlm.runtime.engines.onnx.engine import OnnxDecoder

        _, decoder = self._engines()
        stages = self._drawing_stages()
        assert isinstance(decoder, OnnxDecoder)
        return code_logits(decoder, stages, self.drawing_ids(prompt), codes)

    def code_rows(self, codes: Sequence[int]) -> Float32:
        """Return what the decoder reads of codes ``(length, hidden_size)``; for verification."""
        return self._drawing_stages().embed(codes)

    def decode_codes(self, codes: Sequence[int]) -> Float32:
        """Return the pixels of all codes of an image ``(edge, edge, 3)``, about -1 to 1, before
        they are clipped."""
        return self._drawing_stages().decode(codes)

    def _drawing_stages(self) -> OnnxDrawing:
        with self._lock:
            if self._drawing is None:
                from mobilevlm.runtime.engines.opening import open_drawing

                self._drawing = open_drawing(self.bundle, self.plan)
            return self._drawing

    def _draft_tokens(self, asked: int | None, temperature: float) -> int:
        if asked is None and temperature == 0:
            asked = self.plan.draft_tokens
        if asked is None and self.engine not in DRAFTING_ENGINES:
            asked = 0
        return check_draft_tokens(asked, temperature)

    def _tool_use(self, options: AnswerOptions) -> ToolUse | None:
        """Return the tools that an answer may call."""
        if not any(name in options for name in ("tools", "tool_choice")):
            return None
        from mobilevlm.runtime.answer.tool_calls import read_tool_use

        return read_tool_use(options, self.spec.conversation, self.tokenizer)

    def _guide(self, options: AnswerOptions, use: ToolUse | None) -> Guide | None:
        """Return the grammar that an answer is asked to follow, if any."""
        forced = use is not None and bool(use.forced)
        if not (is_structured(options) or forced):
            return None
        with self._lock:
            if self._guides is None:
                from mobilevlm.runtime.answer.grammar import GuideMaker

                end, size = self.spec.conversation.eos_token_ids, self.spec.decoder.vocab_size
                self._guides = GuideMaker(self.tokenizer, end, size)
        if use is not None:
            return self._guides.calls(use.grammar())
        schema = options.get("json_schema")
        if schema is not None:
            return self._guides.schema(schema)
        return self._guides.grammar(options.get("grammar"))

    def prepare_image(
        self, image: ImageInput, max_tiles: int | None = None, images: int = 1
    ) -> Prepared:
        """Return an image as this model takes it, which may be given in its place: an image that is
        used again, or the frames of a video, need not stay in memory. ``max_tiles``: less than what
        the model was loaded with, for this image; ``images``: of the prompt, on whose number it
        depends how some models take each.

        Raises:
            ImageError: as of :func:`mobilevlm.preparation.prepare`.
            MobileVLMError: ``max_tiles`` is no number of tiles, or the model does not split images.
        """
        check_max_tiles(max_tiles)
        return self._prompts.image(image, images, max_tiles)

    def prepare_video(
        self, video: Video | str | os.PathLike[str], frames: int | None = None
    ) -> Clip:
        """Return a video as this model takes it, to be given in the place of an image: a clip with
        the times of its frames where the model was trained on such, else frames as images of one
        tile. ``frames``: how many, in place of the model's own number.

        Raises:
            ImageError: the file is missing or damaged, or its frames are too large.
            PromptError: its frames alone take more positions than the context has.
            MissingExtraError: PyAV is not installed ([video] extra).
        """
        return self._prompts.clip(video, frames)

    def prepare_audio(self, sound: SoundInput | Sound) -> Prepared:
        """Return a sound as this model takes it, which may be given in its place.

        Raises:
            AudioError, MissingExtraError: as of :func:`mobilevlm.audio.prepare_sound`.
            MobileVLMError: the model takes no sound.
        """
        return self._prompts.sound(as_sound(sound))

    def encode_audio(self, sound: SoundInput | Sound) -> Float32:
        """Rows ``(rows, hidden_size)`` of a sound: what the decoder reads."""
        return self.encode_image(as_sound(sound))

    def audio_features(self, sound: SoundInput | Sound) -> Float32:
        """The encoder's features of each run ``(num_features, encoder hidden_size)``, one behind
        the other; for verification."""
        return self.image_features(as_sound(sound))

    def encode_image(self, image: ImageInput | Sound, prompt: str = "", images: int = 1) -> Float32:
        """Visual tokens ``(rows, hidden_size)``: what the decoder reads. ``prompt``: what is asked
        about the image, where a Q-Former reads it (InstructBLIP); ``images`` as of
        :meth:`prepare_image`."""
        vision, _ = self._engines()
        prepared = self._prompts.asked_image(image, prompt, images)
        return encode_image(vision, prepared, self.plan.parallel_tiles).embeds

    def image_features(self, image: ImageInput | Sound, images: int = 1) -> Float32:
        """The tower's features of each run ``(num_features, vision hidden_size)``, one behind the
        other; for verification."""
        vision, _ = self._engines()
        arrays = self._prompts.asked_image(image, "", images).arrays
        return np.concatenate([vision.features(given) for given in arrays])

    def prompt_ids(
        self,
        prompt: str | Sequence[Message],
        images: int | Images = 0,
        raw: bool = False,
        special_tokens: bool = True,
        system: str | None = None,
    ) -> list[int]:
        """Input ids as the official code has them: where an image goes its mark (-200 in LLaVA's
        lineage), or an id for each of its visual tokens. ``images``: how many, or the images
        themselves where the number of visual tokens depends on them. ``special_tokens`` and
        ``system`` as in :meth:`stream`."""
        return self._prompts.official_ids(prompt, images, raw, special_tokens, system)

    def count_text_tokens(
        self, prompt: str | Sequence[Message], images: int = 0, raw: bool = False
    ) -> int:
        """Positions that a prompt takes beside the rows of its images or sounds."""
        tokens = self._prompts.tokens(prompt, images, raw)
        encoded = self.spec.encoded
        fewest = () if encoded is None else fewest_pieces(encoded)
        pieces = expand(tokens, [fewest] * images)
        return count_positions(pieces) - count_rows(pieces)

    def _prepare(self, prompt: str | Sequence[Message], images: Images, raw: bool) -> Prompt:
        return self._prompts.prompt(prompt, images, raw, special_tokens=True)[0]

    def prompt_logits(
        self,
        prompt: str | Sequence[Message],
        images: Images = (),
        raw: bool = False,
        answer_tokens: int = 0,
        count: int | None = None,
    ) -> Float32:
        """Return the logits after the last ``count`` positions, images expanded ``(count,
        vocab_size)`` (none: after all); for verification. ``answer_tokens``: so many at the end are
        computed as those of an answer."""
        prepared = self._prepare(prompt, images, raw)
        return self._session("nothing").prompt_logits(prepared, answer_tokens, count)

    def embeds_logits(
        self, embeds: Float32 | Rows, as_prompt: bool = False, count: int | None = None
    ) -> Float32:
        """Return the logits after the last ``count`` positions of ``(length, hidden_size)`` (none:
        after all); for verification of the decoder alone. ``as_prompt``: by the prefill graph, if
        there is one."""
        _, decoder = self._engines()
        rows = embeds if isinstance(embeds, Rows) else Rows(embeds)
        run = decoder.prefill if as_prompt else decoder.answer
        return run(decoder.new_state(), rows, count)

    def expert_choices(
        self, prompt: str | Sequence[Message], images: Images = (), raw: bool = False
    ) -> PromptChoices:
        """Return the experts that each position is sent to, by layer; for verification.

        Raises:
            MobileVLMError: the decoder has no experts, or does not say.
        """
        return self._session("nothing").expert_choices(self._prepare(prompt, images, raw))

    def answer_logits(self, embeds: Float32, answer: Sequence[int]) -> Float32:
        """Logits ``(len(answer) + 1, vocab_size)`` that the tokens of an answer, and the next, are
        taken from, given a prompt's embeddings; for verification of the decoder alone."""
        return self._session("nothing").answer_logits(embeds, answer)

    def check_fits(
        self,
        prompt: str | Sequence[Message],
        images: int | Images,
        raw: bool = False,
        special_tokens: bool = True,
        system: str | None = None,
        tools: Tools = (),
    ) -> None:
        """Raise if a prompt with these or so many images has no room, before any is looked at.

        Raises:
            PromptError: it does not fit; the message says how many images would.
        """
        tokens = self._prompts.tokens(prompt, images, raw, special_tokens, system, tools)
        self._prompts.check_fits(tokens)


def _noted(
    session: Session, said: list[Message], pieces: Generator[str, None, Generation]
) -> Generator[str, None, Generation]:
    """Yield the pieces; from the first on the session knows what was said."""
    try:
        piece = next(pieces)
        session.told = said
        yield piece
        return (yield from pieces)
    except StopIteration as stop:
        session.told = said
        generation: Generation = stop.value
        return generation
    finally:
        pieces.close()
