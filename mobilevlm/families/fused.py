"""Convolutions whose branches, batch norms and layer scales become one kernel and one bias when
they are read (RepVGG, Ding et al. 2021, section 3.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mobilevlm.checkpoint import ListedTensors
from mobilevlm.errors import CheckpointError
from mobilevlm.shards import FLOATS, Float32

Float64 = NDArray[np.float64]
BATCH_NORM_EPS = 1e-5
_STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Branch:
    """One of the paths whose sum a layer is."""

    conv: str | None
    """Module of its kernel and bias; none: what comes in goes out."""
    norm: str = ""
    """Module of the batch norm behind it."""
    factors: str = ""
    """Tensor that each channel going out is multiplied by."""
    sign: int = 1


@dataclass(frozen=True)
class FusedLayer:
    """A convolution or a linear layer as a sum of branches."""

    shape: tuple[int, ...]
    """Shape of its weight: ``(out, in / groups, size, size)`` or ``(out, in)``."""
    branches: tuple[Branch, ...]


class FusedTensors:
    """Tensors of a checkpoint (a :class:`~mobilevlm.checkpoint.TensorSource`), of which
    ``NAME.weight`` and ``NAME.bias`` of each of ``layers`` stand in place of their parts.

    Raises:
        CheckpointError: a part is missing.
    """

    def __init__(self, stored: ListedTensors, layers: Mapping[str, FusedLayer]) -> None:
        self.folder, self.files = stored.folder, stored.files
        self.stored, self.layers = stored, dict(layers)
        self._last: tuple[str, Float64, Float64] | None = None
        found = {name: self._find_parts(layer) for name, layer in layers.items()}
        self._parts = {part for parts in found.values() for part in parts}
        missing = [part for parts in found.values() for part in parts if part not in stored]
        if missing:
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]!r} is missing: the weights do not fit "
                f"config.json"
            )

    def __contains__(self, name: object) -> bool:
        is_own = name in self.stored and name not in self._parts
        return is_own or (isinstance(name, str) and self._layer(name) is not None)

    def __iter__(self) -> Iterator[str]:
        yield from (f"{name}.{leaf}" for name in self.layers for leaf in ("weight", "bias"))
        yield from (name for name in self.stored if name not in self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        layer = self._layer(name)
        if layer is None:
            return self.stored.shape(name)
        return layer.shape if name.endswith(".weight") else layer.shape[:1]

    def dtype(self, name: str) -> str:
        """Return the stored type; of a fused tensor the first that is not of floats, if any is."""
        layer = self._layer(name)
        names = [name] if layer is None else self._find_parts(layer)
        kinds = [self.stored.dtype(part) for part in names]
        return next((kind for kind in kinds if kind not in FLOATS), kinds[0])

    def read(self, name: str) -> Float32:
        layer = self._layer(name)
        if layer is None:
            return self.stored.read(name)
        module, _, leaf = name.rpartition(".")
        if self._last is None or self._last[0] != module:
            self._last = module, *self._fuse(layer)
        values = self._last[1] if leaf == "weight" else self._last[2]
        return values.astype(np.float32).reshape(self.shape(name))

    def q4_0(self, name: str) -> NDArray[np.uint8] | None:
        return None if self._layer(name) is not None else self.stored.q4_0(name)

    @cached_property
    def sha256(self) -> str:
        """Digest of all weight files, and of what is made of them."""
        digest = hashlib.sha256(self.stored.sha256.encode())
        for name, layer in sorted(self.layers.items()):
            digest.update(f"{name} {layer}\n".encode())
        return digest.hexdigest()

    def stored_names(self, names: Iterable[str]) -> set[str]:
        """Return the stored tensors that these are made of."""
        layers = {name: self._layer(name) for name in names}
        return {
            part
            for name, layer in layers.items()
            for part in ([name] if layer is None else self._find_parts(layer))
        }

    def _layer(self, name: str) -> FusedLayer | None:
        module, _, leaf = name.rpartition(".")
        return self.layers.get(module) if leaf in ("weight", "bias") else None

    def _find_parts(self, layer: FusedLayer) -> list[str]:
        """Return the names of the stored tensors that a layer is made of."""
        names: list[str] = []
        for branch in layer.branches:
            if branch.conv is not None:
                bias = f"{branch.conv}.bias"
                names += [f"{branch.conv}.weight", *([bias] if bias in self.stored else [])]
            if branch.norm:
                names += [f"{branch.norm}.{leaf}" for leaf in _STATISTICS]
            if branch.factors:
                names.append(branch.factors)
        return names

    def _fuse(self, layer: FusedLayer) -> tuple[Float64, Float64]:
        """Return kernel ``(out, in / groups, size, size)`` and bias ``(out,)``."""
        shape = (*layer.shape, 1, 1)[:4]
        kernel, bias = np.zeros(shape), np.zeros(shape[0])
        for branch in layer.branches:
            scale, shift = np.full(shape[0], float(branch.sign)), np.zeros(shape[0])
            if branch.conv is not None and f"{branch.conv}.bias" in self.stored:
                shift = self._channels(f"{branch.conv}.bias", shape[0])
            if branch.factors:
                scale = scale * self._channels(branch.factors, shape[0])
            if branch.norm:
                weight, beta, mean, variance = (
                    self._channels(f"{branch.norm}.{leaf}", shape[0]) for leaf in _STATISTICS
                )
                with np.errstate(
                    invalid="ignore"
                ):  # what is not finite is refused where it is read
                    weight = weight / np.sqrt(variance + BATCH_NORM_EPS)
                shift = (shift - mean) * weight + beta
                bias += shift * scale
                scale = scale * weight
            else:
                bias += shift * scale
            kernel += self._kernel(branch.conv, shape) * scale[:, None, None, None]
        return kernel, bias

    def _kernel(self, conv: str | None, shape: tuple[int, ...]) -> Float64:
        """Return a branch's kernel in the size of the layer's."""
        out, inputs, size, _ = shape
        if conv is None:
            kernel, channels = np.zeros(shape), np.arange(out)
            kernel[channels, channels % inputs, size // 2, size // 2] = 1
            return kernel
        name = f"{conv}.weight"
        found = (*self.stored.shape(name), 1, 1)[:4]
        height, width = found[2:] if len(found) == 4 else (0, 0)
        if found[:2] != (out, inputs) or height != width or not height % 2 or height > size:
            raise self._misshapen(name, shape)
        border = (size - height) // 2
        around = ((0, 0), (0, 0), (border, border), (border, border))
        return np.pad(self.stored.read(name).reshape(found).astype(np.float64), around)

    def _channels(self, name: str, count: int) -> Float64:
        """Return a tensor of one number for each channel."""
        shape = self.stored.shape(name)
        if shape[:1] != (count,) or any(size != 1 for size in shape[1:]):
            raise self._misshapen(name, (count,))
        return self.stored.read(name).reshape(count).astype(np.float64)

    def _misshapen(self, name: str, expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: tensor {name!r} has shape {list(self.stored.shape(name))!s:.100}, "
            f"expected {list(expected)!s:.100} from config.json"
        )
