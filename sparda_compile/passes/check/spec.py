"""The rules of a legal sparda graph, checked after every pass.

The facts that hold say which rules do. Each rule yields what is wrong, in words that name the node.
A broken rule is a bug of a pass, never of the user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import Tensor

from sparda_compile.errors import GraphInvariantError
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.op_index import OpIndex
from sparda_compile.graph.pure_part import form_of
from sparda_compile.graph.side_piece import side_piece_of
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.passes.base import Fact
from sparda_compile.passes.check.grammar import layers_of, wrong_counts, wrong_order
from sparda_compile.passes.check.operands import wrong_operands

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from sparda_compile.passes.base import PassContext

__all__ = ["check_spec"]

_STARTS: Final = ("prefetch_blocks", "offload_blocks", "record_event")
# What returns the attention of a layer in a decode step.
_DECODED: Final = ("sparse_attention", "attend_missing", "repair_predicted")


def check_spec(graph: fx.Graph, facts: frozenset[Fact], ctx: PassContext, after: str) -> None:
    """Raise GraphInvariantError if the graph breaks a rule of the facts that hold.

    Args:
        graph: The graph.
        facts: What holds of it.
        ctx: What the passes know; it says what each layer has to have.
        after: The pass that made the graph, for the message.
    """
    for wrong in _wrong(graph, facts, ctx):
        raise GraphInvariantError(f"after {after}: {wrong}. This is a bug of the pass.")


def _wrong(graph: fx.Graph, facts: frozenset[Fact], ctx: PassContext) -> Iterator[str]:
    index = OpIndex(graph)
    if Fact.ATTENTION_REPLACED in facts:
        yield from _unfinished(index)
        yield from _ends(index)
        yield from _shapes(index)
        yield from _pieces(index)
    if facts & {Fact.TRANSFERS_ASYNC, Fact.SPECULATION_INSERTED}:
        yield from _events(index)
        yield from _tickets(index)
    if Fact.ATTENTION_REPLACED in facts:
        assert ctx.layout is not None
        yield from _strangers(index, {shape.layer for shape in ctx.layout.layers})
        layers = layers_of(index, ctx.layout)
        yield from wrong_counts(layers, ctx, facts)
        yield from wrong_order(layers)
        yield from wrong_operands(index, layers, ctx, facts)


def _unfinished(index: OpIndex) -> Iterator[str]:
    for node, op in index.ops.items():
        if INSTRUCTIONS[op.name].is_marker:
            yield f"{node.name} was not replaced"
        if "val" not in node.meta:
            yield f"{node.name} has no fake value"
        if op.layer is None and not INSTRUCTIONS[op.name].is_collective:
            yield f"{node.name} belongs to no layer"


def _ends(index: OpIndex) -> Iterator[str]:
    ends = index.by_name["advance_lengths"]
    if len(ends) != 1:
        last = next(reversed(index.ops), None)
        yield f"{len(ends)} advance_lengths, one has to be behind {last}"
        return
    behind = ends[0].node.next
    if behind.op != "output":
        yield f"{behind.name} comes after advance_lengths"


def _shapes(index: OpIndex) -> Iterator[str]:
    for op in (op for name in _DECODED for op in index.by_name[name]):
        if fake_value(op.node).shape != fake_value(op.args["query"]).shape:
            yield f"{op.node.name} has another shape than its query"


def _pieces(index: OpIndex) -> Iterator[str]:
    """Yield which op is given something else than its piece was made for."""
    for op in index.by_name["run_piece"]:
        graph = side_piece_of(op.node).graph_module.graph
        values = [fake_value(n) for n in graph.nodes if n.op == "placeholder"]
        wanted = [form_of(v) for v in values if isinstance(v, Tensor)][:-1]  # its result is last
        given = [form_of(fake_value(n)) for n in op.args["inputs"]]
        if given != wanted:
            yield f"{op.node.name} takes {given}, and its piece {wanted}"


def _events(index: OpIndex) -> Iterator[str]:
    copies = _by_event(index, *_STARTS)
    waits = _by_event(index, "wait_blocks")
    for event in dict.fromkeys([*copies, *waits]):
        starts, ends = copies.get(event, []), waits.get(event, [])
        if len(starts) != 1 or len(ends) != 1:
            who, whose = " and ".join(starts) or "nothing", " and ".join(ends) or "nothing"
            yield f"event {event} is recorded by {who} and awaited by {whose}, not by one each"


def _by_event(index: OpIndex, *names: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        for op in index.by_name[name]:
            found.setdefault(op.args["event"], []).append(op.node.name)
    return found


def _tickets(index: OpIndex) -> Iterator[str]:
    for op in (each for name in _STARTS for each in index.by_name[name]):
        users = [call_name(user) for user in op.node.users]
        if users != ["sparda.wait_blocks"]:
            yield f"the ticket of {op.node.name} goes to {users or 'nobody'}, not to one wait"


def _strangers(index: OpIndex, layers: set[int]) -> Iterator[str]:
    for op in index.ops.values():
        if INSTRUCTIONS[op.name].is_collective:
            continue
        if op.layer not in layers and op.name not in ("number_tokens", "advance_lengths"):
            yield f"{op.node.name} is for layer {op.layer}, which has no attention"
