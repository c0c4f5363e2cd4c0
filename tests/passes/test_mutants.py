"""Break a right program in every single way that changes what an op uses, or that drops an op.

Each mutant differs from a right graph in one place. The rules of the grammar refuse it, or
VerifyTransfers does: there is no third check, so one that passes both would run, and be wrong.
"""

from __future__ import annotations

import itertools

import pytest

from sparda_compile.errors import GraphInvariantError, TransferRaceError
from sparda_compile.graph.dependences import mark_order
from sparda_compile.graph.effects import (
    argument,
    bound_arguments,
    conflicts,
    is_state,
    set_argument,
)
from sparda_compile.graph.nodes import (
    call_name,
    copy_graph,
    fake_value,
    is_sparda,
    program_order,
    tensor_shape,
)
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import FACTS, LAYER, ORDER
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.spec import check_spec
from sparda_compile.passes.check.verify_transfers import check_program
from sparda_compile.registry import HINTS

MODES = {
    "dense": {"mode": "dense"},
    "query": {"mode": "query"},
    "forecast": {"mode": "forecast"},
    **{f"exact-{hint}": {"mode": "exact", "hint": hint} for hint in HINTS.names()},
    "exact-ema+forecast": {"mode": "exact", "hint": ("ema", "forecast")},
    "exact-next_query+forecast": {"mode": "exact", "hint": ("next_query", "forecast")},
    "exact-previous_step+previous_layer": {
        "mode": "exact",
        "hint": ("previous_step", "previous_layer"),
    },
    "speculate": {"mode": "speculate", "speculate_where": "always"},
    "query-int8": {"mode": "query", "kv_format": "int8"},
    "query-stored": {"mode": "query", "kv_format": "int8", "page_format": "stored"},
    "exact-stored": {
        "mode": "exact", "hint": "forecast", "kv_format": "int4", "page_format": "stored",
    },
    "forecast-stored": {"mode": "forecast", "kv_format": "fp8", "page_format": "stored"},
    "speculate-stored": {
        "mode": "speculate", "speculate_where": "always", "kv_format": "int8",
        "page_format": "stored",
    },
    "lowbit2-forecast": {
        "mode": "forecast", "selector": "lowbit2", "prefill_selector": "infllm2",
    },
    "forecast-values8": {"mode": "forecast", "kv_format": "values8"},
}  # fmt: skip
UNSCHEDULED = ("fuse_selection", "schedule_transfers")
IN_LINE = ("insert_prefetch", "schedule_transfers")

# For memory alone; no op works on them. Each is missed in its pass's own tests.
TIES = ("keepalive",)


def cases():
    """Yield mode, phase, offload and what is disabled; not every mode offloads."""
    for mode in MODES:
        yield from ((mode, "decode", offload, ()) for offload in ("always", "never"))
    for mode in ("forecast", "exact-forecast"):
        yield from ((mode, "decode", "always", disabled) for disabled in (UNSCHEDULED, IN_LINE))
    for mode in ("dense", "query", "exact-forecast"):
        yield from ((mode, "prefill", offload, ()) for offload in ("always", "never"))
    for mode in ("query", "forecast"):
        yield from ((mode, "sparse_prefill", offload, ()) for offload in ("always", "never"))
    yield "exact-previous_step", "sparse_prefill", "always", ()
    yield from (("exact-ema", "decode", "always", disabled) for disabled in (UNSCHEDULED, IN_LINE))
    for phase in ("prefill", "sparse_prefill"):
        yield "exact-ema", phase, "always", ()
        yield "speculate", phase, "never", ()
    yield "speculate", "decode", "never", UNSCHEDULED
    yield "query-int8", "prefill", "always", ()
    yield from (("query-stored", "prefill", offload, ()) for offload in ("always", "never"))
    yield from (
        ("forecast-stored", "sparse_prefill", offload, ()) for offload in ("always", "never")
    )
    yield "lowbit2-forecast", "sparse_prefill", "always", ()


