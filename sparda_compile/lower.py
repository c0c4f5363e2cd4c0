"""Stage 6: the rewritten graph becomes a callable.

`inductor` compiles it with `compile_fx`; `eager` runs the graph's own Python, node by node, which
is slower and easier to look into. Both take the same flat arguments, in placeholder order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sparda_compile.errors import PassError
from sparda_compile.passes.fx import fake_value

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["lower"]


def lower(gm: fx.GraphModule, lowering: str) -> Callable[..., Tensor]:
    """Return a function of the graph's placeholders, in order, that returns the logits.

    Args:
        gm: A verified graph.
        lowering: `inductor` or `eager`.

    Raises:
        PassError: If the compiler has fixed a size that must stay free.
    """
    run: Callable[..., Any] = gm.forward if lowering == "eager" else _compile(gm)

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
    fake_mode = next(value for value in inputs if isinstance(value, Tensor)).fake_mode  # type: ignore[attr-defined]
    symbols = [value for value in inputs if isinstance(value, torch.SymInt)]
    with tracing(TracingContext(fake_mode)), torch.no_grad():
        compiled: Callable[..., Any] = compile_fx(_copy(gm), inputs)
    for symbol in symbols:
        if symbol.node.expr not in symbol.node.shape_env.var_to_range:
            continue
        if symbol.node.shape_env.replacements.get(symbol.node.expr) is not None:
            raise PassError(
                f"Inductor fixed the prompt length to {symbol.node.hint}; every other prompt would "
                "give wrong results. Use lowering='eager' and report the model."
            )
    return compiled


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy for the compiler to consume; the caller's graph stays to be looked at."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = {k: v for k, v in node.meta.items() if not k.startswith("sparda")}
    return fx.GraphModule(gm, graph)
