"""Many exports: each of the checkpoints by each recipe or for each target, verified and measured.

A job runs the program's own verbs in processes of their own, here or on a node of a Ray cluster.
What ends one is its error, and the others go on. A journal beside the bundles keeps what is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from mobilevlm._version import __version__
from mobilevlm.builtin import is_built_in
from mobilevlm.bundle import is_bundle
from mobilevlm.console import progress
from mobilevlm.console.terminal import shown
from mobilevlm.errors import MobileVLMError
from mobilevlm.plain_types import from_dict
from mobilevlm.regular_file import read_regular
from mobilevlm.runtime.journal import Journal, JournalKind, open_journal

MOST_SPEC = 1 << 20
"""Bytes of a file that describes a matrix"""
LONGEST_ERROR = 600
"""Characters of an error in the table"""


@dataclass(frozen=True)
class Matrix:
    """Contents of SPEC.toml. Paths begin in its folder, those of options too."""

    checkpoints: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    """Names or files; none for what each target says"""
    targets: tuple[str, ...] = ()
    output: str = "bundles"
    """Folder of the bundles and the journal"""
    export: tuple[str, ...] = ()
    """More options of ``mobilevlm export``, and of the verbs below"""
    verify: tuple[str, ...] | None = ()
    """Null leaves the step out, as ``verify = false`` does."""
    bench: tuple[str, ...] | None = ()
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Options of ``export`` and ``verify`` for some of the checkpoints, such as their tower's
    folder"""


@dataclass(frozen=True)
class MatrixJob:
    """A bundle to make."""

    checkpoint: str
    recipe: str
    target: str
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    """Verbs with their options"""
    bundle: str
    folder: str
    """Folder in which paths of options begin"""
    digest: str
    """Digest of all that its result depends on"""


@dataclass(frozen=True)
class MatrixRow:
    """Result of a job."""

    digest: str
    attempt: int
    """0, or more if it failed before"""
    checkpoint: str
    recipe: str
    target: str
    bundle: str
    machine: str = ""
    megabytes: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    """Quality as ``STAGE.FIGURE``: that of ``verify``, or else of the export"""
    speed: Mapping[str, float] = field(default_factory=dict)
    """Medians of ``bench``, and peak memory in megabytes"""
    failed: str = ""
    """Verb that failed"""
    error: str = ""


JOURNAL = JournalKind(
    "mobilevlm export-matrix",
    lambda record: (str(record["digest"]), int(record["attempt"])),
    "give another output folder in SPEC.toml",
    "remove it, or give another output folder in SPEC.toml",
)

Run: TypeAlias = Callable[[Iterable[MatrixJob]], Iterator[tuple[MatrixJob, dict[str, Any]]]]
"""Runs jobs; gives each with the fields of its row."""


