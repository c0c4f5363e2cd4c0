"""The public functions for partials: those of the ops, whole in a compiled graph."""

from __future__ import annotations

import inspect

import pytest
import torch

from sparda_compile import partials
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.ops import OPS

SIZE, DIM = 16, 20


def operands():
    query, pages = torch.randn(2, 6, 1, DIM), torch.randn(2, 2, 4, 2, SIZE, DIM)
    ids = torch.arange(4, dtype=torch.int32).expand(2, 2, 4).contiguous()
    return query, pages, ids, ids, torch.tensor([63, 40], dtype=torch.int32)


def attention_without(query, pages, page_ids, block_ids, lengths, unwanted):
    """Attend to all blocks, and take the unwanted ones out again."""
    parts = partials.attend_blocks(query, pages, page_ids, block_ids, lengths, 0.3)
    whole = partials.merge_partials(*parts)
    gone = partials.merge_partials(*parts, keep=unwanted)
    return partials.remove_partial(*whole, *gone, limit=0.9)


def test_what_is_taken_out_is_as_if_it_had_not_been_there():
    query, pages, page_ids, block_ids, lengths = operands()
    unwanted = torch.tensor([False, True, False, False]).expand(2, 2, 4)
    out, lse, is_usable = attention_without(query, pages, page_ids, block_ids, lengths, unwanted)
    assert is_usable.all()
    ids = block_ids.masked_fill(unwanted, -1)
    parts = partials.attend_blocks(query, pages, page_ids, ids, lengths, 0.3)
    want, want_lse = partials.merge_partials(*parts)
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.allclose(lse, want_lse, atol=1e-5)


def test_a_compiled_program_calls_the_ops():
    called = set()

    def backend(gm, _):
        called.update(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm

    args = (*operands(), torch.tensor([True, False, False, False]).expand(2, 2, 4))
    compiled = torch.compile(attention_without, fullgraph=True, backend=backend)
    for got, want in zip(compiled(*args), attention_without(*args), strict=True):
        assert torch.equal(got, want)
    assert {f"sparda.{name}.default" for name in ("attend_blocks", "merge_partials")} <= called
    assert "sparda.remove_partial.default" in called


def test_refusals_reach_the_caller_of_a_fake_run():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        query, pages, *others = (mode.from_tensor(t) for t in operands())
        out, lse = partials.attend_blocks(query, pages, *others, 0.3)
        assert (out.shape, lse.shape) == ((2, 2, 4, 3, DIM), (2, 2, 4, 3))
        with pytest.raises(UnsupportedInputError, match="query has shape"):
            partials.attend_blocks(query[..., :3], pages, *others, 0.3)


@pytest.mark.parametrize("name", ["attend_blocks", "merge_partials", "remove_partial"])
def test_functions_take_what_the_ops_take(name):
    function = getattr(partials, name)
    schema = OPS[name]._opoverload._schema
    taken = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    assert list(taken) == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        if argument.default_value is not None:
            assert taken[argument.name] == argument.default_value
