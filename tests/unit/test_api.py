"""The public API: completion, signatures, and docs/reference/api.md, which has every call."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mobilevlm
from mobilevlm.runtime import AnswerOptions, Generation, TextStream, Timings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")


def words_of(text: str) -> set[str]:
    """Words in code of a document: backticks and headings."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return set(re.findall(r"\w+", " ".join(code)))


def public(kind: type) -> list[str]:
    ours = (base for base in kind.__mro__ if base.__module__.startswith("mobilevlm"))
    return [name for base in ours for name in vars(base) if not name.startswith("_")]


def test_completion_shows_the_public_names_alone() -> None:
    assert dir(mobilevlm) == [
        "AsyncVLM", "Chat", "Generation", "MobileVLMError", "QualityError", "VLM", "__version__",
        "export", "load",
    ]  # fmt: skip
    for name in dir(mobilevlm):
        assert getattr(mobilevlm, name) is not None


def test_the_function_export_shows_its_parameters() -> None:
    from mobilevlm.export.pipeline import export

    assert inspect.signature(mobilevlm.export) == inspect.signature(export)
    assert mobilevlm.export.__doc__ == inspect.getdoc(export)


@pytest.mark.parametrize("function", [mobilevlm.export, mobilevlm.load])
def test_every_parameter_is_documented(function: Callable[..., object]) -> None:
    parameters = set(inspect.signature(function).parameters)
    assert parameters <= words_of(DOCUMENT), parameters - words_of(DOCUMENT)


def test_every_option_of_an_answer_is_documented() -> None:
    options = AnswerOptions.__optional_keys__
    assert options <= words_of(DOCUMENT), options - words_of(DOCUMENT)


def test_stream_and_generate_take_the_same() -> None:
    stream, generate = (
        inspect.signature(function).parameters
        for function in (mobilevlm.VLM.stream, mobilevlm.VLM.generate)
    )
    assert list(stream.values()) == list(generate.values())


def signatures() -> str:
    """Every call of the API with its parameters and defaults, as docs/reference/api.md has them."""
    stream = inspect.signature(mobilevlm.VLM.stream).parameters.values()
    options = [one for one in stream if one.name in AnswerOptions.__optional_keys__]
    lines = [f"options: {', '.join(f'{one.name}={one.default!r}' for one in options)}"]
    for name in ("export", "load", "VLM", "AsyncVLM", "Chat"):
        found = getattr(mobilevlm, name)
        if not inspect.isclass(found):
            lines.append(f"mobilevlm.{name}{parameters_of(found)}")
            continue
        lines += [
            f"{name}.{method}{parameters_of(getattr(found, method))}"
            for method in public(found)
            if inspect.isfunction(getattr(found, method))
        ]
    return "\n".join(lines)


def is_option(parameter: inspect.Parameter) -> bool:
    keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY
    return keyword and parameter.name in AnswerOptions.__optional_keys__


def parameters_of(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self" and not is_option(parameter)
    ]
    if any(map(is_option, signature.parameters.values())):
        bare.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD))
    shown = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    kept = str(signature.return_annotation)
    return f"{shown} -> {kept}"


def test_the_page_has_the_signature_of_every_call() -> None:
    block = re.search(r"## Signatures\n.*?```text\n(.*?)\n```", DOCUMENT, re.DOTALL)
    assert block is not None and block[1] == signatures()


def test_completion_shows_the_options_of_an_answer() -> None:
    for call in (mobilevlm.VLM.stream, mobilevlm.AsyncVLM.stream, mobilevlm.VLM.generate_batch):
        shown = inspect.signature(call).parameters
        assert AnswerOptions.__optional_keys__ <= shown.keys()
        assert shown["max_new_tokens"].default == 256 and shown["temperature"].default == 0.0


@pytest.mark.parametrize("kind", [mobilevlm.VLM, mobilevlm.Chat, mobilevlm.AsyncVLM, TextStream])
def test_every_method_and_its_parameters_are_documented(kind: type) -> None:
    words = words_of(DOCUMENT)
    for name in public(kind):
        assert name in words, name
        if inspect.isfunction(found := getattr(kind, name)):
            for parameter in set(inspect.signature(found).parameters) - {"self", "options"}:
                assert parameter in words, (name, parameter)


def test_every_field_of_an_answer_is_documented() -> None:
    words = words_of(DOCUMENT)
    for kind in (Generation, Timings):
        assert {field.name for field in dataclasses.fields(kind)} <= words


def test_importing_the_package_imports_neither_runtime_nor_export() -> None:
    code = (
        "import sys, mobilevlm; dir(mobilevlm);"
        "print(any(name in sys.modules for name in ('onnxruntime', 'numpy', 'torch', 'onnx')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


FOR_SOME = {
    "mobilevlm.checkpoint", "mobilevlm.export", "mobilevlm.families", "mobilevlm.gguf.file",
    "mobilevlm.gguf.model", "mobilevlm.reference", "mobilevlm.shards", "mobilevlm.synth",
    "mobilevlm.templates.chat_template", "mobilevlm.tokenizers.byte_level",
    "mobilevlm.tokenizers.tokenizer", "onnxruntime", "torch", "transformers", "onnx", "llama_cpp",
    "click", "rich", "jinja2", "safetensors", "http", "ssl", "subprocess", "zipfile",
}  # fmt: skip
"""Modules that only some models, verbs or systems need."""
MOST_MODULES = 80
"""Modules of the product that every model needs."""


def test_importing_the_runtime_imports_only_what_every_model_needs() -> None:
    code = "import sys, mobilevlm.runtime; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    found = set(done.stdout.split())
    assert "mobilevlm.runtime.vlm" in found, done.stderr
    assert not found & FOR_SOME
    assert len([name for name in found if name.startswith("mobilevlm")]) <= MOST_MODULES
