"""What may run on some tokens at a time is proved, and what may not is found out."""

from __future__ import annotations

import warnings

import pytest
import torch
from hand_written import Written

from sparda_compile import SpardaConfig, optimize
from sparda_compile.program.lower import lower
from sparda_compile.program.pieces import make_piece
from sparda_compile.program.token_wise import token_dims
from sparda_compile.sizes import SAMPLES
from sparda_compile.testing import TINY_MODELS, build, tiny_llama

B, T = SAMPLES.batch, SAMPLES.tokens
CONFIG = SpardaConfig(mode="query", top_k=2, local_blocks=1, block_size=16, lowering="eager")


class Piece(Written):
    """A piece written by hand."""

    def dims(self, *outputs):
        return token_dims(make_piece(self.nodes, outputs))


def test_a_layer_treats_each_token_for_itself():
    written = Piece()
    x, w = written.input("x", B, T, 8), written.input("w", 24, 8)
    wide = written.function(torch._C._nn.linear, x, w, None)
    normed = written.method("div", wide, written.method("mean", wide, -1, keepdim=True))
    heads = written.method("transpose", written.method("unflatten", normed, -1, (4, 6)), 1, 2)
    dims = written.dims(normed, heads)
    assert dims.reason == ""
    assert (dims.inputs, dims.outputs) == ((1, None), (1, 2))


MIXING = {
    "sum": lambda w, x: w.method("sub", x, w.method("mean", x, 1, keepdim=True)),
    "running": lambda w, x: w.method("cumsum", x, 1),
    "reversed": lambda w, x: w.method("flip", x, 1),
    "shifted": lambda w, x: w.method("roll", x, 1, 1),
    "softmax": lambda w, x: w.method("softmax", x, 1),
    "first": lambda w, x: w.function(
        torch.ops.aten.slice.Tensor, x, 1, 0, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_found(name):
    written = Piece()
    out = MIXING[name](written, written.input("x", B, T, 8))
    assert f"{out.name} of some tokens depends on others" == written.dims(out).reason


def test_the_last_tokens_alone_may_decide():
    written = Piece()
    out = written.function(torch.ops.aten.slice.Tensor, written.input("x", B, T, 8), 1, -1)
    assert written.dims(out).outputs == (None,)


def test_a_count_of_the_tokens_is_found():
    written = Piece()
    tokens, x = written.size(), written.input("x", B, T)
    out = written.method("add", x, written.function(torch.arange, tokens))
    assert "depends on others" in written.dims(out).reason


def test_a_switch_at_a_far_position_is_found():
    """As a rotation does that has other frequencies for a long prompt."""
    for mark in (4096, 131072):
        written = Piece()
        positions = written.input("position_ids", B, T, dtype=torch.int64)
        is_long = written.method("gt", written.method("max", positions), mark)
        out = written.method("mul", positions, is_long)
        assert "depends on others" in written.dims(out).reason
        written = Piece()
        positions = written.input("position_ids", B, T, dtype=torch.int64)
        out = written.method("mul", positions, written.method("gt", positions, mark))
        assert written.dims(out).reason == ""


def test_learned_positions_have_an_end():
    written = Piece()
    positions = written.input("position_ids", B, T, dtype=torch.int64)
    out = written.function(torch.nn.functional.embedding, positions, written.input("w", 64, 8))
    assert written.dims(out).reason == ""


@pytest.mark.parametrize("shape", [(B * T, 8), (B, T * 4), (B, T, T)])
def test_tokens_that_share_a_dimension_cannot_be_taken_apart(shape):
    written = Piece()
    out = written.method("mul", written.input("x", *shape), 2)
    assert written.dims(out).reason == "x has tokens in a dimension that they share"


def test_what_cannot_be_run_alone_is_not_proved():
    def unknown(x):
        if x.device.type == "meta":
            return x
        raise TypeError("no such kernel")

    written = Piece()
    out = written.graph.call_function(unknown, (written.input("x", B, T, 8),))
    out.meta["val"] = out.args[0].meta["val"]
    written.nodes.append(out)
    assert written.dims(out).reason == "it cannot be run alone (TypeError: no such kernel)"


def _pieces(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = optimize(model, CONFIG)
    return lower(fast.programs.latest_plan("prefill").graph_module, "eager").pieces()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_all_pieces_of_the_models(name):
    assert [token_dims(piece).reason for piece in _pieces(build(name))] == [""] * 3


def test_half_precision_is_proved_as_closely():
    assert [token_dims(piece).reason for piece in _pieces(tiny_llama().bfloat16())] == [""] * 3


def test_longrope_looks_at_all_positions():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 4.0,
        "long_factor": [4.0 + i for i in range(8)], "original_max_position_embeddings": 4096,
    }  # fmt: skip
    first, *others = _pieces(tiny_llama(rope_parameters=rope, max_position_embeddings=16384))
    assert "depends on others" in token_dims(first).reason
    assert [token_dims(piece).reason for piece in others] == [""] * 2
