"""FuseProjections: projections of one input become one matrix multiplication.

Before, and after:

    %forecast_1 = linear(%hidden, %W_f)        %joined = linear(%hidden, %joined_weight_0)
    %q = linear(%hidden, %W_q)                 %parts = split(%joined, [256, 4096, 256, 256], -1)
    %k = linear(%hidden, %W_k)                 %forecast_1 = getitem(%parts, 0)
    %v = linear(%hidden, %W_v)                 %q = getitem(%parts, 1)   ...

A projection is small when a launch costs more than reading its weight. Where there is a small one,
it and what shares its input are joined, but for weights above 64 MiB. Only on a GPU, where a launch
costs: decode of one token is otherwise a row of kernels that wait for each other. A model on `meta`
is planned for the machine that the configuration names. The joined weight is a copy, of 1.3 GB for
a model of 8B; `Program` makes it and keeps it in step with the model's own.

In mode `exact` what a hint projects stays apart: how a multiplication is split depends on its
width, and keys and values must be, bit for bit, those of mode `query`. So each may run on a side
stream.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import call_name, fake_value
from sparda_compile.graph.tags import JOINED, LAYER
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from torch import fx

__all__ = ["FuseProjections"]

# Larger weights are read at full bandwidth by themselves, and a copy of them is not free.
_MOST_BYTES: Final = 64 << 20


@dataclasses.dataclass(frozen=True)
class FuseProjections:
    """Join linears of one input, one of them small. Counts: joined, into."""

    name: ClassVar[str] = "fuse_projections"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FORECAST_INSERTED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.PROJECTIONS_FUSED})
    preserves_numerics: ClassVar[bool] = False

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        groups: dict[tuple[Any, ...], list[fx.Node]] = {}
        if ctx.is_decode and _on_gpu(gm.graph, ctx):
            for node in gm.graph.nodes:
                is_hint = bool(ctx.strategy.hints) and LAYER.on(node)
                if not is_hint and _weight_bytes(node) <= _MOST_BYTES:
                    groups.setdefault((node.args[0], _bias(node) is None), []).append(node)
        small = ctx.machine.memory_gbps * 1e3 * ctx.machine.launch_us
        found = [
            nodes
            for nodes in groups.values()
            if len(nodes) > 1 and min(map(_weight_bytes, nodes)) < small
        ]
        joined = JOINED.get(gm, {})
        JOINED.put(gm, joined)
        for nodes in found:
            _join(gm.graph, nodes, joined)
        counts = {"joined": sum(map(len, found)), "into": len(found)}
        return PassResult(gm, modified=bool(found), counts=counts)


def _on_gpu(graph: fx.Graph, ctx: PassContext) -> bool:
    """Whether the model is on a GPU; one on `meta`, which never runs, is where the machine says."""
    kinds = {"cuda", "meta"} if ctx.machine.overlaps else {"cuda"}
    values = (fake_value(n) for n in graph.nodes if n.op == "placeholder")
    return any(isinstance(v, torch.Tensor) and v.device.type in kinds for v in values)


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _weight_bytes(node: fx.Node) -> float:
    """Return the bytes of a projection's weight, infinity for what is no projection."""
    if node.op != "call_function" or call_name(node) != "linear" or len(node.args) < 2:
        return math.inf
    operands = [node.args[1], *([_bias(node)] if _bias(node) is not None else [])]
    if any(getattr(operand, "op", None) != "placeholder" for operand in operands):
        return math.inf
    weight = fake_value(node.args[1])  # type: ignore[arg-type]
    if is_traceable_wrapper_subclass(weight):  # quantised; nothing can be put below it
        return math.inf
    return math.prod(int(s) for s in weight.shape) * float(weight.dtype.itemsize)


def _join(graph: fx.Graph, nodes: list[fx.Node], joined: dict[str, tuple[str, ...]]) -> None:
    nodes = sorted(nodes)
    hidden = nodes[0].args[0]
    emit = Emitter(graph, nodes[0], nodes[-1], -1)
    weight = _placeholder(graph, [n.args[1] for n in nodes], "weight", joined)  # type: ignore[misc]
    biases = [_bias(n) for n in nodes]
    bias = None if biases[0] is None else _placeholder(graph, biases, "bias", joined)
    whole = emit.function(torch.nn.functional.linear, (hidden, weight, bias), {}, "joined")
    sizes = [int(fake_value(n).shape[-1]) for n in nodes]
    parts = emit.function(torch.split, (whole, sizes, -1), {}, "joined_parts")
    for new in (whole, parts):
        LAYER.drop(new)
    items = [emit.item(parts, i, f"{node.name}_part") for i, node in enumerate(nodes)]
    for node, part in zip(nodes, items, strict=True):
        value = part.meta["val"]
        part.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _placeholder(
    graph: fx.Graph, sources: list[fx.Node], what: str, joined: dict[str, tuple[str, ...]]
) -> fx.Node:
    """Add the placeholder of some weights put together, one above the other."""
    last = max(graph.find_nodes(op="placeholder", sort=False))
    with graph.inserting_after(last):
        node = graph.placeholder(f"joined_{what}_{len(joined)}")
    values = [fake_value(source) for source in sources]
    rows = sum(int(value.shape[0]) for value in values)
    with values[0].fake_mode:
        node.meta["val"] = torch.empty(
            (rows, *values[0].shape[1:]), dtype=values[0].dtype, device=values[0].device
        )
    joined[node.name] = tuple(source.name for source in sources)
    return node