CASES = [
    c for c in cases() if c[0] not in ("dense", "speculate", "speculate-stored") or c[2] == "never"
]
COPYING = [
    case for case in CASES
    if (case[2] == "always" and case[3] != IN_LINE)
    or (case[0].startswith("speculate") and case[1] == "decode")
]  # fmt: skip


class Case:
    """A right graph and what checks it."""

    def __init__(self, plan, context):
        self.graph = plan.graph_module.graph
        self.facts = FACTS.of(plan.graph_module)
        self.context = context

    def copy(self):
        return copy_graph(self.graph)

    def is_refused(self, graph):
        """Whether a check objects, in words that name a node."""
        try:
            check_spec(graph, self.facts, self.context, "mutation")
            if not any(ORDER.on(node) for node in graph.nodes):
                mark_order(graph)
            check_program(extract_program(graph))
        except (GraphInvariantError, TransferRaceError) as error:
            return any(node.name in str(error) for node in graph.nodes if is_sparda(node))
        return False


@pytest.fixture
def case(plan_of, context_of, request):
    mode, phase, offload, disabled = request.param
    settings = {**MODES[mode], "offload": offload, "machine": "h200"}
    plan = plan_of("llama", phase, disable_passes=disabled, **settings)
    return Case(plan, context_of(plan))


def every(cases):
    """Run a test on each of some cases."""
    names = ["-".join([*c[:3], *(["without", *c[3]] if c[3] else [])]) for c in cases]
    return pytest.mark.parametrize("case", cases, ids=names, indirect=True)


def survivors(case, mutants):
    """Return the names of the mutants that nothing refuses; there are some mutants."""
    tried = {name: case.is_refused(graph) for name, graph in mutants}
    assert tried
    return [name for name, refused in tried.items() if not refused]


def sparda_ops(graph):
    return [(i, node) for i, node in enumerate(graph.nodes) if is_sparda(node)]


def looks(node):
    """Return what another value must look like to stand in the place of a node's."""
    return tensor_shape(node), getattr(fake_value(node), "dtype", None)


def places(node):
    """Yield where a node takes tensors: argument, place in its list or None, what it takes."""
    for name, _, value in bound_arguments(node):
        if name in TIES:
            continue
        if isinstance(value, (list, tuple)):
            yield from ((name, i, each) for i, each in enumerate(value))
        else:
            yield name, None, value


def put(node, name, place, value):
    """Put a value at a place; returns what was there."""
    before = argument(node, name)
    changed = value if place is None else [*before[:place], value, *before[place + 1 :]]
    set_argument(node, name, changed)
    return before


def exchanged(graph, candidates):
    """Yield the graph with one operand exchanged, restored when the next one is asked for."""
    for _, node in sparda_ops(graph):
        for name, place, value in list(places(node)):
            for other in candidates(node, value):
                before = put(node, name, place, other)
                yield f"{node.name} takes {other.name} and not {value.name} as {name}", graph
                set_argument(node, name, before)


def other_states(graph):
    """Return a function that gives the states which could stand in the place of one."""
    states = {node: looks(node) for node in graph.nodes if is_state(node)}

    def candidates(_, value):
        if value not in states:
            return []
        tensor, layer = value.name.rstrip("0123456789"), value.name[-2:]
        alike = [s for s in states if s is not value and states[s] == states[value]]
        return [s for s in alike if s.name.startswith(tensor) or s.name.endswith(layer)]

    return candidates


def other_results(graph):
    """Return a function that gives the values which could stand in the place of one."""
    order = program_order(graph)
    operands = {n.name for site in sites_of(graph) for n in (site.query, site.k, site.v)}
    results = {
        node: looks(node) for node in graph.nodes
        if node.name in operands
        or (is_sparda(node) and tensor_shape(node))
        or (call_name(node) == "getitem" and is_sparda(node.args[0]))
    }  # fmt: skip

    def candidates(user, value):
        if value not in results:
            return []
        alike = [n for n in results if n is not value and results[n] == results[value]]
        return [n for n in alike if order[n] < order[user]]

    return candidates


