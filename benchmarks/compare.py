"""This runtime and its peers side by side: the same work, in turn, in one run.

    python benchmarks/compare.py nano --quick
    python benchmarks/compare.py mobilevlm_v2_1.7b --threads 2 --rounds 5 -o results/
    python benchmarks/compare.py smolvlm_500m --photo 1024x768 --recipes fast int4 -o results/
    python benchmarks/compare.py synth17 --python openvino=/venvs/ov/bin/python --only openvino
    python benchmarks/compare.py --plots results/compare.json
    python benchmarks/compare.py --targets results/compare.json

Prints the tables and writes compare.json, compare.md and, where matplotlib is installed, plots
and index.html. compare.json is written after every round: interrupted (Ctrl-C), it shows what is
there, and the same command goes on from there. benchmarks/README.md says how things are measured.
Needs the [export] extra.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison.artifacts import Artifacts
from comparison.candidates import OURS, PACKAGES, Candidate, LineUp, line_up
from comparison.measure import LENGTHS, Rounds, Samples, Schedule, measure
from comparison.profiling import profile
from comparison.quality import kl_rows
from comparison.report import as_markdown, rounds_in_words, targets
from comparison.results import Comparison, Entry, read_result, write_result
from comparison.roofline import Peaks, Work, decode_work, measure_peaks, prefill_work, vision_work
from comparison.work import PROMPT_TOKENS, Shapes
from PIL import Image

from mobilevlm.console import progress
from mobilevlm.errors import MobileVLMError
from mobilevlm.input_spec import FixedImage, SquareImages
from mobilevlm.plan import default_threads
from mobilevlm.preparation import positions_of, prepare
from mobilevlm.prompt import count_positions
from mobilevlm.runtime.machine import describe_machine
from mobilevlm.spec import ModelSpec

QUICK = Schedule(rounds=1, load_rounds=1, curve_rounds=1, lengths=(64, 256), new_tokens=16)
PHOTO = (1024, 768)
"""Width and height of the photo for models that do not make every image one square."""


@dataclass(frozen=True)
class Photo:
    """The photo that is asked about, as the model takes it."""

    size: tuple[int, int]
    """Width and height in pixels."""
    runs: tuple[int, ...]
    """Positions inside the encoder in each of its runs: one run for each tile."""
    positions: int
    """In a prompt, marks between tiles included."""


def main() -> int:
    """Exit status 2 for wrong input, with one line that says what, and 130 when interrupted."""
    arguments = parse_arguments()
    progress.enable(not arguments.quiet)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if arguments.targets:
            print("\n".join(targets(read_result(arguments.targets))).strip())
        elif arguments.plots:
            show(read_result(arguments.plots), arguments.plots.parent)
        elif arguments.checkpoint is None:
            raise MobileVLMError("which checkpoint? Give a folder, 'nano', or a name of synth")
        else:
            arguments.output.mkdir(parents=True, exist_ok=True)
            result = compare(arguments)
            show(result, arguments.output)
            if not result.finished:
                print("interrupted: the same command goes on from here", file=sys.stderr)
                return 130
    except MobileVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: no round was complete", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=Path,
        help="folder, built-in model, or a name that 'mobilevlm synth' knows",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, metavar="N", help="of the stages (5)")
    parser.add_argument("--load-rounds", type=int, metavar="N", help="of loads and memory (3)")
    parser.add_argument("--quick", action="store_true", help="one round, short curves")
    parser.add_argument(
        "--recipes", nargs="+", default=["int4"], help="ONNX bundles of ours, names or .toml files"
    )
    parser.add_argument(
        "--tuned", nargs="+", default=[], metavar="RECIPE",
        help="of these also a bundle with the plan that 'mobilevlm tune' finds",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="PEER", choices=[OURS, *PACKAGES],
        help=f"of {OURS}, {', '.join(PACKAGES)}",
    )  # fmt: skip
    parser.add_argument(
        "--match", default="", metavar="REGEX",
        help="only candidates in whose name it is found, as 'onnx (int4|fast)|q4_0 . f16'",
    )  # fmt: skip
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PYTHON",
        help="the interpreter that has a peer's package",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float, default=8.0, metavar="GB",
        help="for all processes together; larger candidates are left out (8)",
    )  # fmt: skip
    parser.add_argument(
        "--photo", type=photo_size, metavar="WxH",
        help="pixels of the photo that is asked about (the tower's size; 1024x768 for models that "
        "split images or take them as they are)",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="for the files that are made")
    parser.add_argument(
        "--plots", type=Path, metavar="JSON", help="only draw again what an earlier run measured"
    )
    parser.add_argument(
        "--targets", type=Path, metavar="JSON",
        help="only print an earlier run's tables of targets and of ratios to each peer",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true")
    return parser.parse_args()


def photo_size(text: str) -> tuple[int, int]:
    """Read ``1024x768``."""
    width, mark, height = text.partition("x")
    if not (mark and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected WxH, as 1024x768")
    return int(width), int(height)


def compare(arguments: argparse.Namespace) -> Comparison:
    """Makes the files, measures everything. An interruption ends it with the rounds that are
    complete; without one it goes on.

    Raises:
        KeyboardInterrupt: and no round is complete.
    """
    schedule = _schedule(arguments)
    artifacts = Artifacts(arguments.checkpoint, arguments.cache)
    spec = artifacts.spec
    photo = asked_about(spec, arguments.photo)
    lined = line_up(
        artifacts,
        arguments.recipes,
        arguments.tuned,
        arguments.threads,
        _pythons(arguments.python),
        lambda name: not arguments.only or name in arguments.only,
        lambda name: re.search(arguments.match, name) is not None,
        schedule.memory,
    )
    _announce(lined)
    if not lined.present:
        raise MobileVLMError("nobody takes part: " + "; ".join(a.reason for a in lined.absent))
    path = arguments.output / "compare.json"
    samples = {candidate.name: Samples() for candidate in lined.present}

    def entries() -> tuple[Entry, ...]:
        return tuple(_entry(c, samples[c.name], spec, photo, schedule) for c in lined.present)

    result = Comparison(
        model=artifacts.name,
        command=shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        threads=arguments.threads,
        rounds=0,
        machine=describe_machine() | {"packages": lined.packages},
        peaks=Peaks(0, 0, 0),
        entries=entries(),
        absent={absent.name: absent.reason for absent in lined.absent},
        planned=schedule.planned,
        done=Rounds(),
        finished=False,
    )
    if before := unfinished(path, result):
        progress.say(f"going on    after {rounds_in_words(before)} (without {path}: anew)")
        samples = {entry.name: _samples(entry) for entry in before.entries}
        result = before
    else:
        result = replace(result, peaks=measure_peaks(arguments.threads))
    assert result.done is not None
    try:
        with closing(
            measure(lined.present, _shapes(spec, photo), schedule, samples, result.done)
        ) as rounds:
            for done in rounds:
                result = replace(result, rounds=done.stages, done=done, entries=entries())
                write_result(result, path)
        profiled = f"mobilevlm onnx {Path(arguments.recipes[0]).stem}"
        if profiled in samples and isinstance(spec.image.preparation, SquareImages):
            bundle = artifacts.onnx(arguments.recipes[0]).folder
            profiles = profile(bundle, arguments.threads)
            result = replace(result, profiles=profiles, profiled=profiled)
        result = replace(result, finished=True)
        write_result(result, path)
    except KeyboardInterrupt:
        if result.done == Rounds():
            raise
    return result


def unfinished(path: Path, start: Comparison) -> Comparison | None:
    """Return the result of an interrupted run, if it was started as ``start``: same command, same
    machine, candidates with the same files."""
    if not path.exists():
        return None
    try:
        before = read_result(path)
    except MobileVLMError:
        return None
    if before.finished:
        return None

    def facts(result: Comparison) -> tuple[object, ...]:
        sizes = {entry.name: entry.rows["size"] for entry in result.entries}
        return result.command, result.machine, result.planned, sizes

    if facts(before) == facts(start):
        return before
    progress.say(f"anew        {path} was begun with other arguments, files or on another machine")
    return None


def show(result: Comparison, folder: Path) -> None:
    """Tables to stdout and compare.md; plots and a page where matplotlib is installed."""
    text = as_markdown(result)
    (folder / "compare.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        progress.say("plots       need matplotlib (pip install 'mobilevlm-edge[plots]'): "
                     f"then --plots {folder / 'compare.json'}")  # fmt: skip
        return
    from comparison.plots import write_plots

    for path in write_plots(result, folder):
        progress.say(f"written     {path}")


def _schedule(arguments: argparse.Namespace) -> Schedule:
    base = QUICK if arguments.quick else Schedule(lengths=LENGTHS)
    try:
        re.compile(arguments.match)
    except re.error as error:
        raise MobileVLMError(f"--match {arguments.match}: no regular expression: {error}") from None
    counts = (arguments.threads, arguments.rounds, arguments.load_rounds)
    if any(count is not None and count < 1 for count in counts):
        raise MobileVLMError("--threads, --rounds and --load-rounds must be 1 or more")
    return Schedule(
        rounds=arguments.rounds or base.rounds,
        load_rounds=arguments.load_rounds or base.load_rounds,
        curve_rounds=base.curve_rounds,
        lengths=base.lengths,
        new_tokens=base.new_tokens,
        threads=arguments.threads,
        memory=arguments.memory * 1e9,
    )


def _pythons(given: list[str]) -> dict[str, str]:
    found = {}
    for item in given:
        name, _, path = item.partition("=")
        if name not in PACKAGES or not Path(path).is_file():
            raise MobileVLMError(
                f"--python {item}: expected PEER=PYTHON, an interpreter for one of "
                f"{', '.join(PACKAGES)}"
            )
        found[name] = path
    return found


def _announce(lined: LineUp) -> None:
    for candidate in lined.present:
        progress.say(f"takes part  {candidate.name}")
    for absent in lined.absent:
        progress.say(f"absent      {absent.name}: {absent.reason}")


def asked_about(spec: ModelSpec, photo: tuple[int, int] | None) -> Photo:
    """Return the photo of a run: as wanted, else of the tower's size where all images are made one
    square, else :data:`PHOTO`."""
    if photo is None:
        fixed = isinstance(spec.image.preparation, FixedImage)
        photo = (spec.image.square.size,) * 2 if fixed else PHOTO
    prepared = prepare(Image.new("RGB", photo), spec.image)
    runs = tuple(positions_of(arrays, spec.image) for arrays in prepared.arrays)
    return Photo(photo, runs, count_positions(prepared.pieces))


def _shapes(spec: ModelSpec, photo: Photo) -> Shapes:
    return Shapes(
        photo=photo.size,
        tiles=len(photo.runs),
        image_size=spec.image.usual_edge,
        visual_tokens=photo.positions,
        hidden_size=spec.decoder.hidden_size,
        vocab_size=spec.decoder.vocab_size,
        context_length=spec.decoder.context_length,
    )


def _entry(
    candidate: Candidate, found: Samples, spec: ModelSpec, photo: Photo, schedule: Schedule
) -> Entry:
    middle = PROMPT_TOKENS + schedule.new_tokens // 2
    work: dict[str, Work] = {}
    if candidate.vision_bytes:
        work["encode"] = vision_work(spec, candidate.vision_bytes, photo.runs)
    if candidate.decoder_bytes:
        work["prefill"] = prefill_work(spec.decoder, PROMPT_TOKENS, candidate.decoder_bytes)
        work["decode"] = decode_work(
            spec.decoder, middle, candidate.decoder_bytes, candidate.kv_bytes
        )
    return Entry(
        name=candidate.name,
        group=candidate.group,
        rows=_fixed({**found.rows, "size": [candidate.size / 1e6], **kl_rows(candidate.weights)}),
        prefill=_fixed(found.prefill),
        decode=_fixed(found.decode),
        work=work,
        notes=tuple(found.notes),
    )


def _samples(entry: Entry) -> Samples:
    """As they are measured: what :func:`_entry` made an entry of."""
    measured = entry.rows.keys() - {"size", "kl_prefill", "kl_decode"}
    rows = {key: list(values) for key, values in entry.rows.items() if key in measured}
    prefill, decode = (
        defaultdict(list, {int(length): list(values) for length, values in curve.items()})
        for curve in (entry.prefill, entry.decode)
    )
    return Samples(defaultdict(list, rows), prefill, decode, list(entry.notes))


def _fixed(samples: Mapping[Any, list[float]]) -> dict[str, tuple[float, ...]]:
    """As they are stored: JSON's keys are strings."""
    return {str(key): tuple(values) for key, values in samples.items()}


if __name__ == "__main__":
    sys.exit(main())
