"""The grammar of a legal sparda graph, checked after every pass.

Each rule looks at the whole graph and says what is wrong, or nothing. A broken rule is a bug of
a pass, never of the user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sparda_compile.errors import GraphInvariantError
from sparda_compile.passes.base import Fact
from sparda_compile.passes.effects import argument
from sparda_compile.passes.fx import call_name, fake_value, find_ops, is_sparda

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

__all__ = ["check_spec"]

_ASYNC: Final = ("prefetch_blocks", "offload_blocks")


def _nodes_have_values(graph: fx.Graph) -> str:
    for node in graph.nodes:
        if is_sparda(node) and "val" not in node.meta:
            return f"{node.name} has no fake value"
        if is_sparda(node) and "sparda_layer" not in node.meta and not _is_marker(node):
            return f"{node.name} belongs to no layer"
    return ""


def _no_markers(graph: fx.Graph) -> str:
    markers = find_ops(graph, "kv_update")
    return f"{markers[0].name} was not replaced" if markers else ""


def _starts_match_waits(graph: fx.Graph) -> str:
    starts = [argument(n, "event") for n in find_ops(graph, *_ASYNC)]
    waits = [argument(n, "event") for n in find_ops(graph, "wait_blocks")]
    if len(set(starts)) != len(starts):
        return "two copies record one event"
    if sorted(starts) != sorted(waits):
        return f"copies record events {sorted(starts)} but waits are for {sorted(waits)}"
    return ""


def _tickets_go_to_waits(graph: fx.Graph) -> str:
    for start in find_ops(graph, *_ASYNC):
        users = [call_name(u) for u in start.users]
        if users != ["sparda.wait_blocks"]:
            return f"the ticket of {start.name} goes to {users or 'nobody'}, not to one wait"
    return ""


def _one_end(graph: fx.Graph) -> str:
    ends = find_ops(graph, "advance_lengths")
    if len(ends) != 1:
        return f"{len(ends)} advance_lengths"
    behind = ends[0].next
    return "" if behind.op == "output" else f"{behind.name} comes after advance_lengths"


def _one_fetch_per_plan(graph: fx.Graph) -> str:
    for plan in find_ops(graph, "plan_pages", "select_pages"):
        miss_blocks = 2 if call_name(plan) == "sparda.plan_pages" else 3
        listed = [u for u in plan.users if u.args[1] == miss_blocks for u in u.users]
        copies = [u for u in listed if call_name(u).endswith("fetch_blocks")]
        if len(copies) > 1:
            return f"the misses of {plan.name} are fetched {len(copies)} times"
    return ""


def _values_are_consistent(graph: fx.Graph) -> str:
    for node in find_ops(graph, "sparse_attention", "attend_missing"):
        query = argument(node, "query")
        if fake_value(node).shape != fake_value(query).shape:
            return f"{node.name} has another shape than its query"
    return ""


_RULES: Final[dict[Fact, tuple[Callable[[fx.Graph], str], ...]]] = {
    Fact.ATTENTION_REPLACED: (
        _no_markers,
        _nodes_have_values,
        _one_end,
        _one_fetch_per_plan,
        _values_are_consistent,
    ),
    Fact.TRANSFERS_ASYNC: (_starts_match_waits, _tickets_go_to_waits),
}


def check_spec(graph: fx.Graph, facts: frozenset[Fact], after: str) -> None:
    """Raise GraphInvariantError if the graph breaks a rule of the facts that hold."""
    for fact, rules in _RULES.items():
        if fact not in facts:
            continue
        for rule in rules:
            wrong = rule(graph)
            if wrong:
                raise GraphInvariantError(f"after {after}: {wrong}. This is a bug of the pass.")


def _is_marker(node: fx.Node) -> bool:
    return call_name(node) == "sparda.kv_update"
