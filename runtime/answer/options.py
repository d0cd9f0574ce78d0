"""Keyword arguments of ``VLM.stream``, ``VLM.generate`` and ``Chat.ask``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict, TypeVar

from mobilevlm.errors import MobileVLMError
from mobilevlm.prompt import Sound, SoundInput
from mobilevlm.runtime.answer.sampling import SamplingOptions
from mobilevlm.runtime.answer.text import StopRules
from mobilevlm.runtime.sequence.session import Session
from mobilevlm.runtime.settings import check_logprobs, stop_strings
from mobilevlm.spec import ConversationSpec

DEFAULT_MAX_NEW_TOKENS = 256
F = TypeVar("F", bound=Callable[..., Any])


class SamplingKeywords(TypedDict, total=False):
    """Fields of :class:`SamplingOptions`, with its defaults: greedy."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class TurnOptions(SamplingKeywords, total=False):
    """How to answer in a chat. All may be left out."""

    max_new_tokens: int
    """By default :data:`DEFAULT_MAX_NEW_TOKENS`."""
    stop: str | Sequence[str]
    """Further strings that end the answer"""
    ignore_eos: bool
    """Go on where the model would end (for measuring)"""
    raw: bool
    """The text is the whole prompt, no template around it"""
    special_tokens: bool
    """Special tokens (``</s>``) and ``<image>`` in the text count as such, as in the
    official code; by default they do. Else they are ordinary text."""
    json_schema: Mapping[str, Any] | str | None
    """The answer is JSON that fulfils this schema (extra ``[structured]``)"""
    grammar: str | None
    """The answer follows these rules, in the notation of Lark or of llama.cpp (GBNF)"""
    logprobs: bool
    """Give the log probability of each token"""
    top_logprobs: int
    """Likeliest tokens whose log probabilities go with each"""
    draft_tokens: int | None
    """Tokens to guess and check at a time (runtime/sequence/drafting.py; the answer is the same), 0
    for none; by default where the engine can"""


class AnswerOptions(TurnOptions, total=False):
    """How to answer. All may be left out."""

    audio: Sequence[SoundInput | Sound]
    """Sounds, for models that take some: before the text, or with messages those of parts that
    bring none"""
    system: str | None
    """The system message, before the prompt's messages; by default the model's own, if any"""
    tools: Sequence[Mapping[str, Any]]
    """Functions that the model may call, in OpenAI's form; its calls are
    :attr:`Generation.tool_calls`"""
    tool_choice: str | Mapping[str, Any]
    """``auto``, ``none`` (they are left out of the prompt), or ``required`` or ``{"type":
    "function", "function": {"name": …}}``: the answer is calls (extra ``[structured]``)"""
    parallel_tool_calls: bool
    """Several calls in an answer; else one at most"""
    session: Session | None
    """One of :meth:`VLM.new_session`, for one stream and one thread at a time. It keeps what was
    computed, not what was said: messages that leave out earlier turns are refused."""


DEFAULTS: Mapping[str, object] = {
    **{field.name: field.default for field in fields(SamplingOptions)},
    "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
    "stop": (),
    "ignore_eos": False,
    "raw": False,
    "special_tokens": True,
    "logprobs": False,
    "top_logprobs": 0,
    "audio": (),
    "tools": (),
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
"""Defaults of options; the others have none."""


def shows_options(kind: type) -> Callable[[F], F]:
    """Let ``help``, completion and ``inspect`` show the options of a ``TypedDict`` as keywords of a
    function that takes them as ``**options``."""

    def decorated(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=DEFAULTS.get(name),
                annotation=getattr(annotation, "__forward_arg__", annotation),
            )
            for name, annotation in kind.__annotations__.items()
        ]
        shown = signature.replace(parameters=[*own, *options])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorated


def check_options(options: Mapping[str, object]) -> None:
    """Refuse keywords that are no options.

    Raises:
        TypeError: names the first of them.
    """
    known = sorted(AnswerOptions.__optional_keys__)
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}: expected {', '.join(known)}")


def sampling_options(options: AnswerOptions) -> SamplingOptions:
    """Return how tokens are chosen.

    Raises:
        MobileVLMError: a value outside its range.
    """
    chosen: SamplingKeywords = {}
    for name in SamplingKeywords.__optional_keys__ & options.keys():
        chosen[name] = options[name]  # type: ignore[literal-required]
    return SamplingOptions(**chosen)


def top_logprobs(options: AnswerOptions) -> int | None:
    """Return how many likeliest tokens go with each token; none without log probabilities.

    Raises:
        MobileVLMError: a value of the wrong type or range.
    """
    return check_logprobs(options.get("logprobs", False), options.get("top_logprobs", 0))


def is_structured(options: AnswerOptions) -> bool:
    """Return whether the answer follows a schema or grammar.

    Raises:
        MobileVLMError: both are given.
    """
    both = [options.get("json_schema") is not None, options.get("grammar") is not None]
    if all(both):
        raise MobileVLMError("json_schema and grammar do not go together: give one")
    return any(both)


def stop_rules(
    options: AnswerOptions,
    conversation: ConversationSpec,
    *,
    forced: bool = False,
    further: Sequence[str] = (),
) -> StopRules:
    """Return when the answer ends. ``forced``: it is calls of tools by a grammar; ``further``:
    strings that end it too.

    Raises:
        MobileVLMError: a value of the wrong type or range.
    """
    ends, texts = conversation.eos_token_ids, conversation.stop_strings
    if is_structured(options) or forced:
        if options.get("ignore_eos", False):
            raise MobileVLMError("ignore_eos does not go with a schema or grammar: leave one out")
        texts = ()  # its end is the grammar's; inside, these are words
    if options.get("ignore_eos", False):
        ends, texts = (), ()
    texts = (*texts, *further)
    most = options.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    return StopRules(most, frozenset(ends), (*texts, *stop_strings(options.get("stop", ()))))
