"""Files of a release and of GitHub: they agree with setup.cfg, the Makefile and each other."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest

from mobilevlm._version import __version__

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(
    path
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    if path.name != "config.yml"
)
INPUTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(read(path)["jobs"].values())
    return found


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def classifiers() -> list[str]:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    text = config["metadata"]["classifiers"]
    return re.findall(r"Programming Language :: Python :: (3\.\d+)", text)


def test_workflows_exist_for_lint_tests_and_arm64() -> None:
    assert {"lint", "tests", "arm64"} <= {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_only_targets_that_the_makefile_has(path: Path) -> None:
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "permissions", "jobs"} <= set(read(path))
    commands = [step["run"] for job in jobs(path) for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        called = re.fullmatch(r"make ([a-z]+)(?: [A-Z]+=\S+)*", command.strip())
        assert called, f"{path.name}: {command!r} is not one make target"
        assert called[1] in make_targets(), f"{path.name}: no target {called[1]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_checks_out_the_code_first_and_has_a_time_limit(path: Path) -> None:
    for job in jobs(path):
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        assert job["timeout-minutes"] > 0


def test_tests_run_on_every_python_version_that_setup_cfg_names() -> None:
    tests = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]
    assert tests["strategy"]["matrix"]["python"] == classifiers()
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    assert config["options"]["python_requires"] == f">={classifiers()[0]}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_the_fields_that_github_needs(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    names = [item["id"] for item in form["body"] if item["type"] != "markdown"]
    assert len(names) == len(set(names)) > 0
    for item in form["body"]:
        assert item["type"] in INPUTS
        assert item["attributes"]["label"]


def test_the_version_is_the_same_in_the_package_the_citation_and_the_changelog() -> None:
    assert read(ROOT / "CITATION.cff")["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert first is not None
    assert first[1] == __version__


def test_ci_builds_the_wheel_and_asks_it_a_question() -> None:
    assert "\nmake dist\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ndist:")[2].partition("\n\n")[0]
    for step in ("-m build", "-m twine check --strict", ".ci/wheel"):
        assert step in recipe
