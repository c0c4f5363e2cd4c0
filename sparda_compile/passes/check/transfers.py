"""What the wait and the fork of a copy have to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.graph.effects import is_state
from sparda_compile.graph.op_index import result_of
from sparda_compile.passes.check.compare import compare, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

    from sparda_compile.graph.op_index import Op, OpIndex

__all__ = ["wrong_fork", "wrong_wait"]


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
