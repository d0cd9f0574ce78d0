"""Documents: links lead somewhere, and the pages made from code hold what the code has."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mobilevlm
from mobilevlm.cli import VERBS
from mobilevlm.export.recipes.file import find_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "examples" / "README.md",
        *DOCS.rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)
BUNDLES = Path(mobilevlm.__file__).parent / "nano" / "bundles"
README_WORDS = 900
"""Most words of the README: it is read before anything is decided."""


def site() -> Any:
    """The hook that makes pages."""
    specification = importlib.util.spec_from_file_location("site_pages", DOCS / "pages.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


SITE = site()
MADE = SITE.generated()
"""Pages made from the code, by their place."""


def anchors(document: Path) -> Iterator[str]:
    """Anchors of a document's headings, as GitHub and the site make them."""
    for heading in re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        yield re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def broken(document: Path) -> Iterator[str]:
    """Links of a document that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if target.is_relative_to(DOCS) and target.relative_to(DOCS).as_posix() in MADE:
            continue
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            yield link


def test_links_of_documents_lead_to_a_file_and_a_heading() -> None:
    found = {str(document.relative_to(ROOT)): list(broken(document)) for document in DOCUMENTS}
    assert len(found) > 30
    assert {name: links for name, links in found.items() if links} == {}


def test_the_site_lists_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md$", text, re.MULTILINE))
    made = {name for name in MADE if name.endswith(".md")}
    listed = {name for name in listed if not name.startswith("project/")}
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | made


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    import click

    from mobilevlm.cli import program

    page = MADE["reference/commands.md"]
    for verb in VERBS:
        section = page.partition(f"## mobilevlm {verb}\n")[2].partition("\n## ")[0]
        command = program.get_command(click.Context(program), verb)
        assert command is not None
        for option in command.params:
            assert isinstance(option, click.Argument) or option.opts[-1] in section, option.name


def test_every_public_name_is_on_the_page_of_signatures() -> None:
    page = MADE["reference/python.md"]
    for name in mobilevlm.__all__:
        assert name.startswith("_") or f"## mobilevlm.{name}\n" in page
    for method in ("stream", "generate", "close", "encode_image"):
        assert f"### VLM.{method}()" in page


def test_every_field_of_a_recipe_is_on_its_page() -> None:
    page = MADE["reference/recipe-fields.md"]
    for name in ("decoder", "limits", "block_size", "vision_relative_error", "kv_cache"):
        assert f"\n| `{name}` |" in page


def test_the_example_of_a_recipe_file_is_a_recipe(tmp_path: Path) -> None:
    text = (DOCS / "explanation" / "quantization.md").read_text(encoding="utf-8")
    example = next(
        block for block in re.findall(r"```toml\n(.*?)```", text, re.S) if "gguf" in block
    )
    assert tomllib.loads(example)
    path = tmp_path / "example.toml"
    path.write_text(example, encoding="utf-8")
    assert find_recipe(str(path)).decoder.quantizer == "gptq"


def test_manifests_of_the_built_in_bundles_follow_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema_rs", reason="pip install '.[dev]'")
    validator = jsonschema.validator_for(json.loads(MADE["reference/manifest.schema.json"]))
    for folder in sorted(path for path in BUNDLES.iterdir() if path.is_dir()):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert [str(error) for error in validator.iter_errors(manifest)] == []
        del manifest["files"]
        assert not validator.is_valid(manifest)
