"""``mobilevlm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import base_option, download_option, engine_option, from_hub
from mobilevlm.console.terminal import plain

if TYPE_CHECKING:
    from mobilevlm.bundle import Bundle
    from mobilevlm.console.tables import Table
    from mobilevlm.model import Model


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path), callback=from_hub)
@click.option(
    "--vision-tower",
    type=click.Path(path_type=Path),
    callback=from_hub,
    help="Folder of the vision tower of a checkpoint.",
)
@click.option("--variant", metavar="NAME", help="Official behaviour of a checkpoint.")
@base_option
@download_option
@click.option(
    "--experts",
    is_flag=True,
    help="Show which experts visual tokens and text tokens are sent to (of a checkpoint: needs "
    "torch).",
)
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    help="Samples to run for --experts.",
)
@engine_option("What runs a bundle for --experts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    path: Path,
    experts: bool,
    data: str,
    engine: str,
    as_json: bool,
    **origin: Any,
) -> None:
    """Show what is in PATH: a bundle (every file is checked), a checkpoint or a GGUF file."""
    from mobilevlm.builtin import checkpoint_path

    path = checkpoint_path(path)
    if experts:
        _show_experts(path, origin, data, engine, as_json)
    elif path.suffix == ".gguf":
        _show_gguf(path, as_json)
    elif _is_checkpoint(path):
        _show_checkpoint(path, origin, as_json)
    else:
        _show_bundle(path, as_json)


def _show_bundle(path: Path, as_json: bool) -> None:
    from mobilevlm.bundle import open_bundle
    from mobilevlm.console.tables import Column, Table, show
    from mobilevlm.plain_types import to_dict

    bundle = open_bundle(path)
    manifest = bundle.manifest
    if as_json:
        show_json({**to_dict(manifest), "memory": _memory(bundle)})
        return
    show(_spec_table(to_dict(manifest.spec)))
    table = Table(
        (
            Column("stage", whole=True),
            Column("artifact", whole=True),
            Column("precision"),
            Column("bits", whole=True, right=True),
            Column("MB", whole=True, right=True),
        )
    )
    for artifact in manifest.artifacts:
        size = sum(manifest.files[file].size for file in artifact.files)
        bits = f"{artifact.bits_per_weight:.2f}" if artifact.bits_per_weight else ""
        precision = artifact.precision
        if artifact.weight_bits is not None:
            precision = f"{precision} ({artifact.weight_bits}-bit weights)"
        table.add(artifact.stage, artifact.path, precision, bits, f"{size / 1e6:.1f}")
    show(table)
    total = sum(entry.size for entry in manifest.files.values())
    print(plain(f"recipe {manifest.recipe.name}, {total / 1e6:.1f} MB in all"))
    for artifact in manifest.artifacts:
        worst = artifact.largest_weight_error
        if worst is not None:
            print(plain(f"largest weight error of {artifact.stage}: "
                        f"{worst.relative_error:.2%}, {worst.tensor}"))  # fmt: skip
    for artifact in manifest.artifacts:
        if artifact.bytes_per_token is not None:
            read = artifact.bytes_per_token / 1e6
            print(plain(f"a token reads {read:.1f} MB of weights in {artifact.path}"))
    if manifest.recipe.kv_cache != "fp32":
        print(plain(f"keys and values are {manifest.recipe.kv_cache}"))
    for engine, settings in _memory(bundle).items():
        peaks = ", ".join(f"{peak:.0f} MB ({name})" for name, peak in settings.items())
        print(plain(f"engine {engine} takes {peaks}"))
    if manifest.spec.draws:
        from mobilevlm.runtime.memory.estimate import drawing_bytes

        print(plain(f"drawing takes {drawing_bytes(manifest) / 1e6:.0f} MB more"))
    if not manifest.quality.measured:
        print(plain(f"quality not measured: {manifest.quality.note}"))
        return
    if manifest.quality.note:
        print(plain(f"not measured: {manifest.quality.note}"))
    quality = Table((Column("stage", True), Column("figure", True), Column("value", True, True)))
    for name, measured in manifest.quality.stages.items():
        for figure, value in measured.figures.items():
            quality.add(name, figure, f"{value:.4g}")
    show(quality)


def _memory(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Megabytes at the peak of a question about an image, by engine and setting of memory."""
    from mobilevlm.errors import BundleError
    from mobilevlm.plan import ENGINES, Plan, choose_engine, memory_settings
    from mobilevlm.runtime.memory.estimate import estimate

    found: dict[str, dict[str, float]] = {}
    for engine in ENGINES:
        try:
            choose_engine(bundle, engine)
        except BundleError:
            continue
        found[engine] = {
            setting: round(estimate(bundle.manifest, Plan(engine, memory=setting)).peak / 1e6, 1)
            for setting in memory_settings(engine)
        }
    return found


