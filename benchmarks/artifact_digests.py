"""Digests of every artifact of many exports, to show that a change leaves the bytes as they were.

    python benchmarks/artifact_digests.py -o after.json                     # all, a few minutes
    python benchmarks/artifact_digests.py nano vila -o after.json           # two models
    python benchmarks/artifact_digests.py --compare before.json after.json

CHECKPOINT: a built-in name, the name of a folder of tests/data, or a checkpoint folder; by default
the built-in models and all of tests/data. Each is exported in every recipe to ONNX (recipes for
NPUs to graphs of fixed shapes) and in the type of --gguf to GGUF. manifest.json is left out, since
it names versions and a digest of the code. For an export that is refused, the refusal is kept. Only
exports that both files have are compared; the exit code is 1 where one of them differs. Another
machine or another version of a package may give other bytes, so the file names both.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mobilevlm

DATA = Path(__file__).parent.parent / "tests" / "data"
BUILT_IN = ("nano", "nano-moe")
RECIPES = ("fp32", "int8", "int4", "fast")
FOR_NPU = ("a16w8", "a8w8")
"""Recipes of graphs with fixed shapes."""
VARIANTS = {"vila": ("vila1.5",)}
"""Official behaviours besides the one that a fixture's checkpoint tells."""
BASES = {"llava_lora": "llava_v1"}
"""Fixtures that hold adapters, and the fixture that these are merged into."""
PACKAGES = ("gguf", "ml_dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
"""Packages that the bytes depend on."""

Outcome: TypeAlias = "dict[str, Any]"
"""``files``: size and sha256 by path, or ``refused``: text of the refusal."""


@dataclass(frozen=True)
class Source:
    """One model to export."""

    name: str
    checkpoint: str
    vision_tower: Path | None = None
    variant: str | None = None
    base: Path | None = None


def default_sources() -> Iterator[Source]:
    """Yield the built-in models and all of tests/data."""
    for name in BUILT_IN:
        yield Source(name, name)
    for folder in sorted(DATA.iterdir()):
        yield from folder_sources(folder)


def sources_of(given: str) -> list[Source]:
    """Return the models that an argument stands for; none where there is nothing."""
    if given in BUILT_IN:
        return [Source(given, given)]
    folder = Path(given) if Path(given).exists() else DATA / given
    if found := list(folder_sources(folder)):
        return found
    tower = folder.parent / "vision_tower"
    whole = Source(folder.name, str(folder), tower if tower.is_dir() else None)
    return [whole] if folder.exists() else []


def folder_sources(folder: Path) -> Iterator[Source]:
    """Yield the models of a folder of tests/data; none of other folders."""
    if base := BASES.get(folder.name):
        for config in sorted(folder.glob("*/adapter_config.json")):
            adapter = config.parent
            whole = folder.parent / base
            name = f"{folder.name}/{adapter.name}"
            yield Source(name, str(adapter), whole / "vision_tower", base=whole / "checkpoint")
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        return
    found = folder / "vision_tower"
    tower = found if found.is_dir() else None
    yield Source(folder.name, str(checkpoint), tower)
    for variant in VARIANTS.get(folder.name, ()):
        yield Source(f"{folder.name} {variant}", str(checkpoint), tower, variant)


def outcome(source: Source, options: dict[str, Any], place: Path) -> Outcome:
    """Export, and return the digests of what was written."""
    bundle = place / "bundle"
    try:
        mobilevlm.export(
            source.checkpoint,
            bundle,
            vision_tower=source.vision_tower,
            variant=source.variant,
            base=source.base,
            measure=False,
            **options,
        )
    except mobilevlm.MobileVLMError as refusal:
        return {"refused": str(refusal).replace(str(place), "").replace(str(DATA), "")}
    paths = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    names = {path.relative_to(bundle).as_posix(): path for path in paths}
    return {"files": {name: digest(names[name]) for name in names if name != "manifest.json"}}


def digest(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def exports_of(recipes: list[str], gguf: str | None) -> dict[str, dict[str, Any]]:
    """Return the options of every export, by the name that tables have for it."""
    options: dict[str, dict[str, Any]] = {
        name: {"recipe": name, "formats": ("npu" if name in FOR_NPU else "onnx",)}
        for name in recipes
    }
    if gguf:
        options[gguf] = {"recipe": "int4", "formats": ("gguf",), "gguf_type": gguf.lower()}
    return options


def collect(sources: list[Source], exports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the outcome of each export of each model, and what made them."""
    models: dict[str, dict[str, Outcome]] = {}
    for source in sources:
        start = time.perf_counter()
        models[source.name] = {}
        for name, options in exports.items():
            with tempfile.TemporaryDirectory() as place:
                models[source.name][name] = outcome(source, options, Path(place))
        print(f"{source.name:<28}{time.perf_counter() - start:6.1f} s", file=sys.stderr)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"machine": platform.machine(), "versions": versions, "models": models}


def verdict(old: Outcome, new: Outcome) -> tuple[str, bool]:
    """Return what a table says about one export, and whether its artifacts are the same."""
    if "refused" in old and "refused" in new:
        same = old["refused"] == new["refused"]
        return ("refused" if same else f"refused, now: {new['refused']}"), True
    for one, when in ((old, "before"), (new, "now")):
        if "refused" in one:
            return f"different: refused {when}: {one['refused']}", False
    before, after = old["files"], new["files"]
    changed = [
        f"`{name}`{'' if name in before and name in after else ' (only one has it)'}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]
    return (f"different: {', '.join(changed)}", False) if changed else ("equal", True)


def compare(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Print a table in Markdown; return whether all that both have is the same."""
    print("| model | export | files | artifacts |\n|---|---|---|---|")
    all_same, rows, left_out = True, 0, set()
    for model in sorted(old["models"] | new["models"]):
        before, after = (one["models"].get(model, {}) for one in (old, new))
        for export in before | after:
            if export not in before or export not in after:
                left_out.add(model)
                continue
            said, same = verdict(before[export], after[export])
            all_same, rows = all_same and same, rows + 1
            print(f"| {model} | {export} | {len(after[export].get('files', ()))} | {said} |")
    print(f"\n{rows} exports compared, {'all the same' if all_same else 'NOT all the same'}.")
    if left_out:
        print(f"Exports that only one of the files has, of: {', '.join(sorted(left_out))}.")
    for key in ("machine", "versions"):
        if old[key] != new[key]:
            print(f"The {key} differ: {old[key]}, {new[key]}.")
    return all_same and rows > 0


def main() -> None:
    """Collects or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="by default %(default)s")
    parser.add_argument("--gguf", default="Q4_0", help="type, or '' for none; by default Q4_0")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"))
    given = parser.parse_args()
    if given.compare:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in given.compare)
        sys.exit(0 if compare(old, new) else 1)
    if given.output is None:
        parser.error("-o FILE.json is missing")
    named: list[Source] = []
    for name in given.checkpoints:
        if not (found := sources_of(name)):
            parser.error(f"{name}: no such checkpoint, and no such folder of tests/data")
        named += found
    exports = exports_of([name for name in given.recipes.split(",") if name], given.gguf)
    written = collect(named or list(default_sources()), exports)
    given.output.write_text(f"{json.dumps(written, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
