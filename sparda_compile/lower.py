"""Stage 6: the rewritten graph becomes a callable.

`inductor` compiles it with `compile_fx`; `eager` runs the graph's own Python, node by node, which
is slower and easier to look into. Both take the same flat arguments, in placeholder order.

Inductor moves nodes by their data alone. What must not move for correctness is data: forks take
the state that side streams will touch, waits mutate what was used and take what must stay
alive. What should not move for speed is pinned: a wait takes the tickets of the prefetches before
it in the schedule, and every matrix multiplication gets a control dependence on the prefetch before
it, so the copy is issued before the compute stream stands still and before that work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.errors import PassError
from sparda_compile.passes.effects import argument, set_argument
from sparda_compile.passes.fx import call_name, fake_value, find_ops

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["lower"]

_SEQUENCE: Final = "sparda_sequence"
_PREFETCH: Final = "prefetch_blocks"
_HEAVY: Final = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
)


def lower(gm: fx.GraphModule, lowering: str) -> Callable[..., Tensor]:
    """Return a function of the graph's placeholders, in order, that returns the logits.

    Args:
        gm: A verified graph.
        lowering: `inductor` or `eager`.

    Raises:
        PassError: If the compiler has fixed a size that must stay free.
    """
    run = gm.forward if lowering == "eager" else _compile(gm)

    def call(*args: Any) -> Tensor:
        with torch.no_grad():
            (logits,) = run(*args)
        result: Tensor = logits
        return result

    return call


def _compile(gm: fx.GraphModule) -> Callable[..., Any]:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    inputs = [fake_value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    fake_mode = next(v for v in inputs if isinstance(v, Tensor)).fake_mode  # type: ignore[attr-defined]
    symbols = [value for value in inputs if isinstance(value, torch.SymInt)]
    patches = {
        "joint_custom_pre_pass": _graph_pass(_number_nodes),
        "post_grad_custom_post_pass": _graph_pass(_pin_prefetches),
        # Else Inductor times its reductions and picks one: two programs of one model would round
        # their sums differently, and so would one program compiled twice.
        "deterministic": True,
        # Else what Inductor fuses decides where it rounds, and which products it adds without
        # rounding: a schedule would change the logits. So every op rounds as it does in eager.
        "emulate_precision_casts": True,
    }
    with tracing(TracingContext(fake_mode)), torch.no_grad():
        compiled = compile_fx(_copy(gm), inputs, config_patches=patches)
    for symbol in symbols:
        if symbol.node.shape_env.replace(symbol.node.expr).is_number:
            raise PassError(
                f"Inductor fixed the prompt length to {symbol.node.hint}; every other prompt would "
                "give wrong results. Use lowering='eager' and report the model."
            )
    return compiled  # type: ignore[return-value]


def _graph_pass(function: Callable[[fx.Graph], None]) -> Any:
    """Wrap a function as Inductor's custom pass, named by this file for its caches."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            function(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,), function.__name__)

    return Pass()


def _number_nodes(graph: fx.Graph) -> None:
    """Write the schedule's order on every node, while it still is the order of the graph."""
    for i, node in enumerate(graph.nodes):
        node.meta[_SEQUENCE] = i


def _pin_prefetches(graph: fx.Graph) -> None:
    """Make all work that follows a prefetch in the schedule depend on it."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
    from torch._inductor.pattern_matcher import stable_topological_sort
    from torch.utils._ordered_set import OrderedSet

    numbered = [n for n in graph.nodes if _SEQUENCE in n.meta and n.op == "call_function"]
    numbered.sort(key=lambda n: n.meta[_SEQUENCE])
    pins: dict[fx.Node, OrderedSet[fx.Node]] = {}
    ticket: fx.Node | None = None
    for node in numbered:
        if _PREFETCH in str(node.args[:1]) and "auto_functionalized" in str(node.target):
            ticket = next((u for u in node.users if u.args[1:] == (0,)), ticket)
        elif ticket is not None and node.target in _HEAVY:
            pins[node] = OrderedSet([ticket])
    if pins:
        preserve_node_ordering(graph, pins)
        stable_topological_sort(graph)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy for the compiler, waits pinned; the caller's graph stays to be looked at."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = {k: v for k, v in node.meta.items() if not k.startswith("sparda")}
    _pin_waits(graph)
    return fx.GraphModule(gm, graph)


def _pin_waits(graph: fx.Graph) -> None:
    """Tie every wait to the prefetches that the schedule has issued since the wait before it.

    Where projections are joined, no multiplication is left between such a prefetch and the wait,
    and no other data ties the two.
    """
    tickets: list[fx.Node] = []
    for node in find_ops(graph, "prefetch_blocks", "wait_blocks"):
        if call_name(node) == "sparda.prefetch_blocks":
            tickets.append(node)
        elif tickets:
            others = [ticket for ticket in tickets if ticket is not argument(node, "ticket")]
            set_argument(node, "anchors", [*argument(node, "anchors"), *others])
            tickets = []