def removals(case):
    """Yield every graph that lacks one op, whose users take the nearest value like its own."""
    for i, op in sparda_ops(case.graph):
        graph = case.copy()
        node, before = list(graph.nodes)[i], list(graph.nodes)[:i][::-1]
        chosen = [user for user in node.users if call_name(user) == "getitem"]
        if all(_reroute(result, before) for result in chosen or [node]):
            graph.erase_node(node)
            yield f"without {op.name}", graph
        if call_name(op) == "sparda.fork_stream":
            graph = case.copy()
            node = list(graph.nodes)[i]
            set_argument(next(iter(node.users)), "after", None)
            graph.erase_node(node)
            yield f"without {op.name}, for which nothing stands", graph


def _reroute(result, before):
    """Let the users of a value take another one like it; says if there is one."""
    if result.users:
        other = next((n for n in before if looks(n) == looks(result)), None)
        if other is None:
            return False
        result.replace_all_uses_with(other)
    if call_name(result) == "getitem":
        result.graph.erase_node(result)
    return True


def lost_copies(case):
    """Yield every graph that lacks one copy with its wait, and perhaps its fork."""
    for i, op in sparda_ops(case.graph):
        name = call_name(op).removeprefix("sparda.")
        if name not in ("prefetch_blocks", "offload_blocks", "record_event"):
            continue
        for with_fork in (False, True):
            graph = case.copy()
            copy = list(graph.nodes)[i]
            # A mark has no fork of its own: that of its copy stays, as the copy does.
            fork = argument(copy, "after") if name != "record_event" else None
            graph.erase_node(next(iter(copy.users)))
            graph.erase_node(copy)
            if with_fork and fork is not None and not fork.users:
                graph.erase_node(fork)
            elif with_fork:
                continue
            yield f"without {op.name}, its wait{' and its fork' * with_fork}", graph


def swaps(case):
    """Yield every graph in which two neighbours among the ops of one layer trade places."""
    layers = {}
    for i, op in sparda_ops(case.graph):
        layers.setdefault(LAYER.of(op), []).append((i, op))
    for ops in layers.values():
        for (i, first), (j, second) in itertools.pairwise(ops):
            graph = case.copy()
            nodes = list(graph.nodes)
            if _trade(nodes, i, j):
                yield (first, second), graph


def _trade(nodes, i, j):
    """Move one of two nodes past the other, if what lies between allows it."""
    first, second = nodes[i], nodes[j]
    order = {node: place for place, node in enumerate(nodes)}
    if all(order[source] < i for source in second.all_input_nodes):
        first.prepend(second)
        return True
    chosen = [user for user in first.users if call_name(user) == "getitem"]
    users = {*first.users, *(u for item in chosen for u in item.users)} - {*chosen}
    if any(order[user] <= j for user in users):
        return False
    for node in reversed([first, *chosen]):
        second.append(node)
    return True


@every(CASES)
def test_state_of_another_layer_or_role(case):
    graph = case.copy()
    assert survivors(case, exchanged(graph, other_states(graph))) == []


@every(CASES)
def test_another_value(case):
    graph = case.copy()
    assert survivors(case, exchanged(graph, other_results(graph))) == []


@every(CASES)
def test_op_that_is_gone(case):
    assert survivors(case, removals(case)) == []


@every(COPYING)
def test_copy_that_is_gone_with_its_wait(case):
    assert survivors(case, lost_copies(case)) == []


@every(CASES)
def test_neighbours_that_trade_places(case):
    """Those that nothing refuses use no state in common, or pages of it that never are the same."""
    left = [pair for pair, graph in swaps(case) if not case.is_refused(graph)]
    assert [pair for pair in left if conflicts(*pair)] == []
