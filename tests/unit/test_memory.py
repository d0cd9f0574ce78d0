"""The estimate of a bundle's memory follows from its manifest; plans are fitted to limits."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import BundleOf

import mobilevlm
from mobilevlm.bundle import Bundle, Manifest, open_bundle
from mobilevlm.decoder_spec import DeltaSpec
from mobilevlm.errors import MemoryLimitError
from mobilevlm.plan import MemorySetting, Plan, memory_settings
from mobilevlm.recipe import LinearFormat
from mobilevlm.runtime.engines.onnx.mapped_weights import Session
from mobilevlm.runtime.memory import limits as memory_limits
from mobilevlm.runtime.memory.estimate import IN_PASSING, Memory, estimate
from mobilevlm.runtime.memory.fitting import DOUBT, fit_plan, need
from mobilevlm.runtime.memory.limits import Limit

SETTINGS: tuple[MemorySetting, ...] = ("fast", "compact", "in turn")


@pytest.fixture(scope="module")
def bundle(bundle_of: BundleOf) -> Bundle:
    return open_bundle(bundle_of("tiny", "int4"))


def with_blocks(manifest: Manifest, size: int) -> Manifest:
    """As a recipe with other blocks would say."""
    layers = replace(manifest.recipe.decoder, block_size=size)
    recipe = replace(manifest.recipe, decoder=layers, lm_head=layers, layers={})
    return replace(manifest, recipe=recipe)


def test_packed_weights_have_eight_bytes_for_each_block_of_the_recipe(bundle: Bundle) -> None:
    spec = bundle.manifest.spec.decoder
    count = spec.num_hidden_layers * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 512
    small, large = (
        estimate(with_blocks(bundle.manifest, size), Plan("onnx")).weights for size in (32, 128)
    )
    assert small - large == pytest.approx(count * (8 / 32 - 8 / 128))


def test_layers_with_a_format_of_their_own_take_its_bytes(bundle: Bundle) -> None:
    recipe = replace(bundle.manifest.recipe, layers={})
    mixed = replace(recipe, layers={"decoder.layers.0.mlp.down_proj": LinearFormat("q8")})
    plain, more = (
        estimate(replace(bundle.manifest, recipe=each), Plan("onnx")).weights
        for each in (recipe, mixed)
    )
    # q8 for q4, both in blocks of 32
    assert more - plain == pytest.approx(160 * 64 * (1 - 1 / 2))


def test_each_setting_takes_less_than_the_one_before_and_positions_take_more(
    bundle: Bundle,
) -> None:
    peaks = [estimate(bundle.manifest, Plan("onnx", memory=item)).peak for item in SETTINGS]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert memory_settings("onnx") == SETTINGS and memory_settings("gguf") == ("fast",)
    assert memory_settings("onnx", "compact") == SETTINGS[1:]
    short, long = (estimate(bundle.manifest, Plan("onnx"), count) for count in (200, 400))
    spec = bundle.manifest.spec.decoder
    assert long.states - short.states == 200 * 2 * spec.num_hidden_layers * spec.hidden_size * 4
    assert long.states + long.reserved == short.states + short.reserved


def test_loading_keeps_a_bounded_part_of_the_file_beside_the_copies(bundle_of: BundleOf) -> None:
    manifest = open_bundle(bundle_of("tiny", "fp32")).manifest
    [vision] = [part for part in manifest.artifacts if part.stage == "vision"]

    def own_and_pages(size: int) -> tuple[float, float]:
        files = {name: replace(manifest.files[name], size=size) for name in vision.files}
        large = replace(manifest, files={**manifest.files, **files})
        memory = estimate(large, Plan("onnx"))
        return memory.own, memory.mapped

    (small, some), (large, more) = own_and_pages(10**9), own_and_pages(2 * 10**9)
    assert large - small == pytest.approx(len(vision.files) * 10**9)
    assert more == some < 2 * IN_PASSING


@pytest.mark.parametrize(
    ("form", "precision", "size"),
    [("onnx", "q4", 4), ("npu", "qdq16", 1), ("npu", "qdq8", 1), ("npu", "fp32", 4),
     ("ort", "fp32", 4), ("ort", "qdq16", 1), ("gguf", "q4_0", 2)],
)  # fmt: skip
def test_keys_and_values_have_the_bytes_that_the_decoder_keeps(
    form: Literal["onnx", "gguf", "npu", "ort"], precision: str, size: int, bundle: Bundle
) -> None:
    parts = tuple(
        replace(part, format=form, precision=precision) for part in bundle.manifest.artifacts
    )
    manifest, spec = replace(bundle.manifest, artifacts=parts), bundle.manifest.spec.decoder
    engine = "ggml" if form == "gguf" else form
    states = estimate(manifest, Plan(engine), positions=200).states
    assert states == 200 * 2 * spec.num_hidden_layers * spec.hidden_size * size


def test_a_short_convolution_takes_its_last_inputs_in_place_of_keys_and_values(
    bundle: Bundle,
) -> None:
    spec = bundle.manifest.spec.decoder
    decoder = replace(spec, conv_layers=(0,), conv_kernel=4)
    manifest = replace(bundle.manifest, spec=replace(bundle.manifest.spec, decoder=decoder))
    layer = 4 * 2 * spec.num_key_value_heads * spec.cache_head_dim  # bytes of a position
    few, many = (estimate(manifest, Plan("onnx"), positions=count).states for count in (10, 200))
    assert many - few == 190 * layer * (spec.num_hidden_layers - 1)
    assert few == 10 * layer * (spec.num_hidden_layers - 1) + 4 * 3 * spec.hidden_size


def test_a_gated_delta_layer_takes_eight_copies_of_its_state(bundle: Bundle) -> None:
    """Before and after a run, and at three ends of a prompt's pieces here and in the cache."""
    spec = bundle.manifest.spec.decoder
    delta = DeltaSpec((0, 1), key_heads=2, value_heads=4, key_dim=8, value_dim=16, kernel=4)
    decoder = replace(spec, delta=delta)
    manifest = replace(bundle.manifest, spec=replace(bundle.manifest.spec, decoder=decoder))
    layer = 4 * 2 * spec.num_key_value_heads * spec.cache_head_dim  # bytes of a position
    few, many = (estimate(manifest, Plan("onnx"), positions=count).states for count in (10, 200))
    assert many - few == 190 * layer * (spec.num_hidden_layers - 2)
    state = 4 * (4 * 8 * 16 + 3 * (2 * 2 * 8 + 4 * 16))
    assert few == 10 * layer * (spec.num_hidden_layers - 2) + 2 * 8 * state


