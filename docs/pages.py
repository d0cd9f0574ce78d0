"""Hook of mkdocs: reference pages from the code, and documents that lie outside this folder.

Pages are made while the site is built, so that they cannot fall behind the code. Everything here
reads the installed package and the checkout; nothing is fetched.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "project"
"""Folder of the site for documents of the checkout that are not in docs/."""
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


# --- docstrings ---------------------------------------------------------------------------------


def markdown(docstring: str | None) -> str:
    """Return a docstring as Markdown: roles become code, ``Raises:`` a list."""
    text = inspect.cleandoc(docstring or "")
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    text = text.replace("``", "`")
    body, _, raised = text.partition("\nRaises:\n")
    if raised:
        entries = re.split(r"\n(?=\S)", textwrap.dedent(raised).strip())
        lines = [" ".join(entry.split()) for entry in entries]
        items = [re.sub(r"^([\w, ]+):", r"`\1`:", line) for line in lines]
        body = body.rstrip() + "\n\nRaises:\n\n" + "\n".join(f"- {item}" for item in items)
    return body


def one_line(docstring: str | None) -> str:
    """Return a docstring for a cell of a table."""
    return " ".join(markdown(docstring).split()).replace("|", "\\|")


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the texts that stand behind the fields of a class."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = getattr(tree.body[0], "body", [])
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                value = ast.literal_eval(text.value) if isinstance(text.value, ast.Constant) else ""
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = str(value)
    return found


# --- the Python API -----------------------------------------------------------------------------

_DATA = ("TextStream", "Timings", "AnswerOptions", "SamplingOptions")
"""Names of mobilevlm.runtime that calls return or take, beside those of mobilevlm itself."""


def python_page() -> str:
    """Return the page of all public calls, with signatures and docstrings."""
    import mobilevlm

    parts = [
        "# Python API: signatures",
        "Made from the code's docstrings. [The guide to the API](api.md) explains the same calls "
        "with examples.",
    ]
    names = [name for name in mobilevlm.__all__ if not name.startswith("_")]
    names.sort(key=lambda name: (inspect.isclass(getattr(mobilevlm, name)), name))
    for name in names:
        parts += _entry("mobilevlm", name, getattr(mobilevlm, name))
    runtime = importlib.import_module("mobilevlm.runtime")
    for name in _DATA:
        parts += _entry("mobilevlm.runtime", name, getattr(runtime, name))
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(module: str, name: str, found: Any) -> Iterator[str]:
    yield f"## {module}.{name}"
    if not inspect.isclass(found):
        yield _signature(f"{module}.{name}", found)
        yield markdown(found.__doc__)
        return
    yield markdown(found.__doc__)
    texts = field_docstrings(found)
    if dataclasses.is_dataclass(found) or hasattr(found, "__optional_keys__"):
        hints = {key: hint for one in found.__mro__ for key, hint in _annotations(one).items()}
        rows = [
            f"| `{key}` | `{_type_text(hints[key])}` | {one_line(texts.get(key))} |"
            for key in hints
            if not key.startswith("_")
        ]
        yield "\n".join(["| field | type | |", "|---|---|---|", *rows])
    ours = (base for base in found.__mro__ if base.__module__.startswith("mobilevlm"))
    for method in dict.fromkeys(key for base in ours for key in vars(base) if key[0] != "_"):
        member = inspect.getattr_static(found, method)
        if isinstance(member, property):
            yield f"### {name}.{method}"
            yield markdown(member.__doc__)
        elif inspect.isfunction(member) or isinstance(member, classmethod | staticmethod):
            yield f"### {name}.{method}()"
            yield _signature(f"{name}.{method}", getattr(found, method))
            yield markdown(getattr(found, method).__doc__)


def _annotations(kind: type) -> dict[str, Any]:
    return inspect.get_annotations(kind)


def _type_text(hint: Any) -> str:
    text = hint if isinstance(hint, str) else getattr(hint, "__forward_arg__", str(hint))
    return str(text).replace("|", "\\|")


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    lines = []
    kinds = inspect.Parameter
    seen_star = False
    for one in signature.parameters.values():
        if one.name == "self":
            continue
        if one.kind is kinds.KEYWORD_ONLY and not seen_star:
            lines.append("*")
            seen_star = True
        seen_star |= one.kind is kinds.VAR_POSITIONAL
        text = str(one).replace("'", "") if one.default is kinds.empty else _default(one)
        lines.append(text)
    result = str(signature.return_annotation).strip("'")
    arrow = "" if signature.return_annotation is inspect.Signature.empty else f" -> {result}"
    short = f"{name}({', '.join(lines)}){arrow}"
    if len(short) > 88:
        short = f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){arrow}"
    return f"```python\n{short}\n```"


def _default(one: inspect.Parameter) -> str:
    return f"{one.name}: {str(one.annotation).strip(chr(39))} = {one.default!r}"


# --- the command line ---------------------------------------------------------------------------


def commands_page() -> str:
    """Return the page of all commands and their options."""
    from mobilevlm.cli import VERBS, program

    context = click.Context(program, info_name="mobilevlm")
    parts = [
        "# Commands",
        "Made from the program's help. [The command line day by day](../how-to/cli.md) tells how "
        "to use it.",
    ]
    for verb in VERBS:
        command = program.get_command(context, verb)
        assert command is not None
        inner = click.Context(command, parent=context, info_name=verb)
        parts += [
            f"## mobilevlm {verb}",
            f"```text\nmobilevlm {verb} {' '.join(command.collect_usage_pieces(inner))}\n```",
            *_help(command.help or ""),
        ]
        rows = [
            f"| {_cell(record[0])} | {_cell(record[1])} |"
            for option in command.get_params(inner)
            if (record := option.get_help_record(inner)) is not None
        ]
        parts.append("\n".join(["| option | |", "|---|---|", *rows]))
        if command.epilog:
            parts += _help(command.epilog)
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Return text of the help for a cell of a table: names of options are code."""
    text = " ".join(text.split())
    names = (
        found[0].rstrip() if (found := re.match(r"--?[\w-]+(?:(?:, | / )--?[\w-]+)*", text)) else ""
    )
    rest = re.sub(r"([|<>\[\]*_])", r"\\\1", text[len(names) :])
    return f"`{names}`{rest}" if names else rest


