"""Mutated ``tokenizer.json`` files: read, and used on a few texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fuzz.harness import Fuzzer
from fuzz.mutations import NUMBERS, TEXTS, mutate_bytes, mutate_json
from mobilevlm.conversation import tokenize
from mobilevlm.runtime.answer.text import Detokenizer
from mobilevlm.tokenizers.tokenizer import read_tokenizer, vocabulary_length

DATA = Path(__file__).parents[1] / "data"
SOURCES = (
    ("llava_v1_im_start_end/checkpoint", False),
    ("mobilevlm_v2/checkpoint", False),
    ("blip2/checkpoint", True),
    ("blip2_t5/checkpoint", True),
    ("instructblip/checkpoint/qformer_tokenizer", True),
    ("moe_llava_phi2/checkpoint", False),
)
INPUTS = (
    "What is in the image? ",
    "  a  b\n\n\tTHE the été 日本語 🙂 ﷺ \u2581 <s> </s> <0x41> <image> [CLS] 0123456789",
    "a" * 400 + " " * 400 + "!" * 100,
)
PATTERNS = ("", "a", " ", "(a+)+$", "(a|aa)+$", "a*", "(?=a)", "(", "[", "\\p{L}+", "(\\s*)*x",
            "(a*)*b", "(?:(?:a?)*)*c", ".*.*.*.*x", "(?<n>a)\\k<n>+", "a{1000000}",
            "(a{999}){999}")  # fmt: skip
NORMALIZERS: tuple[Any, ...] = (
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"},
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "aaaa"},
    {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa" * 5000},
    {"type": "Prepend", "prepend": "a" * 100_000},
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase")),
    {"type": "StripAccents"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
     "strip_accents": None, "lowercase": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "ByteLevel"},
    {"type": "Sequence", "normalizers": []},
    {"type": "Unknown"},
)  # fmt: skip
PRE_TOKENIZERS: tuple[Any, ...] = (
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"String": "a"}, "behavior": "MergedWithNext", "invert": True},
    {"type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": True},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "first", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "Digits", "individual_digits": True},
    {"type": "FixedLength", "length": 0},
    {"type": "UnicodeScripts"},
    {"type": "WhitespaceSplit"},
    {"type": "BertPreTokenizer"},
)
DECODERS: tuple[Any, ...] = (
    {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    {"type": "Strip", "content": "a", "start": 10**6, "stop": 10**6},
    {"type": "Strip", "content": "a", "start": 1, "stop": 1},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "Metaspace", "replacement": "a", "prepend_scheme": "never", "split": True},
    {"type": "ByteFallback"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Fuse"},
)
POST_PROCESSORS: tuple[Any, ...] = (
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 1000,
     "pair": [], "special_tokens": {"x": {"id": "x", "ids": list(range(1000)), "tokens": ["x"]}}},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}],
     "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
     "pair": [], "special_tokens": {}},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
     "pair": [], "special_tokens": {}},
    {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 2**31], "trim_offsets": True,
     "add_prefix_space": False},
    {"type": "BertProcessing", "sep": ["", 0], "cls": ["", 4_000_000_000]},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
)  # fmt: skip
STRATEGIES = ("LongestFirst", "OnlyFirst", "OnlySecond")


def prepare(folder: Path) -> None:
    """Write the tokenizer.json of each kind of vocabulary."""
    for number, (name, ready) in enumerate(SOURCES):
        read_tokenizer(DATA / name, ready=ready).save(str(folder / f"{number}.json"))


def mutate(base: Path, random: random.Random, scratch: Path) -> Path:
    """Write a wrong tokenizer.json to the scratch folder."""
    source = base / f"{random.randrange(len(SOURCES))}.json"
    if random.random() < 0.1:
        (scratch / "tokenizer.json").write_bytes(mutate_bytes(random, source.read_bytes()))
        return scratch
    data = json.loads(source.read_text())
    for _ in range(random.choice((1, 1, 2, 3))):
        random.choice(_CHANGES)(random, data)
    (scratch / "tokenizer.json").write_text(json.dumps(data))
    return scratch


def attempt(folder: Path) -> None:
    """Read the file, encode texts as prompts are and decode their ids as answers are."""
    tokenizer = read_tokenizer(folder, ready=True)
    assert vocabulary_length(tokenizer) >= 0
    for text in INPUTS:
        ids = tokenize(tokenizer, text)
        assert len(ids) < 1_000_000
        answer = Detokenizer(tokenizer)
        words = [token for token in ids[:200] if isinstance(token, int)]
        pieces = [answer.add(token) for token in (*words, 0, 5, 2**31 - 1)]
        assert sum(map(len, pieces)) + len(answer.finish()) < 4_000_000


def _steps(random: random.Random, kind: str, key: str, known: tuple[Any, ...]) -> Any:
    """Return one step, or a sequence of some or of very many."""
    count = random.choice((1, 1, 2, 5, 20))
    steps = [_patterned(random, random.choice(known)) for _ in range(count)]
    if random.random() < 0.2:
        steps = [steps[0]] * random.choice((5, 30))
    return steps[0] if len(steps) == 1 else {"type": kind, key: steps}


def _patterned(random: random.Random, step: Any) -> Any:
    if "pattern" in step and random.random() < 0.5:
        step = {**step, "pattern": {random.choice(("Regex", "String")): random.choice(PATTERNS)}}
    return mutate_json(random, step, 1) if random.random() < 0.3 else step


def _normalizer(random: random.Random, data: Any) -> None:
    data["normalizer"] = _steps(random, "Sequence", "normalizers", NORMALIZERS)


def _pre_tokenizer(random: random.Random, data: Any) -> None:
    data["pre_tokenizer"] = _steps(random, "Sequence", "pretokenizers", PRE_TOKENIZERS)


def _decoder(random: random.Random, data: Any) -> None:
    data["decoder"] = _steps(random, "Sequence", "decoders", DECODERS)


def _post_processor(random: random.Random, data: Any) -> None:
    data["post_processor"] = _steps(random, "Sequence", "processors", POST_PROCESSORS)


def _truncation(random: random.Random, data: Any) -> None:
    data["truncation"] = {
        "direction": random.choice(("Right", "Left")),
        "max_length": random.choice((0, 1, 5, 512, 2**63)),
        "strategy": random.choice(STRATEGIES),
        "stride": random.choice((0, 1, 5, 10**9)),
    }


def _padding(random: random.Random, data: Any) -> None:
    data["padding"] = {
        "strategy": random.choice(
            ("BatchLongest", {"Fixed": random.choice((0, 64, 10**9, 2**60))})
        ),
        "direction": random.choice(("Right", "Left")),
        "pad_to_multiple_of": random.choice((None, 0, 8, 10**9)),
        "pad_id": random.choice((0, 2**31)),
        "pad_type_id": 0,
        "pad_token": random.choice(("<pad>", "")),
    }


def _added(random: random.Random, data: Any) -> None:
    tokens = data["added_tokens"]
    for _ in range(random.choice((1, 3, 50))):
        tokens.insert(
            random.randrange(len(tokens) + 1),
            {
                "id": random.choice((len(tokens), 0, 7, 2**31, 4_000_000_000)),
                "content": random.choice((*TEXTS, "a", " ", "the", "<image>", "<s>")),
                **{key: random.random() < 0.5 for key in ("single_word", "lstrip", "rstrip",
                                                          "normalized", "special")},
            },
        )  # fmt: skip


def _model(random: random.Random, data: Any) -> None:
    model = data["model"]
    keys = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "unk_id",
            "byte_fallback", "ignore_merges", "fuse_unk", "max_input_chars_per_word",
            "type")  # fmt: skip
    others = ("<unk>", "a", True, 0.5, "BPE", "Unigram", "WordLevel", "WordPiece", None)
    model[random.choice(keys)] = random.choice((*NUMBERS, *TEXTS, *others))


def _vocabulary(random: random.Random, data: Any) -> None:
    model = data["model"]
    model["vocab"] = mutate_json(random, model["vocab"], random.choice((1, 5, 50)))
    if "merges" in model and random.random() < 0.5:
        model["merges"] = mutate_json(random, model["merges"], random.choice((1, 5)))
    if isinstance(model["vocab"], dict) and random.random() < 0.3:
        model["vocab"][random.choice(("zz", "a"))] = random.choice((2**31, 4_294_967_295, 10**7))


def _any(random: random.Random, data: Any) -> None:
    section = random.choice([key for key in data if key != "model"])
    data[section] = mutate_json(random, data[section])


_CHANGES = (
    *(_normalizer, _normalizer, _pre_tokenizer, _decoder, _post_processor, _truncation, _padding),
    *(_added, _model, _vocabulary, _any),
)

FUZZER = Fuzzer(prepare, mutate, attempt)
