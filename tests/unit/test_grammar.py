"""Answers that follow a JSON schema or a grammar, on every kind of vocabulary."""

from __future__ import annotations

import difflib
import json
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import fixture_named, token_id

import mobilevlm
from mobilevlm.errors import FileWarning, GrammarError, MissingExtraError, MobileVLMError
from mobilevlm.runtime import VLM
from mobilevlm.runtime.answer.keywords import about_unknown, unknown_keywords
from mobilevlm.runtime.answer.sampling import Sampler, SamplingOptions
from mobilevlm.runtime.answer.text import Detokenizer

pytest.importorskip("llguidance", reason="pip install '.[structured]'")
from mobilevlm.runtime.answer import grammar as grammar_module
from mobilevlm.runtime.answer.grammar import Guide, GuideMaker

IMAGE = fixture_named("llava_v1").image
VOCABULARIES = (
    *("mobilevlm_v2", "moe_llava_qwen", "moe_llava_phi2", "moe_llava_stablelm"),
    *("smolvlm2", "internvl3", "llava_hf", "vila"),
)
"""Sentencepiece (BPE with byte fallback), byte-level BPE of four families, and Llama's."""
SCHEMAS = 200
PATTERNS = (r"^[A-Z]{2}[0-9]{1,3}$", r"^(red|green|blue)$", r"^\d{4}-\d{2}$", "^[a-f]+$")
NAMES = ("name", "a b", 'q"uote', "caf\u00e9", "x\\y", "\U0001f642", "n1")


def drawn_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema as people write them: nested, with bounds that an answer must keep."""
    simple = ("integer", "number", "string", "pattern", "enum", "boolean", "null", "const")
    kind = source.choice(simple if depth > 2 else (*simple, "object", "object", "array", "anyOf"))
    if depth == 0:
        kind = source.choice(("object", "object", "array", kind))
    low = source.randint(-50, 50)
    high = low + source.randint(0, 90)
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": high}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": low - 0.5, "maximum": high + 0.25}
    if kind == "string":
        return {"type": "string", "minLength": source.randint(0, 2), "maxLength": 6}
    if kind == "pattern":
        return {"type": "string", "pattern": source.choice(PATTERNS), "maxLength": 8}
    if kind == "enum":
        return {"enum": source.sample(["red", 'a "b"', "\u00e9\n", 3, -1.5, None, True, "\t"], 3)}
    if kind == "const":
        return {"const": source.choice(["fixed", 7, None, False])}
    if kind == "array":
        least = source.randint(0, 2)
        items = drawn_schema(source, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}
    if kind == "anyOf":
        return {"anyOf": [drawn_schema(source, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = source.sample(NAMES, source.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: drawn_schema(source, depth + 1) for name in names},
            "required": names[: source.randint(0, len(names))],
            "additionalProperties": False,
        }
    return {"type": kind}


def fulfils(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value is one of :func:`drawn_schema`'s."""
    if "anyOf" in schema:
        return any(fulfils(value, one) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return any(value == one and type(value) is type(one)
                   for one in schema.get("enum", [schema.get("const")]))  # fmt: skip
    kind = schema["type"]
    if kind == "object":
        return isinstance(value, dict) and (
            set(schema["required"]) <= value.keys() <= schema["properties"].keys()
            and all(fulfils(value[name], schema["properties"][name]) for name in value)
        )
    if kind == "array":
        return isinstance(value, list) and (
            schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fulfils(one, schema["items"]) for one in value)
        )
    if kind == "string":
        return isinstance(value, str) and (
            schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "number":
        return type(value) in (int, float) and (
            schema["exclusiveMinimum"] < value <= schema["maximum"]
        )
    return type(value) is {"boolean": bool, "null": type(None)}[kind]


def test_the_check_of_answers_refuses_what_is_outside_a_schema() -> None:
    items = {"type": "integer", "minimum": 1, "maximum": 3}
    schema: dict[str, Any] = {"type": "array", "items": items}
    schema |= {"minItems": 1, "maxItems": 2}
    assert fulfils([1, 3], schema)
    assert not any(fulfils(value, schema) for value in ([], [4], [1, 1, 1], [True], ["1"], 1))


def answer_of(guide: Guide, maker: Any, seed: int, temperature: float, most: int = 600) -> str:
    """Text of an answer to logits at random, of a model that has no idea."""
    tokenizer, size = maker
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=seed), guide)
    noise, detokenizer = np.random.default_rng(seed), Detokenizer(tokenizer, keeps_space=True)
    text, tokens = "", list[int]()
    logits = noise.standard_normal(size, np.float32)
    while not guide.complete and len(tokens) < most:
        token = sampler(np.roll(logits, 7919 * len(tokens)), tokens)
        if token in guide._end:
            break
        tokens.append(token)
        text += detokenizer.add(token)
    assert len(tokens) < most
    return text + detokenizer.finish()


