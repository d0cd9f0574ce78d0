"""An arm64 Debian root with Python and the base install's dependencies, made once in the cache.

apt resolves and downloads for arm64 with lists of its own, so the machine's package system stays as
it is; nothing is configured, only unpacked. The dependencies are the wheels that an Arm board gets.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mobilevlm.bundle import cache_folder
from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError

CHECKOUT = Path(__file__).resolve().parents[2]
QEMU = "qemu-aarch64-static"
PYTHON = "usr/bin/python3.11"
"""Debian bookworm's, inside the root"""
INSTALLED = "usr/lib/python3/dist-packages"
"""Folder in which that Python looks for packages"""
PACKAGES = ("python3", "libstdc++6")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
"""Names of wheels for Linux whose glibc is not newer than the root's 2.36"""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT = """\
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
"""
SOURCES = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian bookworm main\n"


def missing_tools() -> str:
    """Name the tools to install before a root can be made and used; empty if none."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "a Debian or Ubuntu system is needed, for apt-get and dpkg-deb"
    if shutil.which(QEMU) is None or not KEYRING.is_file():
        return "apt-get install qemu-user-static debian-archive-keyring"
    return ""


def root_folder() -> Path:
    """Return the folder of the root, made or not; its name changes with what is installed."""
    constraints = (CHECKOUT / "constraints.txt").read_bytes()
    text = "\n".join((APT, SOURCES, PYTHON, *PACKAGES, *PLATFORMS, *_requirements()))
    digest = hashlib.sha256(text.encode() + constraints).hexdigest()
    return cache_folder() / "arm64" / f"root-{digest[:12]}"


def make_root(root: Path) -> Path:
    """The root, made where it is not there yet: about a minute, 100 MB of downloads, 300 MB.

    Raises:
        MobileVLMError: a tool is missing, or one fails; then nothing is left behind.
    """
    if root.is_dir():
        return root
    missing = missing_tools()
    if missing:
        raise MobileVLMError(f"no arm64 root can be made here: {missing}")
    progress.say(f"root        is made once, in {root}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".root-") as folder:
        made = Path(folder) / "root"
        made.mkdir()
        for package in _debian_packages(Path(folder)):
            _run("dpkg-deb", "-x", package, made)
        _install_wheels(made / INSTALLED)
        if not root.is_dir():  # another process may have been quicker
            made.rename(root)
    return root


def _requirements() -> list[str]:
    """Return the requirements of a base install."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    return setup["options"]["install_requires"].split("\n")[1:]


def _debian_packages(folder: Path) -> list[Path]:
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(SOURCES)
    (folder / "apt.conf").write_text(APT.format(folder=folder))
    alone = {"APT_CONFIG": str(folder / "apt.conf")}
    _run("apt-get", "update", "--quiet", **alone)
    install = ("apt-get", "install", "--yes", "--quiet", "--download-only")
    _run(*install, "--no-install-recommends", *PACKAGES, **alone)
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _install_wheels(folder: Path) -> None:
    platforms = [f"--platform={name}_aarch64" for name in PLATFORMS]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--target", folder, "--upgrade", "--only-binary=:all:", "--implementation=cp",
        "--python-version=3.11", *platforms, "-c", CHECKOUT / "constraints.txt", *_requirements(),
    )  # fmt: skip


def _run(*command: object, **environment: str) -> None:
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MobileVLMError(f"making an arm64 root: {command[0]} failed: {last:.200}")
