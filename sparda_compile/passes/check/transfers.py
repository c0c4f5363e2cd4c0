"""What the wait and the fork of a copy have to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sparda_compile.graph.effects import is_state, results_of, written
from sparda_compile.graph.op_index import result_of
from sparda_compile.isa.streams import ATTEND, SELECT
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.passes.check.compare import compare, words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import fx

    from sparda_compile.graph.op_index import Op, OpIndex
    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.check.compare import Operand
    from sparda_compile.passes.check.grammar import LayerOps

__all__ = [
    "full_state",
    "marked",
    "marked_state",
    "pools",
    "wrong_fork",
    "wrong_transfers",
    "wrong_wait",
]

_COPY_OF: Final = {
    "wait_blocks": "prefetch_blocks",
    "hint wait_blocks": "hint prefetch_blocks",
    "offload wait_blocks": "offload_blocks",
    "stage wait_blocks": "stage record_event",
    "parts wait_blocks": "parts record_event",
    "prediction wait_blocks": "prediction record_event",
}

# State that attention to predicted blocks reads, and the wait behind it takes.
_PARTS_STATE: Final = ("pages", "block_table", "predicted")


def marked_state(mark: Op, layer: LayerOps, state: Mapping[str, str]) -> list[str]:
    """Return the state that the wait behind a mark of the attend stream takes.

    Args:
        mark: The mark.
        layer: Its layer.
        state: Names of the layer's state, by short name.

    Returns:
        Names of what was read there, or written; none if it is no such mark.
    """
    if mark in layer.by_role.get("parts record_event", ()):
        return [state[name] for name in _PARTS_STATE]
    if mark in layer.by_role.get("prediction record_event", ()):
        return [node.name for op in _for_later(layer) for node in written(op.node)]
    return []


def _for_later(layer: LayerOps) -> list[Op]:
    """Return the ops on the attend stream that only later steps use, in order."""
    attend = [op for op in layer.ops if op.args.get("stream") == ATTEND]
    return [op for op in attend if INSTRUCTIONS[op.name].is_for_later]


def full_state(ctx: PassContext, copy: Op) -> tuple[str, ...]:
    """Return short names of what a store of full blocks writes or packs, and its wait takes."""
    assert ctx.layout is not None
    assert copy.layer is not None
    if not ctx.layout.kv_format(copy.layer).rounds:
        return ("host",)
    return (*pools(ctx, copy), "host")


def pools(ctx: PassContext, op: Op) -> tuple[str, ...]:
    """Return short names of what the blocks on the device of an op's layer are in."""
    assert ctx.layout is not None
    assert op.layer is not None
    return ("pages", "tail") if ctx.layout.has_stored_pages(op.layer) else ("pages",)


def marked(mark: Op, layer: LayerOps) -> list[Operand]:
    """Return what the work behind which a mark stands has made.

    Args:
        mark: The mark.
        layer: Its layer.
    """
    if mark in layer.by_role.get("prediction record_event", ()):
        return [node.name for op in _for_later(layer)[-1:] for node in written(op.node)]
    is_attention = mark in layer.by_role.get("parts record_event", ())
    made = layer.one("attend_predicted" if is_attention else "stage_blocks")
    return [(made.node.name, i) for i in range(len(results_of(made.node)))] if made else []


def wrong_transfers(
    index: OpIndex,
    layer: LayerOps,
    of_hint: Mapping[Op, str],
    buffers_of: Callable[[Op], list[str]],
) -> Iterator[str]:
    """Yield which wait or fork of a layer lacks something of its copy.

    Args:
        index: The ops of the graph.
        layer: The layer.
        of_hint: Its ops that belong to a hint, each with the hint's name.
        buffers_of: Gives the state that the wait for a copy has to take.
    """
    forked: set[fx.Node] = set()
    for started, joined in _pairs(layer, of_hint):
        yield from wrong_wait(started, joined, buffers_of(started))
        side = _side(started, layer, of_hint)
        if side:
            forked.add(side[0].node)
            yield from wrong_fork(index, side[0], [op.node for op in side])
    for op in layer.ops:
        if op.args.get("after") is not None and op.node not in forked:
            fork = words_of(op.args["after"])
            yield f"{op.node.name} starts behind {fork}, the fork of others"


def _pairs(layer: LayerOps, of_hint: Mapping[Op, str]) -> Iterator[tuple[Op, Op]]:
    """Yield each copy of a layer with the wait for it."""
    for wait, copy in _COPY_OF.items():
        waits = {of_hint.get(op): op for op in layer.by_role.get(wait, ())}
        for started in layer.by_role.get(copy, ()):
            if (joined := waits.get(of_hint.get(started))) is not None:
                yield started, joined


def _side(copy: Op, layer: LayerOps, of_hint: Mapping[Op, str]) -> list[Op]:
    """Return the ops on side streams that lead to a copy or a mark, in order."""
    if copy in layer.by_role.get("parts record_event", ()):
        return layer.by_role["attend_predicted"]
    if copy in layer.by_role.get("prediction record_event", ()):
        return _for_later(layer)
    if copy.name == "record_event":
        copied = layer.one("stage_blocks")
        return [] if copied is None else _chosen(copied, layer, of_hint)
    return _chosen(copy, layer, of_hint) if copy.name == "prefetch_blocks" else [copy]


def _chosen(copy: Op, layer: LayerOps, of_hint: Mapping[Op, str]) -> list[Op]:
    """Return a copy behind what chooses its blocks on the select stream."""
    hint = of_hint.get(copy)
    on_side = [op for op in layer.ops if op.args.get("stream") == SELECT]
    return [*(op for op in on_side if of_hint.get(op) == hint), copy]


def wrong_wait(copy: Op, wait: Op, buffers: Sequence[str]) -> Iterator[str]:
    """Yield what a wait has not of its copy.

    Args:
        copy: What it waits for.
        wait: The wait.
        buffers: State that it has to take.
    """
    yield from compare(wait, {"ticket": copy.node.name})
    if wait.args["event"] != copy.args["event"]:
        yield f"{wait.node.name} waits for another event than {copy.node.name} records"
    taken = {n.name for n in wait.args["buffers"]}
    for name in buffers:
        if name not in taken:
            yield f"{wait.node.name} does not take {name} among its buffers"


def wrong_fork(index: OpIndex, first: Op, work: Sequence[fx.Node]) -> Iterator[str]:
    """Yield what is wrong with the fork that the first of a side stream's work waits for.

    Args:
        index: The ops of the graph.
        first: The first op of the work.
        work: All of it.
    """
    after = first.args["after"]
    fork = index.ops.get(after)
    if fork is None or fork.name != "fork_stream" or fork.layer != first.layer:
        yield f"{first.node.name} starts behind {words_of(after)}, no fork of its layer"
        return
    if list(fork.node.users) != [first.node]:
        users = words_of([*fork.node.users])
        yield f"{fork.node.name} goes to {users}, not to {first.node.name} alone"
    known = {*fork.args["inputs"], fork.node, *work}
    for node in (source for each in work for source in each.all_input_nodes):
        if node in known or (node.op == "placeholder" and not is_state(node)):
            continue
        made = result_of(node)
        if made is None or made[0] not in known:
            yield f"{fork.node.name} does not take {node.name}, which the work behind it uses"
