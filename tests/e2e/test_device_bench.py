"""``mobilevlm bench --device``: over a real SSH server, and an adb server of the tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adb_server import AdbServer, adb_server
from conftest import BundleOf, fixture_named, run_program, tree_of
from devices import device_python
from sshd import SshServer, ssh_server

OPTIONS = ("--runs", 1, "--new-tokens", 3, "--text-tokens", 9)

AUDITED = """\
import json, sys
seen = []
def hook(event, arguments):
    if event == "socket.connect":
        seen.append(["connect", list(arguments[1])])
    elif event == "subprocess.Popen":
        seen.append(["start", list(map(str, arguments[1]))])
    elif event in ("socket.sendto", "socket.bind", "os.system", "os.exec", "os.posix_spawn"):
        seen.append([event, []])
sys.addaudithook(hook)
from mobilevlm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(seen), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with ssh_server(tmp_path_factory.mktemp("ssh")) as running:
        yield running


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[AdbServer]:
    """Two devices at an adb server."""
    home = tmp_path / "phone"
    home.mkdir()
    with adb_server(home, **{"emulator-5554": "device", "R58": "device"}) as running:
        yield running


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the device: without this program, and without anything that exports."""
    return device_python(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf) -> Path:
    return bundle_of("tiny", "int4")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder on the device, of a name that no shell may look into."""
    return tmp_path_factory.mktemp("device") / "a b'c $HOME"


def bench(server: SshServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    where = ("--device", server.address)
    return run_program("bench", *arguments, *where, environment={"MOBILEVLM_SSH": server.client})


def audited(*arguments: object, **environment: str) -> tuple[dict[str, Any], list[list[Any]]]:
    """The object that a bench prints, every connection that it made and every program that it
    started."""
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, "bench", *map(str, arguments), "--json"],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


def test_a_bench_over_ssh_gives_what_a_bench_here_gives_and_nobody_else_hears_of_it(
    server: SshServer, python: Path, bundle: Path, there: Path
) -> None:
    where = ("--device-python", python, "--device-folder", there)
    options = (bundle, *OPTIONS, *where, "--device", server.address)
    found, seen = audited(*options, MOBILEVLM_SSH=server.client)
    [[kind, words]] = seen
    assert kind == "start" and words[:3] == ["ssh", "-F", f"{server.folder}/client"]
    assert words[-5:-1] == ["-p", str(server.port), "--", "127.0.0.1"]

    here = json.loads(run_program("bench", bundle, *OPTIONS, "--json").stdout)
    assert found["device"] == server.address and here["device"] is None
    assert found.keys() == here.keys()
    same = ("model", "recipe", "engine", "plan", "runs", "text_tokens", "visual_tokens",
            "new_tokens", "threads", "artifact_mb", "token_mb")  # fmt: skip
    assert [found[name] for name in same] == [here[name] for name in same]
    rows = [[(row["name"], row["unit"]) for row in result["rows"]] for result in (found, here)]
    assert rows[0] == rows[1]
    assert all(min(row["samples"]) > 0 for row in found["rows"])
    assert found["machine"]["processor"] == here["machine"]["processor"]

    copied = next((there / "bundles").iterdir())
    ours, theirs = tree_of(bundle), tree_of(copied)
    assert {name: theirs[name] for name in ours} == ours
    assert (there / "runtime" / "mobilevlm" / "cli" / "bench.py").is_file()
    assert not (there / "runtime" / "mobilevlm" / "export").exists()

    again = bench(server, bundle, *OPTIONS, *where, "--format", "md")
    assert again.returncode == 0 and "copying" not in again.stderr  # all is there
    assert "| vision | ms |" in again.stdout
    assert f"Measured on {server.address}: " in again.stdout


def test_a_picture_and_names_with_spaces_and_quotes_arrive(
    server: SshServer, python: Path, bundle: Path, there: Path, tmp_path: Path
) -> None:
    spaced = tmp_path / "a b'c"
    shutil.copytree(bundle, spaced / 'my "bundle" ü')
    image = spaced / "my picture.png"
    shutil.copy(fixture_named("llava_v1").image, image)
    done = bench(
        server, spaced / 'my "bundle" ü', *OPTIONS, "--image", image, "--json",
        "--device-python", python, "--device-folder", there,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["visual_tokens"] == 144
    sent = there / "images" / "image.png"
    assert sent.read_bytes() == image.read_bytes()


def test_an_error_of_the_bench_there_is_shown_as_its_one_line(
    server: SshServer, python: Path, bundle: Path, there: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.png").write_text("no picture")
    where = ("--device-python", python, "--device-folder", there)
    done = bench(server, bundle, *OPTIONS, "--image", tmp_path / "no.png", *where)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"mobilevlm: error: {server.address}: {there}/images/")
    assert "not an image" in line and "Traceback" not in done.stderr


def test_throttling_there_is_told(
    server: SshServer, python: Path, bundle: Path, there: Path, tmp_path: Path
) -> None:
    zone = tmp_path / "sys" / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    for name, value in (("type", "cpu-thermal"), ("temp", 84200), ("trip_point_0_type", "passive"),
                        ("trip_point_0_temp", 80000)):  # fmt: skip
        (zone / name).write_text(f"{value}\n")
    command = f"env 'MOBILEVLM_SYSFS={tmp_path / 'sys'}' '{python}'"
    options = (bundle, *OPTIONS, "--device-python", command, "--device-folder", there)
    told = json.loads(bench(server, *options, "--json").stdout)["telemetry"]
    assert told["throttled"] is True
    assert told["reason"] == "0 cpu-thermal reached 84.2 °C (its trip point is 80.0)"
    assert len(told["samples"]) >= 2
    assert all(sample["celsius"] == {"0 cpu-thermal": 84.2} for sample in told["samples"])
    (zone / "temp").write_text("50000\n")
    assert (
        "Throttled: no (no trip point reached)" in bench(server, *options, "--format", "md").stdout
    )


def test_a_bench_over_adb_reaches_the_device_of_that_serial_number_only(
    phone: AdbServer, python: Path, bundle: Path
) -> None:
    address = {"ADB_SERVER_SOCKET": f"tcp:127.0.0.1:{phone.port}"}
    where = ("--device-python", python, "--device-folder", "~/files of mine")
    found, seen = audited(bundle, *OPTIONS, *where, "--device", "adb:R58", **address)
    assert found["device"] == "adb:R58" and found["visual_tokens"] == 144
    assert seen == [["connect", ["127.0.0.1", phone.port]]] * 3
    assert [serial for serial, _ in phone.commands] == ["R58"]
    assert phone.requests == [
        "host:devices", "host-serial:R58:features", "host:transport:R58",
        f"shell,v2,raw:{phone.commands[0][1]}",
    ]  # fmt: skip
    assert (phone.home / "files of mine" / "runtime" / "mobilevlm").is_dir()

    refused = run_program("bench", bundle, *OPTIONS, *where, "--device", "adb", environment=address)
    assert refused.returncode == 2 and refused.stdout == ""
    assert "which one? Say adb:SERIAL: connected are emulator-5554" in refused.stderr
    assert phone.requests[4:] == ["host:devices"]
