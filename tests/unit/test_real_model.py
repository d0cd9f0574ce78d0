"""Parts of benchmarks/real_model.py that need no real weights: windows, dithering, sizes, figures,
report."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from real import checkpoint, text
from real.candidates import Candidate, Wanted, make, parse, parse_all
from real.checkpoint import dithered
from real.quality import Answer, Reference, answer_match, compare, opened, window_logits
from real.report import LEGEND, Result, Row, draw, frontier, read, table, write
from real.text import STARTS, WINDOW, Windows, cut_windows
from tokenizers import Tokenizer, models, pre_tokenizers

from mobilevlm.builtin import BUNDLES, WEIGHTS
from mobilevlm.console.tables import show
from mobilevlm.errors import MobileVLMError
from mobilevlm.prompt import Rows


def numbers() -> Tokenizer:
    """Return a tokenizer whose tokens are the numbers up to 6000, each its own id."""
    vocabulary = {str(number): number for number in range(6000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def written(path: Path, count: int) -> Path:
    path.write_text(" ".join(map(str, range(count))))
    return path


def test_windows_begin_with_the_first_id_and_lie_at_fixed_places(tmp_path: Path) -> None:
    path = written(tmp_path / "text.txt", 5000)
    windows = cut_windows(numbers(), [str(path)] * 2, 7)
    assert len(windows.ids) == 2 * len(STARTS)
    for start, window in zip(STARTS * 2, windows.ids, strict=True):
        assert window == (7, *range(start, start + WINDOW - 1))


def test_a_text_that_is_missing_or_too_short_is_named(tmp_path: Path) -> None:
    short = written(tmp_path / "short.txt", 4000)
    for name in (str(tmp_path / "none.txt"), str(short)):
        with pytest.raises(MobileVLMError, match=Path(name).name):
            cut_windows(numbers(), [name], 0)


def test_every_machine_has_two_texts_that_are_long_enough() -> None:
    for name in (*text.default_texts(), "docstrings"):
        assert len(text.read_text(name).split()) > STARTS[-1] + WINDOW


def test_without_the_gpl_docstrings_take_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text, "GPL", tmp_path / "none")
    assert text.default_texts() == ("topics", "docstrings")
    with pytest.raises(MobileVLMError, match="choose another"):
        text.read_text("gpl")


def test_dithering_stays_within_half_a_step_of_each_block() -> None:
    values = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    values[2] *= 100
    blocks: NDArray[np.uint8] = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    grid = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
    found = dithered(grid, blocks, np.random.default_rng(1)) - grid
    levels = grid.reshape(-1, 32)
    steps = (levels.max(-1) - levels.min(-1)) / 15
    share = np.abs(found).reshape(-1, 32) / steps[:, None]
    assert share.max() < 0.51 and 0.2 < share.mean() < 0.3
    assert np.array_equal(found, dithered(grid, blocks, np.random.default_rng(1)) - grid)


def test_candidates_are_recipes_types_and_bundles(tmp_path: Path) -> None:
    samples = tmp_path / "text.jsonl"
    samples.touch()
    assert parse("int4") == Wanted("int4", recipe="int4")
    assert parse("Q4_K_M") == Wanted("q4_k_m", gguf_type="q4_k_m")
    assert parse(f"q4_0+{samples}") == Wanted("q4_0+text", gguf_type="q4_0", data=samples)
    assert parse("q4_0+own") == Wanted("q4_0+own", gguf_type="q4_0", drawn="own")
    assert parse(str(BUNDLES / "nano")).bundle == BUNDLES / "nano"
    for wrong in ("int5", "q4_0+nothing.jsonl", "no/such.toml"):
        with pytest.raises(MobileVLMError, match=wrong.split("+")[0]):
            parse(wrong)
    with pytest.raises(MobileVLMError, match="two candidates are named int4"):
        parse_all(["int4", "int8", "int4"])


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    folder = tmp_path_factory.mktemp("real")
    return make(parse("fast"), WEIGHTS / "nano", folder, reuse=False)


def test_a_checkpoint_of_other_weights_or_of_other_code_has_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, code = tmp_path / "weights.gguf", tmp_path / "checkpoint.py"
    monkeypatch.setattr(checkpoint, "stored_weights", lambda: weights)
    weights.write_bytes(b"a")
    first = checkpoint.checkpoint_digest()
    assert first == checkpoint.checkpoint_digest()
    weights.write_bytes(b"b")
    second = checkpoint.checkpoint_digest()
    code.write_text(Path(checkpoint.__file__).read_text() + "# changed")
    monkeypatch.setattr(checkpoint, "__file__", str(code))
    assert len({first, second, checkpoint.checkpoint_digest()}) == 3


def test_the_float32_bundle_is_always_that_of_the_checkpoint_and_quick_where_it_is_the_same(
    tmp_path: Path,
) -> None:
    def exact(name: str) -> tuple[str, int]:
        bundle = make(Wanted("fp32"), WEIGHTS / name, tmp_path, reuse=True).bundle
        decoder = bundle.artifact("decoder", "onnx")
        return bundle.manifest.spec.name, bundle.path(decoder.path).stat().st_mtime_ns

    first, again, other = exact("nano"), exact("nano"), exact("nano-moe")
    assert first == again and (first[0], other[0]) == ("nano", "nano-moe")


def test_sizes_count_each_file_once_and_the_table_apart(fast: Candidate) -> None:
    def stored(stage: str) -> int:
        names = fast.bundle.artifact(stage, "onnx").data
        return sum(fast.bundle.path(name).stat().st_size for name in names)

    assert fast.has_prefill_graph
    sizes = fast.sizes
    assert sizes.decoder == stored("decoder") + stored("prefill")
    assert sizes.embeddings == stored("embeddings")
    assert 0.9 * stored("decoder") < sizes.token <= stored("decoder")


def test_a_model_agrees_with_itself_and_not_with_its_prefill_graph(fast: Candidate) -> None:
    windows = Windows(("random",), tuple(map(tuple, np.arange(40, 104).reshape(2, 32).tolist())))
    with opened(fast, 1) as decoder:
        logits = [window_logits(decoder, window, False) for window in windows.ids]
        first = decoder.prefill(decoder.new_state(), Rows(decoder.embed(windows.ids[0])))
        greedy = tuple(int(index) for index in first.argmax(-1))
        answers = [Answer(windows.ids[0], greedy)]
        exact = Reference(logits, answers)
        same = compare(decoder, windows, exact, False)
        other = compare(decoder, windows, exact, True)
        wrong = Answer(windows.ids[0], (greedy[0], (greedy[0] + 1) % 50, 3, 4))
        assert answer_match(decoder, wrong) <= 0.5
    assert same.figures["kl"] == 0 and same.figures["perplexity_ratio"] == 1
    assert same.figures["top1_agreement"] == same.figures["greedy_match"] == 1
    assert other.figures["kl"] > 0 and "greedy_match" not in other.figures
    assert len(other.kl_by_window) == 2


def row(name: str, kl: float, megabytes: float, group: str = "mobilevlm") -> Row:
    figures = {"kl": kl, "perplexity_ratio": 1 + kl, "top1_agreement": 0.9, "greedy_match": 0.5}
    size = round(megabytes * 1e6)
    return Row(name, group, figures, (kl,), size, size, 0, 1.0, (0.1, 0.3, 0.2), (0.01,))


def result(*rows: Row) -> Result:
    return Result("command", "model", {}, 2, ("topics", "gpl"), 8, rows)


def test_the_table_fits_80_columns_and_begins_with_the_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefill = Row("fast:prefill", "mobilevlm", row("x", 0.02, 1).figures, (0.02,))
    shown = table(result(row("q4_k_m+samples", 0.0982, 103.7), row("q8_0", 0.009, 150), prefill))
    show(shown)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:]] == ["q8_0", "fast:prefill", "q4_k_m+samples"]
    assert lines[-1].split()[1:] == [
        "1.098", "0.0982", "0.900", "0.50", "103.7", "103.7", "10.0", "200",
    ]  # fmt: skip
    assert max(map(len, LEGEND.splitlines())) <= 80


def test_a_result_is_read_as_it_was_written_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "real_model.json"
    found = result(row("int4", 0.1, 80), row("q4_k_m", 0.098, 104, "llama.cpp"))
    write(found, path)
    assert read(path) == found
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    path.write_text("[]")
    with pytest.raises(MobileVLMError, match="not a result"):
        read(path)


def test_the_frontier_leaves_out_what_another_beats() -> None:
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 2.0), (4.0, 1.0)]
    assert frontier(points) == [(1.0, 5.0), (2.0, 2.0), (3.0, 1.0)]
