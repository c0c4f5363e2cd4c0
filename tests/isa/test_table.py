"""The table of instructions: complete, and true to the schemas."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.isa.streams import COPY
from sparda_compile.isa.table import INSTRUCTIONS, Work, instruction_of, op_name
from sparda_compile.ops import OPS


@pytest.mark.parametrize("name", OPS)
def test_an_instruction_is_true_to_its_schema(name):
    it = INSTRUCTIONS[name]
    schema = it.op._opoverload._schema
    assert [argument[0] for argument in it.arguments] == [e.name for e in schema.arguments]
    assert it.places == {e.name: i for i, e in enumerate(schema.arguments)}
    assert (it.stream is None) == ("stream" in it.places)
    assert len(it.results) == (len(schema.returns) if len(schema.returns) > 1 else 0)
    for part in it.parts:
        assert {part.tensor, part.by} <= set(it.places)
    assert len({part.tensor for part in it.parts}) == len(it.parts)
    if it.starts or it.waits:
        assert "event" in it.places
    assert not (it.starts and it.waits)
    assert set(it.before) | set(it.behind) <= set(OPS)


def test_packets_overloads_and_others():
    overload = torch.ops.sparda.wait_blocks.default
    assert op_name(overload) == op_name(torch.ops.sparda.wait_blocks) == "wait_blocks"
    assert instruction_of(overload) is INSTRUCTIONS["wait_blocks"]
    for other in (torch.relu, torch.ops.aten.mm.default, "view", None):
        assert op_name(other) is None
        assert instruction_of(other) is None


def test_what_some_instructions_say():
    names = ("prefetch_blocks", "offload_blocks", "fork_stream", "sparse_attention")
    prefetch, offload, fork, attend = (INSTRUCTIONS[name] for name in names)
    assert (prefetch.stream, prefetch.work) == (None, Work.TO_DEVICE)
    assert (offload.stream, offload.work) == (COPY, Work.TO_HOST)
    assert (fork.forks, fork.work) == (True, Work.NONE)
    assert attend.stream is None
    assert "pages" in prefetch.tensors
    assert "event" not in prefetch.tensors
