"""Which variants of a piece are compiled, and which one runs."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx
from torch._inductor import async_compile

from sparda_compile.errors import PassError
from sparda_compile.program import compiled_piece
from sparda_compile.program.compiled_piece import CompiledPiece, start_compiler
from sparda_compile.sizes import NUM_TOKENS, SAMPLES

T = sympy.Symbol("T", positive=True, integer=True)


def doubling():
    """Return a piece of the size of a prompt and a tensor [1, T]."""
    graph = fx.Graph()
    graph.placeholder(NUM_TOKENS)
    x = graph.placeholder("in_0")
    graph.output((graph.call_method("mul", (x, 2)),))
    values = (torch.empty(1, SAMPLES.tokens),)
    return CompiledPiece("piece_of_a_test", fx.GraphModule({}, graph), (NUM_TOKENS,), values)


@pytest.fixture
def compiled(monkeypatch):
    """Let variants be for prompts up to the number that they are compiled with; note these."""
    sizes = []

    def compile_one(graph_module, given, values):
        sizes.append(given[NUM_TOKENS])
        guards = compiled_piece._Guards((given[NUM_TOKENS] >= T,), {NUM_TOKENS: T})
        return (lambda *_, number=given[NUM_TOKENS]: number), guards

    monkeypatch.setattr(compiled_piece, "_compile", compile_one)
    monkeypatch.setitem(compiled_piece._EXAMPLE, NUM_TOKENS, 100)
    return sizes


def test_a_variant_is_compiled_where_no_other_fits_and_found_again(compiled):
    piece = doubling()
    piece.compile()
    piece.compile()
    assert [piece(n) for n in (7, 100, 300, 100, 200, 300, 400)] == [
        100, 100, 300, 100, 300, 300, 400
    ]  # fmt: skip
    assert compiled == [100, 300, 400]
    assert piece.num_variants == 3


def test_nothing_is_compiled_before_it_is_called_or_asked_for(compiled):
    piece = doubling()
    assert piece.num_variants == 0
    piece(5)
    assert compiled == [100]


def test_a_variant_that_refuses_what_it_was_compiled_for_is_an_error(monkeypatch):
    guards = compiled_piece._Guards((T > 10**9,), {NUM_TOKENS: T})
    monkeypatch.setattr(compiled_piece, "_compile", lambda *_: (None, guards))
    with pytest.raises(PassError, match="piece_of_a_test was compiled for"):
        doubling().compile()


def test_one_variant_serves_every_prompt():
    """Also one of so many tokens that an index needs 64 bits, and one of a single token."""
    piece = doubling()
    for number in (3, 1, 1000, 2):
        x = torch.randn(1, number)
        (got,) = piece(number, x)
        torch.testing.assert_close(got, x * 2)
    assert piece.num_variants == 1
    guards = piece._variants[0][1]
    assert all(guards.hold({NUM_TOKENS: number}) for number in (1, 1 << 17, 1 << 24))


def test_a_compiler_is_started_for_a_gpu_alone(monkeypatch):
    started = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(True))
    start_compiler(torch.device("cpu"))
    assert not started
    start_compiler(torch.device("cuda"))
    assert started == [True]