def _help(text: str) -> Iterator[str]:
    """Yield paragraphs of a help text; those after ``\\b`` are lines of a program."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        if lines[0].strip() == "\b":
            title = "" if lines[1].startswith(" ") or len(lines) < 3 else lines.pop(1)
            code = textwrap.dedent("\n".join(lines[1:]))
            yield (f"{title}\n\n" if title else "") + f"```console\n{code}\n```"
        else:
            yield re.sub(r"([<>*_])", r"\\\1", " ".join(line.strip() for line in lines))


# --- recipes and the manifest -------------------------------------------------------------------


def recipe_page() -> str:
    """Return the page of all fields of a recipe file."""
    from mobilevlm.export.recipes.named import RECIPES
    from mobilevlm.recipe import Limits, LinearFormat, Recipe

    parts = [
        "# Fields of a recipe",
        "Made from the code. [Quantization](../explanation/quantization.md) explains recipes and "
        "their methods. A recipe file is TOML with these fields; `extends` names the recipe that "
        "it changes. Built-in recipes: " + ", ".join(f"`{name}`" for name in RECIPES) + ".",
    ]
    for kind, title in (
        (Recipe, "Recipe"),
        (LinearFormat, "A part or a layer"),
        (Limits, "limits"),
    ):
        texts, hints = field_docstrings(kind), typing.get_type_hints(kind)
        rows = [
            f"| `{one.name}` | {_values(hints[one.name])} | {_default_text(one)} "
            f"| {one_line(texts.get(one.name))} |"
            for one in dataclasses.fields(kind)
        ]
        head = ["| field | values | default | |", "|---|---|---|---|"]
        parts += [f"## {title}", markdown(kind.__doc__), "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"


def _values(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_values(one) for one in args if one is not type(None))
    if origin is dict:
        return f"table of {_values(args[1])}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "precision or table" if hint.__name__ == "LinearFormat" else "table"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[hint]


def _default_text(one: dataclasses.Field[Any]) -> str:
    if one.default is dataclasses.MISSING:
        return "required" if one.default_factory is dataclasses.MISSING else "none"
    if one.default is None:
        return "none"
    return f"`{json.dumps(one.default)}`"


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema of a bundle's manifest.json, from its dataclasses."""
    from mobilevlm.bundle import SCHEMA_VERSION, Manifest

    definitions: dict[str, Any] = {}
    _schema_of(Manifest, definitions)
    manifest = definitions.pop("Manifest")
    manifest["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    manifest["properties"]["sha256"] = {
        "type": "string",
        "pattern": "^[0-9a-f]{64}$",
        "description": "Digest of everything else in the file.",
    }
    manifest["required"].append("sha256")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a mobilevlm bundle",
        **manifest,
        "$defs": definitions,
    }


_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of values of a type; dataclasses go into ``definitions``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {
            "anyOf": [
                {"type": "null"} if one is type(None) else _schema_of(one, definitions)
                for one in args
            ]
        }
    if origin is tuple:
        if args[-1] is ...:
            return {"type": "array", "items": _schema_of(args[0], definitions)}
        items = [_schema_of(one, definitions) for one in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(args[1], definitions)}
    assert isinstance(hint, type) and dataclasses.is_dataclass(hint), hint
    name = hint.__name__
    if name not in definitions:
        definitions[name] = {}  # a place, for types that hold themselves
        hints, texts = typing.get_type_hints(hint), field_docstrings(hint)
        properties = {}
        for one in dataclasses.fields(hint):
            properties[one.name] = _schema_of(hints[one.name], definitions)
            text = texts.get(one.name)
            if text is None and dataclasses.is_dataclass(kind := hints[one.name]):
                text = kind.__doc__
            if text:
                properties[one.name]["description"] = one_line(text).replace("\\|", "|")
        definitions[name] = {
            "type": "object",
            "description": one_line(hint.__doc__).replace("\\|", "|"),
            "properties": properties,
            "required": [
                one.name
                for one in dataclasses.fields(hint)
                if one.default is one.default_factory is dataclasses.MISSING
            ],
        }
    return {"$ref": f"#/$defs/{name}"}


