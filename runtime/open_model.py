"""A checked bundle as a model that answers: plan, engines, tokenizer and cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from mobilevlm.bundle import TOKENIZER, Bundle
from mobilevlm.bundle_identity import unchanged
from mobilevlm.conversation import system_ids
from mobilevlm.errors import PromptError
from mobilevlm.input_spec import InputSpec
from mobilevlm.plan import Plan
from mobilevlm.preparation import with_image_tokens, with_max_image_tokens, with_max_tiles
from mobilevlm.runtime.engines.opening import open_engines, stored_system_prompt
from mobilevlm.runtime.loaded_model import read_tokenizer
from mobilevlm.runtime.memory.estimate import estimate
from mobilevlm.runtime.memory.fitting import fit_plan
from mobilevlm.runtime.memory.limits import memory_limits, room_left
from mobilevlm.runtime.sequence.cache import DEFAULT_CACHE_MB, PromptCache
from mobilevlm.runtime.tuning.plan_file import PlanChoice, settle_plans
from mobilevlm.runtime.vlm import VLM
from mobilevlm.spec import with_image

if TYPE_CHECKING:
    from mobilevlm.runtime.sequence.token_folder import TokenFolder


def open_model(
    bundle: Bundle,
    engine: str = "auto",
    threads: int | None = None,
    cache_mb: float = DEFAULT_CACHE_MB,
    start: float | None = None,
    tokenizer: Tokenizer | None = None,
    max_resident_mb: float | None = None,
    plan: Plan | PlanChoice = "none",
    max_memory_mb: float | None = None,
    max_tiles: int | None = None,
    max_image_tokens: int | None = None,
    cache_dir: str | PathLike[str] | None = None,
    cache_dir_mb: float | None = None,
    image_tokens: int | None = None,
) -> VLM:
    """Opens a bundle that is already checked. ``start``: when loading began (``perf_counter``);
    ``tokenizer``: instead of the bundle's; ``plan``, ``image_tokens`` and what begins with
    ``max_`` or ``cache_`` as in :func:`load`."""
    if max_tiles is not None:
        bundle = _with_image(bundle, with_max_tiles(bundle.manifest.spec.image, max_tiles))
    if max_image_tokens is not None:
        image = with_max_image_tokens(bundle.manifest.spec.image, max_image_tokens)
        bundle = _with_image(bundle, image)
    if image_tokens is not None:
        bundle = _with_image(bundle, with_image_tokens(bundle.manifest.spec.image, image_tokens))
    start = time.perf_counter() if start is None else start
    with unchanged(bundle.folder, bundle.identity):
        first, *others = settle_plans(bundle, engine, threads, plan, max_resident_mb)
        limits = memory_limits(asked_mb=max_memory_mb)
        settled = fit_plan(bundle, first, limits, others)
        vision, decoder = open_engines(bundle, settled)
        # After the engines: memory is scarcest while they pack weights.
        own = getattr(decoder, "tokenizer", None)  # of an engine that knows text best
        tokenizer = tokenizer or own or read_tokenizer(bundle, TOKENIZER)
        memory = estimate(bundle.manifest, settled)
        turns = memory.weights if settled.memory == "in turn" else 0.0  # of the other stage
        answer = memory.working + memory.states + turns

        def room() -> float:
            return room_left(limits).size - answer

        folder = None
        if cache_dir is not None and bundle.manifest.spec.encoded is not None:
            from mobilevlm.runtime.sequence.token_folder import open_token_folder

            folder = open_token_folder(cache_dir, cache_dir_mb, bundle, settled)
        cache = _open_cache(bundle, tokenizer, settled, cache_mb, room, folder)
        seconds = time.perf_counter() - start
        return VLM(
            bundle, tokenizer, vision, decoder, cache, settled, seconds, limits, image_tokens
        )


def _with_image(bundle: Bundle, image: InputSpec) -> Bundle:
    manifest = bundle.manifest
    spec = with_image(manifest.spec, preparation=image.preparation)
    return replace(bundle, manifest=replace(manifest, spec=spec))


def _open_cache(
    bundle: Bundle,
    tokenizer: Tokenizer,
    plan: Plan,
    megabytes: float,
    room: Callable[[], float],
    folder: TokenFolder | None,
) -> PromptCache:
    try:  # where they are stored too: the template is compiled before the first question
        spec = bundle.manifest.spec
        ids = system_ids(tokenizer, spec.conversation, spec.encoded is not None)
    except PromptError:  # questions will say so; raw prompts can do without a template
        ids = []
    system = bundle.manifest.system_prompt
    if plan.engine == "onnx" and system is not None:
        stored = stored_system_prompt(bundle)
        if not plan.computes_prompt_like(Plan(), len(system.ids)):
            stored = None  # what this plan computes has other bits
        return PromptCache(megabytes, system.ids, stored, room, folder)
    return PromptCache(megabytes, ids, room=room, folder=folder)
