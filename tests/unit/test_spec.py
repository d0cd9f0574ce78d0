"""ModelSpec as JSON: the way there and back, and what a wrong value says."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from conftest import Fixture

from mobilevlm.connector_spec import ConnectorSpec
from mobilevlm.decoder_spec import DecoderSpec
from mobilevlm.errors import MobileVLMError
from mobilevlm.plain_types import from_dict, to_dict
from mobilevlm.spec import ModelSpec


def test_a_spec_comes_back_from_json_unchanged(any_fixture: Fixture) -> None:
    spec = any_fixture.model.spec
    assert from_dict(ModelSpec, json.loads(json.dumps(to_dict(spec))), "spec") == spec


def test_a_spec_of_an_earlier_version_is_read(mobilevlm_v2: Fixture) -> None:
    """Before sparse experts: another name for the epsilon, and nothing beyond Llama."""
    spec = mobilevlm_v2.model.spec
    data = to_dict(spec)
    decoder = data["decoder"]
    names = [field.name for field in fields(DecoderSpec)]
    for name in names[names.index("norm") :]:
        del decoder[name]
    decoder["rms_norm_eps"] = decoder.pop("norm_eps")
    assert from_dict(ModelSpec, data, "spec") == spec


def test_unknown_keys_of_a_later_version_are_ignored(mobilevlm_v2: Fixture) -> None:
    spec = mobilevlm_v2.model.spec
    assert from_dict(ModelSpec, {**to_dict(spec), "later": 1}, "spec") == spec


WRONG = [
    ("family", 3, ": expected str, found 3"),
    ("inputs.image.encoder", [], ": expected an object"),
    ("inputs.image.encoder.patch_size", "14", ": expected int, found '14'"),
    ("inputs.image.encoder.patch_size", 14.0, ": expected int, found 14.0"),
    ("inputs.image.encoder.patch_size", True, ": expected int, found True"),
    ("inputs.image.encoder.layer_norm_eps", "small", ": expected float"),
    ("inputs.image.encoder.hidden_act", "relu", ": expected one of 'quick_gelu', 'gelu'"),
    ("inputs.image.connector.kind", ["mlp"], ": expected one of"),
    ("inputs.image.preparation.mean", [0.5, 0.5], ": expected a list"),
    ("inputs.image.preparation.mean", [0.5, 0.5, None], "[2]: expected float"),
    ("inputs.image.preparation.std", 1.0, ": expected a list"),
    ("decoder.tie_word_embeddings", 0, ": expected bool"),
    ("conversation.eos_token_ids", [2, "</s>"], "[1]: expected int"),
    ("conversation.stop_strings", "</s>", ": expected a list"),
    ("decoder", None, ": expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "message"), WRONG, ids=[row[0] + row[2] for row in WRONG]
)
def test_a_wrong_value_is_named_by_its_place(
    place: str, value: Any, message: str, mobilevlm_v2: Fixture
) -> None:
    data = json.loads(json.dumps(to_dict(mobilevlm_v2.model.spec)))
    *outer, key = place.split(".")
    target = data
    for name in outer:
        target = target[name]
    target[key] = value
    with pytest.raises(MobileVLMError) as caught:
        from_dict(ModelSpec, data, "spec")
    assert str(caught.value).startswith(f"spec.{place}{message}")
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(mobilevlm_v2: Fixture) -> None:
    data = to_dict(mobilevlm_v2.model.spec)
    del data["decoder"]["head_dim"]
    with pytest.raises(MobileVLMError, match=r"^spec\.decoder: key 'head_dim' is missing$"):
        from_dict(ModelSpec, data, "spec")


def test_an_integer_is_taken_for_a_float(mobilevlm_v2: Fixture) -> None:
    data = to_dict(mobilevlm_v2.model.spec)
    data["decoder"]["rope_theta"] = 10000
    theta = from_dict(ModelSpec, data, "spec").decoder.rope_theta
    assert theta == 10000.0 and type(theta) is float


def test_a_huge_wrong_value_is_cut_in_the_message() -> None:
    with pytest.raises(MobileVLMError) as caught:
        from_dict(ModelSpec, "x" * 10**6, "spec")
    assert len(str(caught.value)) < 200


# timm's make_divisible(C / 4, 8), computed by hand: the last rows are those where plain rounding to
# a multiple of 8 would lose more than a tenth (34 / 4 = 8.5 stays 8; 44 / 4 = 11 gives 8, so 16).
@pytest.mark.parametrize(
    ("channels", "squeezed"),
    [(2048, 512), (2560, 640), (64, 16), (32, 8), (16, 8), (34, 8), (44, 16), (80, 24)],
)
def test_squeeze_size_is_a_quarter_rounded_to_eight(channels: int, squeezed: int) -> None:
    assert ConnectorSpec("ldp", 8, channels, 2, 24, 12).squeeze_size == squeezed