def manifest_page() -> str:
    """Return the page of the manifest's fields."""
    schema = manifest_schema()
    parts = [
        "# Schema of manifest.json",
        "Made from the code, as [JSON Schema](manifest.schema.json) too. "
        "[The bundle's format](bundle.md) explains it. A later version may add fields, so readers "
        "ignore those that they do not know. Of fields without a default, none may be missing.",
        "## Manifest",
        _properties(schema),
    ]
    for name, definition in sorted(schema["$defs"].items()):
        parts += [f"## {name}", _prose(definition["description"]), _properties(definition)]
    return "\n\n".join(parts) + "\n"


def _properties(schema: dict[str, Any]) -> str:
    required = schema["required"]
    rows = [
        f"| `{name}` | {_kind_text(one)} | {'yes' if name in required else ''} "
        f"| {_prose(one.get('description', ''))} |"
        for name, one in schema["properties"].items()
    ]
    return "\n".join(["| field | type | required | |", "|---|---|---|---|", *rows])


def _prose(text: str) -> str:
    return text.replace("|", "\\|")


def _kind_text(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_kind_text(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        items = schema.get("items")
        many = schema.get("prefixItems", [])
        return f"list of {_kind_text(items)}" if items else f"[{', '.join(map(_kind_text, many))}]"
    if schema.get("type") == "object":
        return f"object of {_kind_text(schema['additionalProperties'])}"
    return str(schema.get("type", "anything"))


def generated() -> dict[str, str]:
    """Return the content of generated pages by their place in the site."""
    return {
        "reference/python.md": python_page(),
        "reference/commands.md": commands_page(),
        "reference/recipe-fields.md": recipe_page(),
        "reference/manifest.md": manifest_page(),
        "reference/manifest.schema.json": json.dumps(manifest_schema(), indent=2) + "\n",
    }


# --- documents outside docs/ --------------------------------------------------------------------


def outside_documents() -> dict[str, Path]:
    """Return files of the checkout that documents link to, by their place in the site."""
    found: dict[str, Path] = {}
    waiting = sorted(DOCS.rglob("*.md"))
    while waiting:
        document = waiting.pop()
        for link in LINK.findall(document.read_text(encoding="utf-8")):
            target = _target(document, link)
            if target is None or target.is_relative_to(DOCS) or _place(target) in found:
                continue
            found[_place(target)] = target
            for inside in sorted(target.glob("*.md")) if target.is_dir() else [target]:
                if inside.suffix == ".md":
                    found.setdefault(_place(inside), inside)
                    waiting.append(inside)
    return found


def _target(document: Path, link: str) -> Path | None:
    """Return the file or folder of the checkout that a link leads to; none for addresses."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    target = (document.parent / path).resolve()
    if target.is_dir() and (target / "README.md").is_file():
        target /= "README.md"
    return target if target.exists() and target.is_relative_to(ROOT) else None


def _place(target: Path) -> str:
    """Return the place in the site: program text becomes a page."""
    name = f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
    if target.is_dir():
        return f"{name}/index.md"
    return f"{name}.md" if target.suffix in (".py", ".c", ".toml", "") else name


def relinked(text: str, document: Path, place: str) -> str:
    """Return Markdown whose links to files of the checkout lead to their places in the site."""

    def replaced(found: re.Match[str]) -> str:
        target = _target(document, found[1])
        if target is None:
            return found[1]
        inside = target.is_relative_to(DOCS)
        there = target.relative_to(DOCS).as_posix() if inside else _place(target)
        _, mark, anchor = found[1].partition("#")
        return os.path.relpath(there, Path(place).parent) + mark + anchor

    return LINK.sub(replaced, text)


# --- mkdocs -------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of this folder."""
    from mkdocs.structure.files import File

    for place, content in generated().items():
        files.append(File.generated(config, place, content=content))
    for place, path in outside_documents().items():
        if path.is_dir():
            names = sorted(one.name for one in path.glob("*.md"))
            lines = [f"# {path.relative_to(ROOT)}", "", *(f"- [{name}]({name})" for name in names)]
            files.append(File.generated(config, place, content="\n".join(lines) + "\n"))
        elif path.suffix == ".md":
            text = relinked(path.read_text(encoding="utf-8"), path, place)
            files.append(File.generated(config, place, content=text))
        elif place.endswith(".md"):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            fence = f"````{path.suffix.lstrip('.')}\n{text}\n````"
            files.append(File.generated(config, place, content=f"# {name}\n\n{fence}\n"))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave this folder to the pages of the site."""
    place = page.file.src_uri
    if place.startswith(f"{OUTSIDE}/") or page.file.generated_by:
        return markdown
    return relinked(markdown, DOCS / place, place)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Show ``|`` in code of tables, where Markdown wants a backslash before it."""
    return re.sub(r"<code>[^<]*</code>", lambda found: found[0].replace("\\|", "|"), html)
