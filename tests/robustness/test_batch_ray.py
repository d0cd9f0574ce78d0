"""``mobilevlm batch --ray`` on a real cluster of two nodes on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from mobilevlm.cli import main
from mobilevlm.nano.drawing import render
from mobilevlm.nano.scenes import sample_scene
from mobilevlm.runtime.journal import Journal

pytest.importorskip("ray")
ROWS = 40
COMMAND = ("-p", "Is there a {thing} in {image}?", "-n", "4", "--threads", "1", "--no-plan")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that computes nothing, and two nodes with a CPU each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            nodes = [started.add_node(num_cpus=1) for _ in range(2)]
            yield started, nodes
        finally:
            started.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, one of them damaged and one missing, and questions about them."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(ROWS):
        render(sample_scene(number)).save(folder / f"{number}.png")
        thing = ("star", "circle", "cat")[number % 3]
        lines.append(json.dumps({"image": f"{number}.png", "thing": thing}))
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes()[:200])
    (folder / "5.png").unlink()
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def answers(rows: Path, output: Path, *options: str) -> list[tuple[Any, ...]]:
    main(["batch", "nano", str(rows), "-o", str(output), *COMMAND, *options])
    found = map(json.loads, output.read_text().splitlines())
    return [(row["index"], row["id"], row["answer"], row["error"]) for row in found]


def test_rows_are_those_without_ray_also_when_a_node_is_killed(
    cluster: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, nodes = cluster
    expected = answers(rows, tmp_path / "plain.jsonl")
    assert sum(error is not None for *_, error in expected) == 2
    assert answers(rows, tmp_path / "ray.jsonl", "--ray", started.address) == expected
    append, done = Journal.append, []

    def append_and_kill(journal: Journal, record: dict[str, Any]) -> None:
        append(journal, record)
        done.append(record["index"])
        if len(done) == ROWS // 3:
            started.remove_node(nodes[1], allow_graceful=False)

    monkeypatch.setattr(Journal, "append", append_and_kill)
    assert answers(rows, tmp_path / "killed.jsonl", "--ray", started.address) == expected
    assert sorted(done) == list(range(ROWS))


def test_an_address_without_a_cluster_is_said_in_one_line(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("batch", "nano", rows, "-o", tmp_path / "out.jsonl", *COMMAND)
    message = refusal(capsys, *command, "--ray", "nowhere")
    assert "--ray nowhere: " in message and "ray start --head" in message