def limits_of(bundle: Bundle, kind: Any, share: float, setting: MemorySetting) -> list[Limit]:
    """A limit at this share of what a setting needs."""
    limit = Limit(kind, 0.0, "here")
    needed = sum(need(estimate(bundle.manifest, Plan("onnx", memory=setting)), limit, (0.0, 0.0)))
    return [replace(limit, size=share * needed)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["asked", "cgroup", "available"])
def test_the_first_setting_that_fits_is_chosen(
    setting: MemorySetting, kind: str, bundle: Bundle
) -> None:
    fitted = fit_plan(bundle, Plan("onnx"), limits_of(bundle, kind, 1.0001, setting))
    assert fitted.memory == setting


def test_what_a_person_asks_for_is_strict_and_a_limit_of_the_system_has_a_margin(
    bundle: Bundle,
) -> None:
    with pytest.raises(MemoryLimitError, match=r"takes \d+ MB of memory, the limit is \d+ MB"):
        fit_plan(bundle, Plan("onnx"), limits_of(bundle, "asked", 0.999, "in turn"))
    within = limits_of(bundle, "cgroup", DOUBT + 0.001, "in turn")
    assert fit_plan(bundle, Plan("onnx"), within).memory == "in turn"
    with pytest.raises(MemoryLimitError, match=r"\(here\): raise it, or export"):
        fit_plan(bundle, Plan("onnx"), limits_of(bundle, "cgroup", DOUBT - 0.001, "in turn"))
    with pytest.raises(MemoryLimitError, match="close other programs"):
        fit_plan(bundle, Plan("onnx"), limits_of(bundle, "available", 0.5, "in turn"))


def test_pages_of_files_count_only_where_a_person_asks_and_in_address_space() -> None:
    memory = Memory(30e6, 100e6, 10e6, 20e6, 50e6, 10e6, 300e6)
    sizes = {
        kind: sum(need(memory, Limit(kind, 0.0, ""), (200e6, 50e6))) / 1e6
        for kind in ("asked", "cgroup", "available", "address space", "data")
    }
    assert sizes.pop("asked") == 220
    assert sizes.pop("address space") == 200 + 160 - 32 + 10 + 300
    assert sizes.pop("data") == 50 + 160 - 32 - 20
    assert set(sizes.values()) == {160}


