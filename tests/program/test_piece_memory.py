"""What a piece holds at once is what its tensors say, counted while it runs."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.graph.nodes import fake_value
from sparda_compile.program.lower import lower
from sparda_compile.program.piece_memory import num_bytes, piece_bytes
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, concrete
from sparda_compile.testing import build


def pieces_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = optimize(build(name), SpardaConfig(mode="query", top_k=2, local_blocks=1))
    return lower(fast.programs.latest_plan("prefill").graph_module, "eager").pieces()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3"])
def test_a_piece_holds_what_was_worked_out(name, batch, counted_bytes):
    tokens = 300
    for piece in pieces_of(name):
        given = [BATCH_SIZE, NUM_TOKENS]
        sizes = [batch if size == given[0] else tokens for size in piece.sizes]
        inputs = [
            torch.ones(concrete(fake_value(n).shape, batch, tokens), dtype=fake_value(n).dtype)
            for n in piece.inputs
        ]
        with torch.no_grad(), counted_bytes(inputs) as counted:
            results = piece.graph_module.forward(*sizes, *inputs)
        del results
        want = piece_bytes(piece, "eager", batch, tokens)
        # What one node makes and drops again inside is not known.
        assert 0.95 * want <= counted.peak <= 1.35 * want


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_compiled_piece_holds_less(name):
    for piece in pieces_of(name):
        results = sum(num_bytes(fake_value(node), 1, 300) for node in piece.outputs)
        fused = piece_bytes(piece, "inductor", 1, 300)
        assert results <= fused < piece_bytes(piece, "eager", 1, 300)