def _show_gguf(path: Path, as_json: bool) -> None:
    from mobilevlm.console.tables import Column, Table, show
    from mobilevlm.errors import BundleError
    from mobilevlm.gguf.file import read_gguf
    from mobilevlm.gguf.keys import check_keys
    from mobilevlm.gguf.model import checked_decoder
    from mobilevlm.gguf.pair import known_to_llama_alone, projector_name
    from mobilevlm.plain_types import to_dict

    file = read_gguf(path)
    spec, obstacle, alone = None, None, known_to_llama_alone(file)
    projector = projector_name(file) if file.architecture == "clip" else None
    try:
        if not alone and file.architecture == "clip":
            check_keys(file, "encoder")
        elif not alone:
            spec = to_dict(checked_decoder(file))
    except BundleError as error:
        obstacle = str(error)
    types: dict[str, list[int]] = {}
    for tensor in file.tensors.values():
        count = types.setdefault(tensor.type, [0, 0])
        count[0] += 1
        count[1] += tensor.size
    if as_json:
        show_json(
            {
                "architecture": _short(file.architecture),
                "projector": None if projector is None else _short(projector),
                "llama_cpp_alone": alone,
                "decoder": spec,
                "obstacle": _printable(obstacle) if obstacle else None,
                "metadata": {
                    _printable(key): _short(value) for key, value in file.metadata.items()
                },
                "tensors": {
                    _printable(name): {"type": tensor.type, "shape": tensor.shape}
                    for name, tensor in file.tensors.items()
                },
            }
        )
        return
    table = Table((Column("key", whole=True), Column("value")))
    for key, value in file.metadata.items():
        table.add(_printable(key), str(_short(value)))
    show(table)
    table = Table((Column("type"), Column("tensors", True, True), Column("MB", True, True)))
    for kind, (number, size) in types.items():
        table.add(kind, str(number), f"{size / 1e6:.1f}")
    show(table)
    shown = f"architecture {_short(file.architecture) or '?'}"
    if projector is not None:
        shown += f", projector {_short(projector) or '?'}"
    print(plain(shown))
    if alone:
        print("not a family of this program: engine gguf runs it if llama.cpp can, no export does")
    if spec is not None:
        print("decoder  " + ", ".join(f"{key} {value}" for key, value in spec.items()))
    if obstacle:
        print(plain(f"cannot be run or exported: {_printable(obstacle)}"))


def _short(value: Any) -> Any:
    """A list as its length, a long text as its beginning."""
    if isinstance(value, list):
        return [_short(item) for item in value] if len(value) <= 8 else f"{len(value)} values"
    if not isinstance(value, str):
        return value
    return _printable(value if len(value) <= 80 else f"{value[:80]}…")