def fake_root(folder: Path, groups: str, limits: dict[str, str], free: str = "") -> Path:
    """Files as /proc and /sys have them."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(groups)
    if free:
        (folder / "proc/meminfo").write_text(free)
    for name, text in limits.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "512000000\n"}, [512e6]),
        ("0::/a\n", {"a/memory.max": "2000\n", "memory.max": "1000\n"}, [1000, 2000]),
        ("0::/gone\n", {"memory.max": "1000\n"}, [1000]),  # a container's own root
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "7000\n"}, [7000]),
        ("4:cpu,memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, []),
        ("0::/a\n", {"a/memory.max": "nonsense\n"}, []),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "7000\n"}, []),
    ],
)
def test_limits_of_control_groups_are_found(
    groups: str,
    limits: dict[str, str],
    expected: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_limits, "_rlimits", list)
    found = memory_limits.memory_limits(fake_root(tmp_path, groups, limits))
    assert [limit.size for limit in found] == expected
    assert all(limit.kind == "cgroup" for limit in found)


def test_free_memory_and_what_a_person_asks_for_are_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "_rlimits", list)
    free = "MemFree: 1 kB\nMemAvailable:   1000 kB\nSwapFree:   24 kB\nHugePages_Total: 0\n"
    root = fake_root(tmp_path, "", {}, free)
    found = memory_limits.memory_limits(root, asked_mb=0.5)
    assert [(limit.kind, limit.size) for limit in found] == [
        ("asked", 0.5e6),
        ("available", 1024 * 1024),
    ]
    assert memory_limits.memory_limits(tmp_path / "none") == []


@pytest.mark.parametrize("recipe", ["fp32", "fast"])
def test_settings_give_the_same_answers_and_stages_in_turn_the_same_bits_as_compact(
    recipe: str, bundle_of: BundleOf
) -> None:
    pictures = [
        np.random.default_rng(seed).integers(0, 256, (336, 336, 3), np.uint8) for seed in (0, 1)
    ]
    answers: dict[str, list[list[int]]] = {}
    logits = {}
    for setting in SETTINGS:
        plan = Plan("onnx", memory=setting)
        with mobilevlm.load(bundle_of("tiny", recipe), plan=plan) as vlm:
            assert vlm.plan.memory == setting
            answers[setting] = [
                vlm.generate(text, [picture], max_new_tokens=6, ignore_eos=True).token_ids
                for picture in (*pictures, pictures[0])
                for text in ("What is it?", "Which colour?")
            ]
            logits[setting] = vlm.prompt_logits("What is it?", pictures[:1])
    assert np.array_equal(logits["compact"], logits["in turn"])
    assert answers["compact"] == answers["in turn"]
    if recipe == "fp32":  # chunks of other lengths round 8-bit activations otherwise
        assert answers["fast"] == answers["compact"]


def test_stages_in_turn_are_never_open_together(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilevlm.runtime.engines.onnx import engine as onnx

    alive: weakref.WeakSet[Session] = weakref.WeakSet()
    most = []
    open_session = onnx.open_session

    def opened(*arguments: Any, **settings: Any) -> Session:
        session = open_session(*arguments, **settings)
        alive.add(session)
        most.append(len(alive))
        return session

    monkeypatch.setattr(onnx, "open_session", opened)
    picture = np.zeros((336, 336, 3), np.uint8)
    with mobilevlm.load(bundle_of("tiny", "int4"), plan=Plan("onnx", memory="in turn")) as vlm:
        assert not most
        for text in ("What is it?", "Which colour?"):
            vlm.generate(text, [picture], max_new_tokens=2)
        assert most == [1, 1]  # the second question needs the decoder only, which is there
    assert not alive


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        (
            "0::/a\n",
            {"a/memory.max": "1000", "a/memory.current": "700",
             "a/memory.stat": "anon 400\nactive_file 100\ninactive_file 50\n"},
            1000 - 550,
        ),
        (
            "4:memory:/a\n",
            {"memory/a/memory.limit_in_bytes": "1000", "memory/a/memory.usage_in_bytes": "700",
             "memory/a/memory.stat": "cache 9\ntotal_active_file 100\ntotal_inactive_file 50\n"},
            1000 - 550,
        ),
        ("0::/a\n", {"a/memory.max": "90000"}, 90000 - 30 * 1024),  # a group that does not tell
    ],
)  # fmt: skip
def test_what_is_left_of_a_group_counts_no_pages_of_files(
    groups: str,
    files: dict[str, str],
    left: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_limits, "_rlimits", list)
    root = fake_root(tmp_path, groups, files, "MemAvailable: 1000 kB\n")
    own = "RssAnon: 20 kB\nRssShmem: 10 kB\nVmRSS: 50 kB\n"
    if "memory.current" not in " ".join(files) and "usage" not in " ".join(files):
        (root / "proc/self/status").write_text(own)
    limits = memory_limits.memory_limits(root)
    assert memory_limits.room_left(limits, root).size == left
    (root / "proc/self/status").write_text(own)
    asked = memory_limits.memory_limits(root, asked_mb=0.06)
    assert memory_limits.room_left(asked[-1:], root).size in (0.06e6 - 50 * 1024, 1000 * 1024)
    (root / "proc/meminfo").write_text("MemAvailable: 0 kB\n")
    assert memory_limits.room_left(limits, root).size <= 0
