"""Counted layers survive JSON; the width inside a mixture is that of the experts at work."""

import dataclasses
import json

import pytest

from forgebook.layer_counts import CountedDecoder, LayerKind, counted_from

EXPERTS = (("mlp.experts.gate_up_proj", 4, 32, 96), ("mlp.experts.down_proj", 4, 48, 32))
DENSE = LayerKind((0,), 100, 2, (("mlp.up_proj", 32, 64), ("mlp.down_proj", 64, 32)), (), ("mlp",))
MIXTURE = LayerKind((1, 2), 200, 2, (("self_attn.q_proj", 32, 32),), EXPERTS, ("mlp", "self_attn"))
DECODER = CountedDecoder("model.layers", (DENSE, MIXTURE), (), ("model",), 5000, 320, False, True, False)


def test_json_and_back():
    assert counted_from(json.loads(json.dumps(dataclasses.asdict(DECODER)))) == DECODER
    with pytest.raises(TypeError):
        counted_from(dataclasses.asdict(DECODER) | {"heads": 4})


def test_widths_and_experts():
    assert MIXTURE.expert_parameters == 4 * 3 * 32 * 48 and DENSE.expert_parameters == 0
    assert DECODER.inner(2) == 32 + 2 * 48 and DECODER.inner(0) == 64