def maker_of(name: str) -> tuple[GuideMaker, tuple[Any, int]]:
    model = fixture_named(name).model
    size = model.spec.decoder.vocab_size
    maker = GuideMaker(model.tokenizer, model.spec.conversation.eos_token_ids, size)
    return maker, (model.tokenizer, size)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_answer_fulfils_its_schema(name: str) -> None:
    maker, vocabulary = maker_of(name)
    source = random.Random(VOCABULARIES.index(name))
    for number in range(SCHEMAS // len(VOCABULARIES)):
        schema = drawn_schema(source)
        guide = maker.schema(schema)
        text = answer_of(guide, vocabulary, number, temperature=number % 2)
        assert fulfils(json.loads(text), schema), (schema, text)


def test_both_ways_to_write_a_byte_are_allowed() -> None:
    maker, (tokenizer, _) = maker_of("mobilevlm_v2")
    guide = maker.grammar("start: /[0-9]+/")
    allowed = set(guide.allowed() or ())
    assert {token_id(tokenizer, "7"), token_id(tokenizer, "<0x37>")} <= allowed
    assert token_id(tokenizer, "\u2581a") not in allowed
    assert token_id(tokenizer, "</s>") not in allowed


def test_a_space_that_the_grammar_asks_for_is_in_the_answer(vlm: VLM) -> None:
    assert vlm.generate("Who?", grammar='start: " yes"').text == " yes"


def test_an_answer_of_the_model_follows_its_schema_and_ends(vlm: VLM) -> None:
    colours = {"enum": ["red", "green"]}
    schema = {
        "type": "object",
        "properties": {"colours": {"type": "array", "items": colours, "maxItems": 2}},
        "required": ["colours"],
        "additionalProperties": False,
    }
    greedy = vlm.generate("Which?", [IMAGE], json_schema=schema, logprobs=True)
    drawn = vlm.generate("Which?", [IMAGE], json_schema=json.dumps(schema), temperature=1.5, seed=2)
    for answer in (greedy, drawn):
        assert set(json.loads(answer.text)) == {"colours"}
        assert answer.finish_reason == "stop"
    assert greedy.logprobs is not None and len(greedy.logprobs) == len(greedy.token_ids)
    assert vlm.generate("Which?", [IMAGE], max_new_tokens=3).text != greedy.text[:3]


def test_drafts_do_not_change_a_structured_answer(vlm: VLM) -> None:
    grammar = 'start: ("ab " | "ba ")~12'
    alone = vlm.generate("ab ab ab ab", grammar=grammar)
    drafted = vlm.generate("ab ab ab ab", grammar=grammar, draft_tokens=3)
    assert drafted.token_ids == alone.token_ids and len(alone.text) == 36


def test_forced_text_is_taken_without_asking_for_each_token() -> None:
    maker, (tokenizer, size) = maker_of("smolvlm2")
    schema = {"type": "object", "properties": {"a long name": {"enum": [1, 2]}},
              "required": ["a long name"], "additionalProperties": False}  # fmt: skip
    guide = maker.schema(schema)
    asked: list[Any] = []
    allowed = guide.allowed
    guide.allowed = lambda: asked.append(None) or allowed()  # type: ignore[method-assign,func-returns-value]
    text = answer_of(guide, (tokenizer, size), 3, temperature=0)
    assert fulfils(json.loads(text), schema)
    assert text.startswith('{"a long name": ') and len(asked) == 3


def test_forced_text_is_tokenized_once() -> None:
    maker, vocabulary = maker_of("mobilevlm_v2")
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 2}
    texts = [answer_of(maker.schema(schema), vocabulary, 3, temperature=0) for _ in range(3)]
    known = maker._words._known.cache_info()
    assert len(set(texts)) == 1 and known.hits >= 2 * known.misses > 0


