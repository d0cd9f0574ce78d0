"""The Dockerfile: parsed, and its steps run in a chroot of Debian, since tests have no Docker
daemon.

The chroot takes minutes and downloads a system, so it is made where it is asked for only, by root:

    apt-get install debootstrap
    MOBILEVLM_CONTAINER=1 pytest tests/e2e/test_container.py

Its Python is Debian's 3.11, in /usr/local as the official images have theirs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(3600)
SECONDS = 1800
ASKED = os.environ.get("MOBILEVLM_CONTAINER") == "1"
NEEDED = ("debootstrap", "unshare", "chroot")
REGISTRY = ("PIP_INDEX_URL", "PIP_CERT", "http_proxy", "https_proxy", "no_proxy")
"""Variables of this machine by which pip reaches its registry"""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
MULTI_ARCHITECTURE = re.compile(r"python:3\.1[1-9]-slim( AS \w+)?")
"""Official images that there are for x86-64 and arm64."""


@dataclass(frozen=True)
class Step:
    """One instruction."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Return the words of the form that is no shell's."""
        found: list[str] = json.loads(self.text)
        return found


def steps() -> list[Step]:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    whole = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [Step(*line.split(maxsplit=1)) for line in whole if line]


def named(name: str) -> list[Step]:
    return [step for step in steps() if step.name == name]


def test_the_image_is_slim_has_another_user_and_says_whether_it_is_well() -> None:
    assert all(MULTI_ARCHITECTURE.fullmatch(step.text) for step in named("FROM"))
    names = [step.name for step in steps()]
    assert names[-1] == "CMD" and names.index("USER") < names.index("ENTRYPOINT")
    user = named("USER")[0].text
    assert any(step.text.startswith("useradd") and step.text.endswith(user)
               for step in named("RUN"))  # fmt: skip
    port = named("EXPOSE")[0].text
    assert f":{port}/health" in named("HEALTHCHECK")[0].text
    known = ["FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"]
    assert set(names) <= set(known)


def test_what_is_copied_is_there_and_nothing_else_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = [step.text.split()[:-1] for step in named("COPY") if "--from" not in step.text]
    assert ignored[0] == "*" and {name for names in copied for name in names} == sent
    assert all((ROOT / name).exists() for name in sent)


@dataclass
class Image:
    """A file system, and the state that instructions leave."""

    root: Path
    place: str = "/"
    user: str = "root"

    def inside(self, path: str) -> Path:
        """Return where a path of the image lies."""
        whole = Path(path) if path.startswith("/") else Path(self.place) / path
        return self.root / whole.relative_to("/")

    def command(self, *words: str, **environment: str) -> list[str]:
        """Return the command that runs words in the image, as its user."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        variables = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home}
        return [
            *("unshare", "--mount", "sh", "-ec", 'mount --bind /proc "$0/proc"; exec chroot "$@"'),
            *(str(self.root), f"--userspec={self.user}", str(self.root), "env", "-i"),
            *(f"{key}={value}" for key, value in (variables | environment).items()),
            *("sh", "-ec", 'cd "$0"; exec "$@"', self.place, *words),
        ]

    def copy(self, text: str, stages: dict[str, Image]) -> None:
        """Do what COPY does."""
        *names, to = text.split()
        origin = stages[names.pop(0).partition("=")[2]] if names[0].startswith("--from=") else None
        goal = self.inside(to)
        for name in names:
            source = origin.inside(name) if origin else ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "training")
                shutil.copytree(source, goal, ignore=ignore, dirs_exist_ok=True)
            else:
                goal.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, goal)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small Debian with Python; 300 MB, removed after the tests."""
    if not ASKED:
        pytest.skip("building the image takes minutes: MOBILEVLM_CONTAINER=1 does it, as root")
    assert os.geteuid() == 0, "a chroot needs root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    assert not missing, f"not installed: {', '.join(missing)} (apt-get install debootstrap)"
    root = tmp_path_factory.mktemp("base") / "root"
    system = ["--variant=minbase", "--include=python3-venv", "bookworm", str(root)]
    # In a namespace of its own: what it mounts goes with it.
    command = ["unshare", "--mount", "debootstrap", *system]
    subprocess.run(command, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    shutil.copy("/etc/resolv.conf", root / "etc")
    if CERTIFICATES.exists():  # a registry behind a proxy has one that Debian does not know
        (root / CERTIFICATES.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    python = Image(root).command("python3", "-m", "venv", "/usr/local")
    subprocess.run(python, check=True, timeout=SECONDS)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def image(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The last stage, all steps done."""
    folder, stages = tmp_path_factory.mktemp("stages"), dict[str, Image]()
    found = Image(base)
    registry = {name: os.environ[name] for name in REGISTRY if name in os.environ}
    for step in steps():
        if step.name == "FROM":
            found = Image(folder / str(len(stages)))
            stages[step.text.partition(" AS ")[2]] = found
            subprocess.run(["cp", "-a", base, found.root], check=True)
        elif step.name == "WORKDIR":
            found.place = step.text
            found.inside(".").mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            found.copy(step.text, stages)
        elif step.name == "RUN":
            command = found.command("sh", "-c", step.text, **registry)
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            assert done.returncode == 0, (step.text, done.stderr[-2000:])
        elif step.name == "USER":
            found.user = step.text
    yield found
    shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_words(port: int) -> list[str]:
    return [*named("ENTRYPOINT")[0].words, *named("CMD")[0].words, "--port", str(port)]


@dataclass(frozen=True)
class Container:
    """A started image."""

    image: Image
    port: int
    process: subprocess.Popen[bytes]

    def check(self, port: int) -> int:
        """Run the health check, as if the container's port were this one; return its status."""
        check = named("HEALTHCHECK")[0].text
        words = [word.replace(named("EXPOSE")[0].text, str(port))
                 for word in json.loads(check[check.index("CMD ") + 4 :])]  # fmt: skip
        return subprocess.run(self.image.command(*words), timeout=60).returncode


@pytest.fixture
def container(image: Image) -> Iterator[Container]:
    port = free_port()
    command = image.command(*start_words(port), MOBILEVLM_API_KEY="secret")
    with subprocess.Popen(command) as process:
        try:
            yield Container(image, port, process)
        finally:
            process.terminate()


def test_the_container_answers_on_health_and_is_not_root(container: Container) -> None:
    until = time.monotonic() + 120
    while container.check(container.port):
        assert time.monotonic() < until and container.process.poll() is None
        time.sleep(0.2)
    with urlopen(f"http://127.0.0.1:{container.port}/health", timeout=60) as response:
        assert response.status == 200
    assert container.check(free_port()) == 1
    assert Path(f"/proc/{container.process.pid}").stat().st_uid != 0


def test_without_a_key_the_container_says_how_to_give_one(image: Image) -> None:
    command = image.command(*start_words(free_port()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--api-key" in done.stderr
