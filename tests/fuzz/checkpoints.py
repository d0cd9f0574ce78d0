"""Checkpoint folders with wrong JSON files, weight files and archives: read whole, or refused."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mobilevlm
from fuzz.harness import Fuzzer
from fuzz.mutations import NUMBERS, VALUES, mutate_bytes, mutate_json
from mobilevlm.families import open_checkpoint
from mobilevlm.model import OpenOptions
from mobilevlm.reference.model import ReferenceModel

DATA = Path(__file__).parents[1] / "data"
FIXTURES = ("llava_v1", "mobilevlm_v2", "smolvlm2")
BOMB_BYTES = 1 << 29
"""Bytes of zeros; compressed, the archive member has a thousandth of them."""
_KEYS: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (2, 5, 2**40, 10**30),
    "vocab_size": (10**9, 2**40),
    "hidden_size": (2, 10**6, 2**40),
    "intermediate_size": (10**9,),
    "max_position_embeddings": (1, 10**9, 2**40),
    "num_attention_heads": (1, 64),
    "num_key_value_heads": (1, 10**9),
    "head_dim": (8, 10**9, "x"),
    "mm_projector_type": ("mlp999999x_gelu", "mlp3x_gelu", "ldpnet", "linear", "mlp" + "9" * 5000),
    "rope_theta": ("10000", float("nan"), -1.0, 0),
    "rope_scaling": ({"rope_type": "default"}, {"type": "yarn", "factor": 2}, {"type": []}),
    "rope_parameters": ({"rope_type": "default", "rope_theta": float("inf")}, {"rope_type": 3}),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {}, "fp8"),
    "unfreeze_mm_vision_tower": (True, "yes"),
    "mm_vision_select_layer": (10**9, -1, 0),
    "image_size": (10**6, 2**40),
    "patch_size": (1, 2**40),
    "scale_factor": (1, 3, 8, 2**40),
    "image_token_id": (0, 623, 10**9),
    "size": ({"longest_edge": 10**9}, {"longest_edge": 1}, {"height": 64}),
    "max_image_size": ({"longest_edge": 2**40}, {}),
    "image_seq_len": (0, 10**9),
    "moe": ({"moe_enable": True, "moe_mode": "dense", "num_experts": [2**40]}, []),
}
"""Values at which a reader of these keys may break."""
_SPOILED = (LookupError, ValueError, TypeError, AttributeError, OSError, zipfile.BadZipFile)
"""Raised by a mutation of a file that an earlier one has spoiled."""


@dataclass(frozen=True)
class Case:
    """A checkpoint and its tower, and where it is exported to, if it is."""

    checkpoint: Path
    tower: Path
    """Not there where the checkpoint holds its own."""
    bundle: Path | None

    @property
    def options(self) -> OpenOptions:
        return OpenOptions(self.tower if self.tower.is_dir() else None)


def prepare(folder: Path) -> None:
    """Copy the fixtures, and write an archive that unpacks to a thousand times its size."""
    for name in FIXTURES:
        for part in ("checkpoint", "vision_tower"):
            if (DATA / name / part).is_dir():
                shutil.copytree(DATA / name / part, folder / name / part)
    torch.save({"lm_head.weight": torch.zeros(4)}, folder / "small.bin")
    members = _members(folder / "small.bin")
    (data,) = (name for name in members if name.endswith("data/0"))
    with zipfile.ZipFile(folder / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if name != data:
                archive.writestr(name, content)
        with archive.open(data, "w") as member:
            for _ in range(BOMB_BYTES >> 20):
                member.write(bytes(1 << 20))


def warm(base: Path) -> None:
    """Read and export an untouched checkpoint: torch and the graph author load much at first."""
    with tempfile.TemporaryDirectory() as folder:
        for name in FIXTURES:
            parts = (base / name / "checkpoint", base / name / "vision_tower")
            attempt(Case(*parts, Path(folder) / "bundle" if name == FIXTURES[0] else None))


def mutate(base: Path, random: random.Random, scratch: Path) -> Case:
    """Copy a checkpoint and make one to three of its files wrong."""
    name = random.choice(FIXTURES)
    shutil.copytree(base / name, scratch / name)
    case = Case(
        scratch / name / "checkpoint",
        scratch / name / "vision_tower",
        scratch / "bundle" if random.random() < 0.01 else None,
    )
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(*_SPOILED):
            random.choice(_MUTATIONS)(base, random, case)
    return case


def attempt(case: Case) -> None:
    """Open the checkpoint and read every tensor as an export does; some are exported."""
    model = open_checkpoint(case.checkpoint, case.options)
    with torch.device("meta"):
        reference = ReferenceModel(model.spec)
    for name, parameter in reference.named_parameters():
        model.weights.read(name, tuple(parameter.shape))
    if case.bundle is not None:
        mobilevlm.export(
            case.checkpoint,
            case.bundle,
            recipe="fp32",
            vision_tower=case.options.vision_tower,
            measure=False,
        )


def _change_key(base: Path, random: random.Random, case: Case) -> None:
    folders = [folder for folder in (case.checkpoint, case.tower) if folder.is_dir()]
    files = [folder / "config.json" for folder in folders]
    path = random.choice([files[0], *files, *case.checkpoint.glob("*processor*.json")])
    data = _json(path)
    part = data.get(random.choice(("", "text_config", "vision_config")), data)
    key = random.choice((*_KEYS, *part))
    part[key] = random.choice((*_KEYS.get(key, ()), random.choice(NUMBERS), random.choice(VALUES)))
    path.write_text(json.dumps(data))


def _change_json(base: Path, random: random.Random, case: Case) -> None:
    paths = [*case.checkpoint.glob("*.json"), *case.tower.glob("*.json")]
    path = random.choice(sorted(paths))
    if random.random() < 0.2:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    else:
        path.write_text(json.dumps(mutate_json(random, _json(path))))


def _change_header(base: Path, random: random.Random, case: Case) -> None:
    """Change the header of a safetensors file; its length stays right."""
    path = random.choice(sorted([*case.checkpoint.glob("*.safetensors"), *_of_tower(case)]))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if random.random() < 0.3:
        entry = header[random.choice([name for name in header if name != "__metadata__"])]
        entry["dtype"] = random.choice(("F8_E4M3", "BF16", "F64", "I64", "BOOL", "U8", "F4"))
    else:
        header = mutate_json(random, header)
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


def _change_bytes(base: Path, random: random.Random, case: Case) -> None:
    paths = [*case.checkpoint.glob("*.bin"), *case.checkpoint.glob("*.safetensors")]
    path = random.choice(sorted([*paths, *_of_tower(case)]))
    path.write_bytes(mutate_bytes(random, path.read_bytes()))


def _change_archive(base: Path, random: random.Random, case: Case) -> None:
    """Change members of a .bin archive; its directory and checksums stay right."""
    path = _archive(random, case)
    members = _members(path)
    name = random.choice(sorted(members))
    pickled = next((name for name in members if name.endswith("data.pkl")), name)
    kind = random.randrange(6)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = mutate_bytes(random, members[name])
    elif kind == 2:
        members[pickled] = mutate_bytes(random, members[pickled])
    elif kind == 3:
        members[pickled] = _other_numbers(random, members[pickled])
    elif kind == 4:
        members[name] = bytes(random.choice((0, 1, 1 << 20)))
    else:
        others = random.choice(sorted(members))
        members[name], members[others] = members[others], members[name]
    _write(path, members, random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _place_archive(base: Path, random: random.Random, case: Case) -> None:
    """Put an archive of another kind in place of a shard."""
    path = _archive(random, case)
    kind = random.randrange(5)
    if kind == 0:
        shutil.copyfile(base / "bomb.bin", path)
    elif kind == 1:
        torch.save({"lm_head.weight": torch.zeros(1).expand(2**40)}, path)
    elif kind == 2:
        path.write_bytes(pickle.dumps(random.choice(VALUES)))
    elif kind == 3:
        values: tuple[object, ...] = (
            {}, [], {"x": 1}, {3: torch.zeros(2)}, torch.zeros(3), {"": {}},
        )  # fmt: skip
        torch.save(random.choice(values), path)
    else:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _move_files(base: Path, random: random.Random, case: Case) -> None:
    """Remove, exchange or cut files, or put a folder in their place."""
    files = sorted(path for path in case.checkpoint.parent.rglob("*") if path.is_file())
    path, other = random.choice(files), random.choice(files)
    kind = random.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(other.read_bytes())
    elif kind == 2:
        path.rename(path.with_name(f"{path.name}.incomplete"))
    else:
        path.unlink()
        path.mkdir()


_MUTATIONS: tuple[Callable[[Path, random.Random, Case], None], ...] = (
    _change_key, _change_key, _change_json, _change_header, _change_bytes, _change_archive,
    _change_archive, _place_archive, _move_files,
)  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError):
        return {}


def _of_tower(case: Case) -> list[Path]:
    """Return the tower's weight file, unless an earlier mutation took it away or replaced it."""
    path = case.tower / "model.safetensors"
    return [path] if path.is_file() and path.stat().st_size > 100_000 else []


def _archive(random: random.Random, case: Case) -> Path:
    """Return a .bin file, made of the safetensors file where there is none."""
    found = sorted(path for path in case.checkpoint.glob("*.bin") if zipfile.is_zipfile(path))
    if found:
        return random.choice(found)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single = case.checkpoint / "model.safetensors"
    try:
        tensors = load_file(single)
    except (SafetensorError, OSError, KeyError):
        tensors = {"lm_head.weight": torch.zeros(4)}
    if single.is_file():
        single.unlink()
    path = case.checkpoint / "pytorch_model.bin"
    torch.save(tensors, path)
    return path


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _write(path: Path, members: dict[str, bytes], kind: int) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _other_numbers(random: random.Random, pickled: bytes) -> bytes:
    """Change integers of a pickle: sizes, strides and offsets of tensors."""
    data = bytearray(pickled)
    places = [at for at in range(len(data) - 3) if data[at] in b"KMJ"]
    for at in random.sample(places, min(len(places), random.choice((1, 2, 5)))):
        size = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[data[at]]
        value = random.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size) - 1))
        data[at + 1 : at + 1 + size] = value.to_bytes(size, "little")
    return bytes(data)


FUZZER = Fuzzer(prepare, mutate, attempt, warm, seconds=15.0)