def test_few_allowed_tokens_are_those_of_the_mask() -> None:
    maker, (_, size) = maker_of("smolvlm2")
    for text in ('start: "a" | "b"', "start: /[0-9]/", 'start: "\\n"', "start: /(?s:.)*/"):
        guide = maker.grammar(text)
        few = guide.allowed()
        masked = np.flatnonzero(guide.masked(np.zeros(size, np.float32)) == 0).tolist()
        assert few == masked if few is not None else len(masked) > grammar_module.FEW


def test_an_answer_that_is_cut_says_so(vlm: VLM) -> None:
    schema = {"type": "string", "minLength": 300}
    answer = vlm.generate("Who?", json_schema=schema, max_new_tokens=5)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5


def test_stop_strings_of_the_conversation_are_words_inside_an_answer(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vlm.spec.conversation.__dict__, "stop_strings", ("###",))
    assert vlm.generate("Who?", json_schema={"const": "a ### b"}).text == '"a ### b"'


def test_a_grammar_may_be_in_the_notation_of_llama_cpp(vlm: VLM) -> None:
    answer = vlm.generate("Who?", grammar='root ::= "yes" | "no"')
    assert answer.text in ("yes", "no")


def test_any_json_object_may_be_asked_for() -> None:
    maker, vocabulary = maker_of("smolvlm2")
    guide = maker.schema({"type": "object", "maxProperties": 0})
    assert json.loads(answer_of(guide, vocabulary, 0, 0)) == {}


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": {"type": "integer", "minimum": 9, "maximum": 3}}, "minimum .9. is greater"),
    ({"json_schema": {"type": "string", "pattern": "^a$", "minLength": 3}}, "Regex is empty"),
    ({"json_schema": {"enum": []}}, "anyOf is empty"),
    ({"json_schema": {"type": "strin"}}, "Invalid type: strin"),
    ({"json_schema": {"not": {}}}, "Unimplemented keys"),
    ({"json_schema": {"oneOf": [{}, {}]}}, "oneOf constraints are not supported.*: use anyOf"),
    ({"json_schema": {"$ref": "#/none"}}, "'/none' does not exist"),
    ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, "look-around"),
    ({"json_schema": False}, "nothing fulfils it"),
    ({"json_schema": "{"}, "is no JSON"),
    ({"json_schema": "[" * 100_000}, "is no JSON"),
    ({"json_schema": " " * (1 << 21)}, "has 2097152 characters"),
    ({"json_schema": [1]}, "is list, expected an object"),
    ({"json_schema": {"const": {1, 2}}}, "is no JSON"),
    ({"grammar": ""}, "grammar is empty"),
    ({"grammar": "start: ("}, r"Expected token '\)'"),
    ({"grammar": "root ::= ("}, "grammar"),
    ({"grammar": 'start: "a" other'}, "other"),
    ({"grammar": b"start"}, "grammar is bytes"),
    ({"grammar": 'start: "a"', "json_schema": {}}, "do not go together"),
    ({"json_schema": {}, "ignore_eos": True}, "ignore_eos does not go with"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_what_cannot_be_followed_is_refused_before_generation(
    options: dict[str, Any], message: str, vlm: VLM
) -> None:
    with pytest.raises(MobileVLMError, match=message) as caught:
        vlm.stream("Who?", **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_key_that_json_schema_does_not_have_is_named() -> None:
    maker, _ = maker_of("smolvlm2")
    schema: dict[str, Any] = {"type": "object", "properties": {"minimun": {"type": "integer"}}}
    schema |= {"x-order": 1, "title": "a", "enum": [{"other": 1}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker.schema(schema)
    schema["properties"]["minimun"]["minimun"] = 3
    told = r"'minimun' .is 'minimum' meant\?. is no keyword of JSON Schema and would not"
    with pytest.warns(FileWarning, match=told) as caught:
        maker.schema(schema)
        maker.schema(schema)
    assert len(caught) == 1


def test_few_unknown_keys_are_compared_with_keywords_and_no_text_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maker, _ = maker_of("smolvlm2")
    many = {f"minimu{number}": 1 for number in range(50_000)}
    compared: list[str] = []
    near = difflib.get_close_matches

    def counted(word: str, *others: Any, **options: Any) -> list[str]:
        compared.append(word)
        return near(word, *others, **options)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    assert unknown_keywords(many) == ["minimu0", "minimu1", "minimu2"]
    assert unknown_keywords({"a" * 500_000: 1, **many})[1:] == ["minimu0", "minimu1"]
    assert len(about_unknown(unknown_keywords({"a" * 500_000: 1, **many}))) < 300
    assert compared == ["minimu0", "minimu1"]
    with pytest.warns(FileWarning, match="'other' is no keyword"):
        maker.schema({"other": 1})
    kept = vars(grammar_module).get("__warningregistry__", {})
    assert not [key for key in kept if "other" in str(key)]


def test_unknown_keys_are_found_where_schemas_are() -> None:
    inner = {"allOf": [{"a": 1}], "dependencies": {"b": {"c": 1}, "d": ["e"]}, 7: 1}
    assert unknown_keywords({"x-note": {"f": 1}, "const": {"g": 1}, "items": inner}) == [
        "7", "a", "c",
    ]  # fmt: skip
    deep: Any = {"h": 1}
    for _ in range(50_000):
        deep = {"items": deep}
    assert unknown_keywords(deep) == ["h"]
    assert unknown_keywords(True) == unknown_keywords({"properties": {"i": {}}}) == []


def test_a_vocabulary_of_llama_cpp_is_as_good(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from pairs import write_vocabulary

    from mobilevlm.runtime.engines.llama.native import NativeModel
    from mobilevlm.runtime.engines.llama.tokenizer import LlamaTokenizer

    model = fixture_named("smolvlm2").model
    path = write_vocabulary(fixture_named("smolvlm2").checkpoint, tmp_path / "model.gguf")
    size = model.spec.decoder.vocab_size
    tokenizer: Any = LlamaTokenizer(NativeModel(path))
    maker = GuideMaker(tokenizer, model.spec.conversation.eos_token_ids, size)
    source = random.Random(5)
    for number in range(10):
        schema = drawn_schema(source)
        text = answer_of(maker.schema(schema), (tokenizer, size), number, temperature=number % 2)
        assert fulfils(json.loads(text), schema), (schema, text)


def test_every_engine_follows_a_schema(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    fixture = fixture_named("smolvlm2")
    formats = ("onnx", "gguf")
    bundle = tmp_path / "bundle"
    mobilevlm.export(fixture.checkpoint, bundle, recipe="fp32", formats=formats, measure=False)
    schema = {"type": "array", "items": {"enum": ["a", "b", 3]}, "minItems": 4, "maxItems": 6}
    for engine in ("onnx", "hybrid", "gguf"):
        with mobilevlm.load(bundle, engine=engine) as vlm:
            greedy = vlm.generate("Which?", fixture.images[:1], json_schema=schema)
            drawn = vlm.generate("Which?", json_schema=schema, temperature=1.0, seed=1)
        for answer in (greedy, drawn):
            assert set(json.loads(answer.text)) <= {"a", "b", 3}, engine
            assert answer.finish_reason == "stop"


def test_a_vocabulary_that_cannot_write_json_is_named() -> None:
    maker, _ = maker_of("blip2_t5")
    with pytest.raises(GrammarError, match=r"vocabulary has no token for '\['"):
        maker.schema({})


def test_the_package_that_is_missing_is_named(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(vlm, "_guides", None)
    with pytest.raises(MissingExtraError, match=r"mobilevlm-edge\[structured\]"):
        vlm.generate("Who?", json_schema={})


class CountedMatcher:
    """Matcher of a guide that counts the calls of the library."""

    def __init__(self, guide: Guide) -> None:
        self._matcher, self.calls = guide._matcher, Counter[str]()
        guide._matcher = self

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._matcher, name)

    @property
    def masks(self) -> int:
        return self.calls["unsafe_compute_mask_ptr"] + self.calls["compute_bitmask"]


def lines_of(function: Callable[[], object]) -> int:
    """Return how many lines of Python a call runs, each turn of a loop anew."""
    count, before = 0, sys.gettrace()

    def trace(frame: object, event: str, value: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_mask_of_150_thousand_tokens_is_made_without_a_loop_over_them() -> None:
    """At places where an answer may be any text, the widest masks."""
    maker, (_, size) = large_vocabulary()
    guide = maker.schema({"type": "string", "minLength": 500})
    sampler = Sampler(SamplingOptions(), guide)
    logits = np.random.default_rng(0).standard_normal(size, np.float32)
    sampler(logits, ())
    matcher, lines = CountedMatcher(guide), list[int]()
    for number in range(20):
        lines.append(lines_of(partial(sampler, np.roll(logits, 4001 * number), ())))
    assert 0 < matcher.masks <= 20
    assert max(lines) < 100


def large_vocabulary() -> tuple[GuideMaker, tuple[Any, int]]:
    """Qwen's size: 151,936 byte-level tokens of up to eight letters, made at random."""
    from tokenizers import Tokenizer, decoders, models

    from mobilevlm.tokenizers.pieces import byte_level_name

    source, size = random.Random(0), 151_936
    names = {byte_level_name(bytes([byte])): None for byte in range(256)}
    letters = ' abcdefghijklmnopqrstuvwxyz,.{}":0123456789'
    while len(names) < size - 1:
        text = "".join(source.choices(letters, k=source.randint(2, 8)))
        names.setdefault(byte_level_name(text.encode()))
    vocabulary = {name: index for index, name in enumerate([*names, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return GuideMaker(tokenizer, [size - 1], size), (tokenizer, size)


def count_of_masks(temperature: float, likely: str = "") -> tuple[int, int, int]:
    """Return the masks, masks over the whole vocabulary, and tokens of ten steps inside a string.
    ``likely``: a token that the logits prefer."""
    maker, (tokenizer, size) = maker_of("smolvlm2")
    guide = maker.schema({"type": "string", "minLength": 500})
    sampler = Sampler(SamplingOptions(temperature=temperature, seed=0), guide)
    logits = np.random.default_rng(0).standard_normal(size, np.float32)
    sampler(logits, ())
    if likely:
        logits[token_id(tokenizer, likely)] = 99
        sampler(logits, ())
    matcher, whole = CountedMatcher(guide), 0
    masked = guide.masked

    def counted(values: Any) -> Any:
        nonlocal whole
        whole += 1
        return masked(values)

    guide.masked = counted  # type: ignore[method-assign,assignment]
    for number in range(10):
        sampler(logits if likely else np.roll(logits, 77 * number), ())
    return matcher.masks, whole, 10


def test_a_token_costs_one_mask_at_most() -> None:
    masks, whole, steps = count_of_masks(temperature=1.0)
    assert masks == whole == steps
    masks, whole, steps = count_of_masks(temperature=0.0)
    assert whole <= masks <= steps


def test_the_likeliest_token_costs_no_mask_where_it_is_allowed() -> None:
    masks, whole, _ = count_of_masks(temperature=0.0, likely="a")
    assert masks == whole == 0
