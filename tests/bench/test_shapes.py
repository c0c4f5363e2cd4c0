from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.shapes import SHAPES, build_model


def test_model_has_the_shape_and_its_dtype():
    shape = SHAPES["tiny"]
    model = build_model(shape, torch.device("cpu"), torch.bfloat16)
    layer = model.model.layers[0]
    assert len(model.model.layers) == shape.num_layers
    assert layer.self_attn.k_proj.weight.shape == (shape.num_groups * shape.head_dim, shape.hidden)
    assert layer.mlp.up_proj.weight.shape == (shape.ffn, shape.hidden)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("name", "groups"), [("8b", 2), ("8b-8kv", 8)])
def test_big_shapes_have_eight_billion_weights(name, groups):
    model = build_model(SHAPES[name], torch.device("meta"), torch.bfloat16)
    count = sum(weight.numel() for weight in model.parameters())
    assert 8.0e9 < count < 9.0e9
    assert model.config.num_key_value_heads == groups