def _printable(text: str) -> str:
    """Without what would move the cursor or cannot be encoded: the file may be anyone's."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _is_checkpoint(path: Path) -> bool:
    """Return whether it is a checkpoint folder, or an adapter without a config.json of its own."""
    from mobilevlm.adapters.adapter import folder_kind
    from mobilevlm.bundle import is_bundle

    if not path.is_dir() or is_bundle(path):
        return False
    return (path / "config.json").is_file() or folder_kind(path) is not None


def _show_checkpoint(path: Path, origin: dict[str, Any], as_json: bool) -> None:
    from mobilevlm.console.tables import Column, Table, show
    from mobilevlm.families import open_checkpoint
    from mobilevlm.model import OpenOptions
    from mobilevlm.plain_types import to_dict

    model = open_checkpoint(path, OpenOptions(**origin))
    sizes = {
        stage: sum(model.weights.size(name) for name in model.weights if name.startswith(stage))
        for stage in ("vision", "projector", "decoder")
    }
    activated = _activated(model)
    if as_json:
        parameters = {**sizes, "activated": activated}
        show_json({"spec": to_dict(model.spec), "parameters": parameters})
        return
    show(_spec_table(to_dict(model.spec)))
    table = Table((Column("part", whole=True), Column("parameters", whole=True, right=True)))
    for part, size in {**sizes, "total": sum(sizes.values()), "activated": activated}.items():
        table.add(part, f"{size / 1e6:.1f} M")
    show(table)


def _show_experts(
    path: Path, origin: dict[str, Any], data: str, engine: str, as_json: bool
) -> None:
    from mobilevlm.console import progress
    from mobilevlm.errors import MobileVLMError, require

    try:
        from mobilevlm.export.calibration.samples import held_out_samples
        from mobilevlm.export.experts.table import UsageReport, usage_table
        from mobilevlm.export.experts.usage import bundle_usage, checkpoint_usage
    except ImportError as error:
        raise require(error.name or "safetensors", "export", "showing experts") from None
    from mobilevlm.console.tables import show
    from mobilevlm.families import open_checkpoint
    from mobilevlm.model import OpenOptions
    from mobilevlm.runtime import load

    if path.suffix == ".gguf":
        raise MobileVLMError(f"{path}: --experts needs a bundle or a checkpoint folder")
    progress.enable()
    samples = held_out_samples(data)
    with progress.track("samples", len(samples)) as advance:
        if _is_checkpoint(path):
            model = open_checkpoint(path, OpenOptions(**origin))
            spec, source = model.spec, "float32 reference"
            layers = checkpoint_usage(model, samples, advance)
        else:
            with load(path, engine) as vlm:
                spec = vlm.spec
                source = f"recipe {vlm.bundle.manifest.recipe.name}, engine {vlm.engine}"
                layers = bundle_usage(vlm, samples, advance)
    assert spec.decoder.experts is not None
    subtitle = f"{len(samples)} samples of {Path(data).name}"
    usage = UsageReport(f"{spec.name}, {source}", subtitle, spec.decoder.experts.top_k, layers)
    if as_json:
        show_json({"model": spec.name, "source": source, "data": data, **usage.to_dict()})
    else:
        show(usage_table(usage))


def _activated(model: Model) -> int:
    """Parameters that one token needs, all stages: of sparse experts those that it uses."""
    decoder, total = model.spec.decoder, 0
    for name in model.weights:
        size = model.weights.size(name)
        if decoder.experts is not None and ".mlp.experts." in name:
            layer = int(name.split(".")[2])
            size = size * decoder.experts.top_k // decoder.num_experts(layer)
        total += size
    return total


def _spec_table(spec: dict[str, Any]) -> Table:
    """Return each part of the spec in a row, without the chat template and what is unset."""
    from mobilevlm.console.tables import Column, Table

    table = Table((Column("part", whole=True), Column("settings")))
    table.add("model", f"{spec['name']} (family {spec['family']})")
    parts = [
        (f"{kind} {name}", part)
        for kind, inputs in spec["inputs"].items()
        for name, part in inputs.items()
    ]
    for name, part in [*parts, ("decoder", spec["decoder"])]:
        said = (f"{key} {value}" for key, value in part.items() if value is not None)
        table.add(name, ", ".join(said))
    return table
