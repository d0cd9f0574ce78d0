"""The shapes of linear layers are written once: whoever needs them agrees with the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
from comparison.roofline import projector_operations, token_operations, tower_operations
from conftest import FAMILY_FIXTURES, FIXTURES, MOE_FIXTURES, fixture_named

from mobilevlm.errors import MobileVLMError
from mobilevlm.gguf.names import Entry, decoder_entries, projector_entries, tower_entries
from mobilevlm.linear_groups import (
    LinearGroup,
    decoder_groups,
    head_group,
    linear_groups,
    projector_groups,
    tower_groups,
)
from mobilevlm.model import Model
from mobilevlm.runtime.memory.estimate import decoder_weights

LINEAR = re.compile(r"(_proj|\.fc1|\.fc2|projector\.mlp\.\d+|lm_head)\.weight$")


@pytest.fixture(scope="module", params=(*FIXTURES, *MOE_FIXTURES, *FAMILY_FIXTURES, "blip2_t5"))
def model(request: pytest.FixtureRequest) -> Model:
    return fixture_named(request.param).model


def size_of(groups: Iterable[LinearGroup]) -> int:
    return sum(group.size for group in groups)


def test_checkpoints_have_these_layers_of_these_shapes_and_no_others(model: Model) -> None:
    weights, found = model.weights, set()
    for group in linear_groups(model.spec):
        for name, shape in group.shapes.items():
            weights.check(f"{name}.weight", shape)
            assert weights.size(f"{name}.weight") == math.prod(shape)
            assert (f"{name}.bias" in weights) == group.biased, name
            found.add(f"{name}.weight")
    assert found == {name for name in weights if LINEAR.search(name)}


def test_memory_counts_the_weights_of_the_decoder(model: Model) -> None:
    spec = model.spec.decoder
    encoder, decoder = (decoder_weights(spec, stage) for stage in ("encoder", "decoder"))
    assert [*encoder, *decoder] == list(decoder_groups(spec))
    assert bool(encoder) == bool(spec.encoder_layers)


def matrices(entries: Iterable[Entry]) -> dict[str, int]:
    """Weights of the linear layers among them, by our name."""
    return {
        entry.ours: math.prod(entry.shape) * max(entry.stack, 1)
        for entry in entries
        if LINEAR.search(entry.ours)
    }


def test_gguf_files_have_the_weights_of_the_decoder(model: Model) -> None:
    spec = model.spec.decoder
    try:
        found = matrices(decoder_entries(spec))
    except MobileVLMError:
        return  # no architecture for it
    if spec.tie_word_embeddings:
        found["head"] = head_group(spec).size
    assert sum(found.values()) == size_of(decoder_groups(spec))


def test_gguf_files_have_the_weights_of_tower_and_projector(model: Model) -> None:
    image = model.spec.image
    for swapped in (False, True):
        entries = list(tower_entries(image.transformer, swapped))
        assert sum(matrices(entries).values()) == size_of(tower_groups(image.encoder))
    kinds = ("mlp", "ldp", "ldpv2", "mlp_downsample")
    if image.connector.kind in kinds and image.connector.depth == 2:
        found = matrices(projector_entries(image.connector))
        assert sum(found.values()) == size_of(projector_groups(image.connector))


def test_the_roofline_counts_two_operations_for_each_weight_that_a_token_uses(
    model: Model,
) -> None:
    spec = model.spec.decoder
    used = size_of(decoder_groups(spec))
    if spec.experts is not None:
        counts = zip(spec.experts.layers, spec.experts.num_experts, strict=True)
        mlp = spec.hidden_size * spec.intermediate_size * (len(spec.mlp_linears[0]) + 1)
        used -= sum(mlp * (count - spec.experts.top_k) for _, count in counts)
    parts = (token_operations(spec, part) for part in ("encoder", "layers", "lm_head"))
    assert sum(parts) == 2 * used


def test_the_roofline_counts_two_operations_for_each_weight_and_position_of_an_image(
    model: Model,
) -> None:
    """The difference of two sizes of MLP, which only the products with weights can see."""
    tower, connector = model.spec.image.transformer, model.spec.image.connector
    wider = replace(tower, intermediate_size=tower.intermediate_size + 1)
    more = size_of(tower_groups(wider)) - size_of(tower_groups(tower))
    assert tower_operations(wider) - tower_operations(tower) == 2 * tower.num_positions * more
    if connector.kind in ("mlp", "mlp_downsample"):
        expected = 2 * connector.num_tokens * size_of(projector_groups(connector))
        assert projector_operations(connector) == expected
