"""``mobilevlm bench`` on a device: what is copied there, and what comes back."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mobilevlm
import mobilevlm.runtime
from mobilevlm.bundle import MANIFEST, open_bundle
from mobilevlm.console import progress
from mobilevlm.errors import DeviceError, MobileVLMError, PlanWarning
from mobilevlm.gguf.file import read_gguf
from mobilevlm.plain_types import from_dict
from mobilevlm.runtime.bench.bench import BenchResult
from mobilevlm.runtime.bench.devices import open_device, quote_command
from mobilevlm.runtime.bench.devices.conversation import DeviceSession, Output, SentFile, sent_file
from mobilevlm.runtime.builtin_bundle import bundle_path
from mobilevlm.runtime.loading import check_paths
from mobilevlm.runtime.tuning.plan_file import PLAN

DISTRIBUTION = "mobilevlm-edge"
MODULES = {"pillow": "PIL"}
"""Modules of distributions with another name."""
NOT_FOR_DEVICES = {
    "mobilevlm": ("export", "reference", "nano", "runtime", "synth"),
    "mobilevlm/runtime": ("batch", "suites"),
}
"""Folders of the package that bundles are not run by; the runtime comes from its own place."""


def bench_on_device(
    name: str,
    model: Path,
    options: Sequence[str],
    *,
    engine: str = "auto",
    mmproj: Path | None = None,
    image: Path | None = None,
    python: str | None = None,
    folder: str | None = None,
) -> BenchResult:
    """Copies the runtime and a model to a device, as far as they are not there, and measures there.

    ``name``: see :func:`mobilevlm.runtime.bench.devices.open_device`. ``options``: of ``mobilevlm
    bench``, without files. ``python``: the command that starts Python there; ``folder``: where
    files go there.

    Raises:
        DeviceError: the device cannot be reached, lacks something, or the measurement failed there.
        BundleError: nothing to measure here.
    """
    pythons = () if python is None else (quote_command(python, "--device-python"),)
    device = open_device(name)
    if folder is not None and not folder.startswith(("/", "~")):
        raise DeviceError(f"--device-folder {folder!r}: expected a path that begins with / or ~")
    model = bundle_path(model, engine)
    check_paths(model, mmproj)
    copies = {"runtime": dict(runtime_files())}
    place = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()[:8]
    if mmproj is not None:
        kept = f"models/{place}"
        encoder = f"mmproj/{mmproj.name}"
        parts = {part.name: sent_file(part) for part in read_gguf(model).parts}
        copies[kept] = {**parts, encoder: sent_file(mmproj)}
        given = [f"{kept}/{model.name}", "--mmproj", f"{kept}/{encoder}"]
    else:
        kept = f"bundles/{model.resolve().name}-{place}"
        copies[kept] = bundle_files(model)
        given = [kept]
    if image is not None:
        sent = f"image{image.suffix}"
        copies["images"] = {sent: sent_file(image)}
        given += ["--image", f"images/{sent}"]
    with DeviceSession(
        device, requirements(), pythons=pythons, folders=() if folder is None else (folder,)
    ) as session:
        for place, files in copies.items():
            _copy(session, device.name, place, files)
        progress.say(f"{device.name}: measuring")
        paths = [item if item.startswith("--") else f"{session.base}/{item}" for item in given]
        found = session.run(["bench", *paths, *options, "--json"], "runtime")
    return dataclasses.replace(_result(device.name, found), device=device.name)


def runtime_files() -> Iterator[tuple[str, SentFile]]:
    """The modules that run bundles, by their names below a folder of Python's path."""
    places = {"mobilevlm": mobilevlm, "mobilevlm/runtime": mobilevlm.runtime}
    for place, package in places.items():
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if name.parts[0] in NOT_FOR_DEVICES[place]:
                continue
            yield f"{place}/{name.as_posix()}", sent_file(path)


def bundle_files(folder: Path) -> dict[str, SentFile]:
    """Those of a bundle, the manifest last: until it is there, the folder is no bundle. The plan
    that ``tune`` may have left beside it comes along.

    Raises:
        BundleError: no bundle there, or damaged.
    """
    bundle = open_bundle(folder)
    files = {
        name: SentFile(bundle.path(name), entry.size, entry.sha256)
        for name, entry in bundle.manifest.files.items()
    }
    if bundle.path(PLAN).is_file():
        files[PLAN] = sent_file(bundle.path(PLAN))
    files[MANIFEST] = sent_file(bundle.path(MANIFEST))
    return files


def requirements() -> dict[str, tuple[str, str]]:
    """Return the requirements of the base install: by distribution its module and least version.

    Raises:
        DeviceError: this program runs without having been installed.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError(
            f"--device needs to know what {DISTRIBUTION} depends on, and it is not installed here: "
            f"pip install {DISTRIBUTION}"
        ) from None
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+) *\(?>= *([0-9.]+)\)?", line)
        if match is not None:  # those of extras have a condition behind
            name = match[1].lower()
            found[name] = (MODULES.get(name, name), match[2])
    return found


def _copy(session: DeviceSession, name: str, place: str, files: Mapping[str, SentFile]) -> None:
    missing = [files[item] for item in session.missing(place, files)]
    total = sum(file.size for file in missing)
    if missing:
        where = f"{session.base}/{place}"
        progress.say(f"{name}: copying {len(missing)} files, {total / 1e6:.1f} MB, to {where}")
    with progress.track("copying", total) as advance:
        session.send(missing, advance)


def _result(name: str, output: Output) -> BenchResult:
    """Return the result that the bench on the device printed.

    Raises:
        DeviceError: it failed.
    """
    lines = [line for line in output.stderr.splitlines() if line.strip()]
    if output.code != 0:
        if output.code < 0:
            reason = f"the bench was ended by signal {-output.code}"
            if output.code == -9:
                reason += " (as the system does with a program that takes too much memory)"
            raise DeviceError(f"{name}: {reason}", 128 - output.code)
        reason = lines[-1] if lines else f"the bench ended with code {output.code}"
        if output.code != 2:  # not the device's owner's mistake: all of it is of interest
            for line in lines:
                progress.say(f"{name}: {line}")
        raise DeviceError(f"{name}: {reason.removeprefix('mobilevlm: error: ')}", output.code)
    for line in lines:
        warnings.warn(f"{name}: {line.removeprefix('mobilevlm: warning: ')}", PlanWarning, 2)
    try:
        return from_dict(BenchResult, json.loads(output.stdout), f"{name}: result")
    except (ValueError, MobileVLMError) as error:
        raise DeviceError(f"{name}: its answer cannot be read: {error}") from None
