"""``mobilevlm bench --device``: over a real SSH server, and an adb server of the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from adb_server import AdbServer, adb_server
from conftest import BundleOf, fixture_named, run_program, tree_of
from devices import device_python
from sshd import SshServer, ssh_server

OPTIONS = ("--runs", 1, "--new-tokens", 3, "--text-tokens", 9)


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


def bench(server: SshServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program("bench", *arguments, "--device", server.address, MOBILEVLM_SSH=server.client)


def test_a_bench_over_ssh_gives_what_a_bench_here_gives(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    options = (bundle, *OPTIONS, "--device-python", python, "--device-folder", there)
    done = bench(server, *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
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
    # All that was left there is below the folder.
    copied = next((there / "bundles").iterdir())
    ours = {name: data for name, data in tree_of(bundle).items() if name != "plan.json"}
    assert {name: data for name, data in tree_of(copied).items() if name in ours} == ours
    assert (there / "runtime" / "mobilevlm" / "cli" / "bench.py").is_file()
    assert not (there / "runtime" / "mobilevlm" / "export").exists()
    assert done.stderr.count("copying") == 2

    again = bench(server, *options, "-o", "md")
    assert again.returncode == 0 and "copying" not in again.stderr
    assert "| vision | ms |" in again.stdout
    assert f"Measured on {server.address}: " in again.stdout
    people = bench(server, *options)
    assert people.returncode == 0 and f"Measured on {server.address}: " in people.stdout


def test_a_picture_and_names_with_spaces_and_quotes_arrive(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    spaced = tmp_path / "a b'c"
    shutil.copytree(bundle, spaced / 'my "bundle" ü')
    image = spaced / "my picture.png"
    shutil.copy(fixture_named("llava_v1").image, image)
    done = bench(
        server, spaced / 'my "bundle" ü', *OPTIONS, "--image", image, "--json",
        "--device-python", python, "--device-folder", spaced / "there $HOME",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["visual_tokens"] == 144
    sent = spaced / "there $HOME" / "pictures" / "picture.png"
    assert sent.read_bytes() == image.read_bytes()


def test_an_error_of_the_bench_there_is_shown_as_its_one_line(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.png").write_text("no picture")
    where = ("--device-python", python, "--device-folder", tmp_path / "there")
    done = bench(server, bundle, *OPTIONS, "--image", tmp_path / "no.png", *where)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"mobilevlm: error: {server.address}: {tmp_path}/there/pictures/")
    assert "not a picture" in line and "Traceback" not in done.stderr
    done = bench(server, bundle, *OPTIONS, "--engine", "gguf", *where)
    assert done.returncode == 2 and "GGUF" in done.stderr.splitlines()[-1]


def test_throttling_there_is_told(
    server: SshServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    zone = tmp_path / "sys" / "class" / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    for name, value in (("type", "cpu-thermal"), ("temp", 84200), ("trip_point_0_type", "passive"),
                        ("trip_point_0_temp", 80000)):  # fmt: skip
        (zone / name).write_text(f"{value}\n")
    command = f"env 'MOBILEVLM_SYSFS={tmp_path / 'sys'}' '{python}'"
    options = (bundle, *OPTIONS, "--device-python", command, "--device-folder", tmp_path / "there")
    told = json.loads(bench(server, *options, "--json").stdout)["telemetry"]
    assert told["throttled"] is True
    assert told["reason"] == "0 cpu-thermal reached 84.2 °C (its trip point is 80.0)"
    assert len(told["samples"]) >= 2
    assert all(sample["celsius"] == {"0 cpu-thermal": 84.2} for sample in told["samples"])
    document = bench(server, *options, "-o", "md").stdout
    assert "Throttled: yes (0 cpu-thermal reached 84.2 °C" in document
    (zone / "temp").write_text("50000\n")
    assert "Throttled: no (no trip point reached)" in bench(server, *options, "-o", "md").stdout


def test_a_bench_over_adb_reaches_the_device_of_that_serial_number_only(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    environment = {"ADB_SERVER_SOCKET": f"tcp:127.0.0.1:{phone.port}"}
    options = ("bench", bundle, *OPTIONS, "--device-python", python, "--json")
    where = ("--device-folder", "~/files of mine")
    done = run_program(*options, *where, "--device", "adb:R58", **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"] == "adb:R58" and found["visual_tokens"] == 144
    assert {serial for serial, _ in phone.commands} == {"R58"}
    assert set(phone.requests) == {
        "host:devices", "host-serial:R58:features", "host:transport:R58",
        *(f"shell,v2,raw:{command}" for _, command in phone.commands),
    }  # fmt: skip
    assert (phone.home / "files of mine" / "runtime" / "mobilevlm").is_dir()

    count = len(phone.requests)
    refused = run_program(*options, *where, "--device", "adb", **environment)
    assert refused.returncode == 2 and refused.stdout == ""
    assert "which one? Say adb:SERIAL: connected are emulator-5554" in refused.stderr
    assert phone.requests[count:] == ["host:devices"]


def test_the_plan_beside_a_bundle_goes_with_it(
    phone: AdbServer, python: Path, bundle: Path, tmp_path: Path
) -> None:
    """It was tuned on this processor, which is the device's here."""
    mine = shutil.copytree(bundle, tmp_path / "bundle")
    assert run_program("tune", mine, "--budget", "1s", "--engine", "onnx").returncode == 0
    plan = json.loads(run_program("bench", mine, "--plan", "--json").stdout)
    environment = {"ADB_SERVER_SOCKET": f"tcp:127.0.0.1:{phone.port}"}
    done = run_program(
        "bench", mine, *OPTIONS, "--device", "adb:R58", "--device-python", python,
        "--device-folder", tmp_path / "there", "--json", **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = json.loads(run_program("bench", mine, *OPTIONS, "--json").stdout)
    assert json.loads(done.stdout)["plan"] == here["plan"]
    assert plan["bundle"] == json.loads((mine / "manifest.json").read_text())["sha256"]
    copied = next((tmp_path / "there" / "bundles").iterdir())
    assert (copied / "plan.json").read_bytes() == (mine / "plan.json").read_bytes()