def read_matrix(path: Path) -> Matrix:
    """Read SPEC.toml.

    Raises:
        MobileVLMError: it cannot be read, or says something that is not known.
    """
    try:
        data = tomllib.loads(read_regular(path, MOST_SPEC).decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MobileVLMError(f"{shown(path)}: {shown(error, 200)}") from None
    for verb in ("verify", "bench"):
        if data.get(verb) is False:
            data[verb] = None
    known = [part.name for part in fields(Matrix)]
    for name in data:
        if name not in known:
            raise MobileVLMError(
                f"{shown(path)}: unknown key {shown(name, 80)!r}: expected {', '.join(known)}"
            )
    found = from_dict(Matrix, data, str(path))
    if not found.checkpoints or not (found.recipes or found.targets):
        raise MobileVLMError(f"{shown(path)}: expected checkpoints, and recipes or targets")
    if found.recipes and found.targets:
        raise MobileVLMError(
            f"{shown(path)}: a target settles the recipe: leave recipes or targets out"
        )
    for name in found.origins:
        if name not in found.checkpoints:
            raise MobileVLMError(f"{shown(path)}: origins: {shown(name, 80)!r} is no checkpoint")
    return found


def jobs_of(matrix: Matrix, folder: Path) -> list[MatrixJob]:
    """Return the jobs of a matrix whose paths begin in a folder.

    Raises:
        MobileVLMError: two jobs would write one bundle.
    """
    found: dict[str, MatrixJob] = {}
    for checkpoint in matrix.checkpoints:
        for recipe in matrix.recipes or ("",):
            for target in matrix.targets or ("",):
                job = _job(matrix, folder, checkpoint, recipe, target)
                if job.bundle in found:
                    raise MobileVLMError(
                        f"two jobs would write {shown(job.bundle)}: give checkpoints and recipes "
                        f"of different last names, each once"
                    )
                found[job.bundle] = job
    return list(found.values())


def _job(matrix: Matrix, folder: Path, checkpoint: str, recipe: str, target: str) -> MatrixJob:
    source = checkpoint if is_built_in(Path(checkpoint)) else str(folder / checkpoint)
    chosen = str(folder / recipe) if recipe.endswith(".toml") else recipe
    parts = (Path(checkpoint).name, Path(recipe).stem if recipe else "", target)
    bundle = str(folder / matrix.output / "-".join(filter(None, parts)))
    options = ["--recipe", chosen] if chosen else []
    options += ["--target", target] if target else []
    origin = matrix.origins.get(checkpoint, ())
    commands = [("export", (source, "-o", bundle, *options, *origin, *matrix.export))]
    if matrix.verify is not None:
        commands.append(("verify", (bundle, source, *origin, *matrix.verify)))
    if matrix.bench is not None:
        commands.append(("bench", (bundle, *matrix.bench)))
    said = [__version__, commands, _stamp(Path(source)), _stamp(Path(chosen))]
    digest = hashlib.sha256(json.dumps(said).encode("utf-8", "backslashreplace")).hexdigest()
    return MatrixJob(checkpoint, recipe, target, tuple(commands), bundle, str(folder), digest)


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a file or of the files in a folder; none of a name."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file), status.st_size, status.st_mtime_ns) for file, status in found]


def run_matrix(path: Path, ray: str | None = None) -> list[MatrixRow]:
    """Run the jobs of SPEC.toml that are not done, those that failed once more; return a row for
    each job. ``ray``: address of a cluster whose nodes run them.

    Raises:
        MobileVLMError: the file is wrong, another process is at it, or there is no cluster.
    """
    matrix = read_matrix(path)
    jobs = jobs_of(matrix, path.parent.absolute())
    output = path.parent.absolute() / matrix.output
    output.mkdir(parents=True, exist_ok=True)
    with open_journal(output / "matrix.journal", JOURNAL, {}) as journal:
        left = [job for job in jobs if not _is_done(journal, job)]
        if len(left) < len(jobs):
            progress.say(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done already")
        with (
            _runner(ray) as run,
            progress.track("jobs", len(jobs), done=len(jobs) - len(left), unit="jobs") as advance,
        ):
            for job, result in run(left) if left else ():
                row = MatrixRow(job.digest, _attempts(journal, job), job.checkpoint, job.recipe,
                                job.target, job.bundle, **result)  # fmt: skip
                journal.append(asdict(row))
                if row.error:
                    progress.say(f"{Path(job.bundle).name}: {row.failed}: {row.error}")
                advance(1)
        rows = [_last(journal, job) for job in jobs]
    return [row for row in rows if row is not None]


def _attempts(journal: Journal, job: MatrixJob) -> int:
    count = 0
    while (job.digest, count) in journal:
        count += 1
    return count


def _last(journal: Journal, job: MatrixJob) -> MatrixRow | None:
    """Return the row of a job's last attempt, if there was one."""
    record = journal.get((job.digest, _attempts(journal, job) - 1))
    return None if record is None else MatrixRow(**record)


def _is_done(journal: Journal, job: MatrixJob) -> bool:
    last = _last(journal, job)
    return last is not None and not last.error and is_bundle(Path(job.bundle))


@contextmanager
def _here() -> Iterator[Run]:
    yield lambda jobs: ((job, run_job(job)) for job in jobs)


def _runner(ray: str | None) -> AbstractContextManager[Run]:
    if ray is None:
        return _here()
    from mobilevlm.runtime.ray_cluster import tasks

    return tasks(ray, run_job, lambda error: {"failed": "export", "error": error})


def run_job(job: MatrixJob) -> dict[str, Any]:
    """Export a bundle, verify and measure it; return fields of its row."""
    found: dict[str, Any] = {"machine": platform.node()}
    for verb, options in job.commands:
        output, error = _run_verb(verb, options, job.folder)
        try:
            found |= _FIELDS[verb](json.loads(output))
        except ValueError:
            error = error or "it printed no JSON"
        if error:
            return {**found, "failed": verb, "error": error[:LONGEST_ERROR]}
    return found


def _run_verb(verb: str, options: tuple[str, ...], folder: str) -> tuple[str, str]:
    """Return what a verb printed, and its error or nothing."""
    command = [sys.executable, "-m", "mobilevlm", verb, *options, "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        env=environment, cwd=folder, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout, ""
    if done.returncode < 0:
        return done.stdout, f"it was ended by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    said = [line for line in lines if line.startswith("mobilevlm: error: ")]
    return done.stdout, (said or lines)[-1].removeprefix("mobilevlm: error: ")


def _of_export(data: Any) -> dict[str, Any]:
    quality = (data["quality"] or {}).get("stages", {})
    return {
        "megabytes": round(data["bytes"] / 1e6, 3),
        "figures": _flat({name: stage["figures"] for name, stage in quality.items()}),
    }


def _of_verify(data: Any) -> dict[str, Any]:
    return {"figures": _flat(data["stages"])}


def _flat(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{stage}.{name}": value for stage, figures in stages.items()
            for name, value in figures.items()}  # fmt: skip


def _of_bench(data: Any) -> dict[str, Any]:
    speed = {f"{row['name']} ({row['unit']})": row["p50"] for row in data["rows"]}
    return {"speed": {**speed, "peak memory (MB)": data["peak_memory_mb"]}}


_FIELDS = {"export": _of_export, "verify": _of_verify, "bench": _of_bench}

COLUMNS = {
    "KL": ("figures", "decoder.kl"),
    "vision error": ("figures", "vision.relative_error"),
    "first token (ms)": ("speed", "first token (ms)"),
    "decode (tokens/s)": ("speed", "decode (tokens/s)"),
    "peak memory (MB)": ("speed", "peak memory (MB)"),
}
"""Figures of the table"""


def table_lines(rows: Iterable[MatrixRow]) -> list[str]:
    """Return a Markdown table of the results."""
    names = ["checkpoint", "recipe", "target", "size (MB)", *COLUMNS, "error"]
    lines = [f"| {' | '.join(names)} |", "|---" * 3 + "|---:" * (len(COLUMNS) + 1) + "|---|"]
    for row in rows:
        values = [getattr(row, part).get(name) for part, name in COLUMNS.values()]
        figures = ["" if value is None else f"{value:.4g}" for value in (row.megabytes, *values)]
        error = f"{row.failed}: {row.error}" if row.error else ""
        cells = [row.checkpoint, row.recipe, row.target, *figures, error]
        lines.append(
            "| " + " | ".join(shown(cell, 700).replace("|", "\\|") for cell in cells) + " |"
        )
    return lines
