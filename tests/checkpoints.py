"""Copies of reference checkpoints that tests damage, and the one line that must say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fixture
from safetensors.numpy import load_file, save_file

from mobilevlm.errors import MobileVLMError
from mobilevlm.families import open_checkpoint
from mobilevlm.model import Model, OpenOptions
from mobilevlm.reference.model import ReferenceModel


@dataclass(frozen=True)
class Copy:
    """A copy of a fixture that a test damages."""

    checkpoint: Path
    tower: Path

    @property
    def config(self) -> Path:
        return self.checkpoint / "config.json"

    @property
    def weights(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def change(self, path: Path, **changes: Any) -> None:
        """Sets keys of a JSON file; ``None`` removes one."""
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    def change_tensors(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def open(self) -> Model:
        return open_checkpoint(self.checkpoint, OpenOptions(self.tower))

    def read_everything(self) -> None:
        """As an export does: opens, then reads each tensor in the shape that the spec asks for."""
        model = self.open()
        with torch.device("meta"):
            reference = ReferenceModel(model.spec)
        for name, parameter in reference.named_parameters():
            model.weights.read(name, tuple(parameter.shape))


def copy_of(fixture: Fixture, folder: Path) -> Copy:
    copy = Copy(folder / "model" / "checkpoint", folder / "towers" / "clip")
    shutil.copytree(fixture.checkpoint, copy.checkpoint)
    shutil.copytree(fixture.tower, copy.tower)
    return copy


def message_of(action: Callable[[], object], *expected: str) -> str:
    with pytest.raises(MobileVLMError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    for part in expected:
        assert part in message, f"{part!r} not in {message!r}"
    return message


def with_windows(checkpoint: Path, copy: Path) -> Path:
    """Return a copy of a checkpoint around Qwen2, all of whose layers but the first see 12
    positions."""
    shutil.copytree(checkpoint, copy)
    data = json.loads((copy / "config.json").read_text())
    windows = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    data["text_config"].update(windows)
    (copy / "config.json").write_text(json.dumps(data))
    return copy
