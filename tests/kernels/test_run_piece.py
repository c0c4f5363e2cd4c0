"""A piece runs on the stream that it is told, and writes the op's result there."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.errors import PassError
from sparda_compile.graph.emit import propagate
from sparda_compile.graph.pure_part import cut_out
from sparda_compile.graph.side_piece import add_side_piece
from sparda_compile.isa.define import implementation
from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.isa.streams import SELECT
from sparda_compile.kernels.run_piece import running
from sparda_compile.sizes import BATCH_SIZE, SAMPLES

OP = torch.ops.sparda.run_piece.default


@pytest.fixture
def piece():
    """Return the name of (x @ weight.T).view(batch, 2, 3), of two inputs in half precision."""
    graph = fx.Graph()
    batch = graph.placeholder(BATCH_SIZE)
    batch.meta["val"] = SAMPLES.batch
    x, weight = (graph.placeholder(name) for name in ("x", "weight"))
    with FakeTensorMode():
        x.meta["val"] = torch.empty(SAMPLES.batch, 4, dtype=torch.float16)
        weight.meta["val"] = torch.empty(6, 4, dtype=torch.float16)
    product = graph.call_function(torch.nn.functional.linear, (x, weight))
    product.meta["val"] = propagate(product)
    heads = graph.call_method("view", (product, batch, 2, 3))
    heads.meta["val"] = propagate(heads)
    return add_side_piece(cut_out([product, heads], [heads])).name


def arguments(piece, batch=5):
    generator = torch.Generator().manual_seed(batch)
    x, weight = (torch.randn(n, 4, generator=generator).half() for n in (batch, 6))
    return ([x, weight], [batch], [batch, 2, 3], piece), (x @ weight.T).view(batch, 2, 3)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("function", [OP, implementation(OP)])
def test_it_computes_what_its_nodes_did(piece, function, batch):
    given, want = arguments(piece, batch)
    got = function(*given)
    assert got.dtype == torch.float16
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_it_runs_when_its_stream_does(piece):
    given, want = arguments(piece)
    with use_engine(DeferredEngine()) as engine:
        got = implementation(OP)(*given, stream=SELECT)
        got.fill_(-7.0)
        assert engine.num_pending == 1
        engine.record(0, SELECT)
        engine.wait(0)
        assert engine.num_pending == 0
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_another_function_takes_sizes_inputs_and_result(piece):
    given, _ = arguments(piece)
    seen = []
    result = running(lambda *args: seen.extend(args))(*given)
    assert seen[0] == 5
    assert [each is other for each, other in zip(seen[1:3], given[0], strict=True)] == [True] * 2
    assert seen[3] is result
    assert result.shape == (5, 2, 3)


def test_an_unknown_piece_is_refused(piece):
    (inputs, sizes, shape, _), _ = arguments(piece)
    with pytest.raises(PassError, match="names no piece of this process"):
        implementation(OP)(inputs, sizes, shape, "piece_of_nobody")
