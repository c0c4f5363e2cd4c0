"""What a layer of a legal graph is made of: how many of which ops, and in which order.

Every op plays one role in its layer, the fused `select_pages` two. A role is the op's name, with a
word before it where a layer may have several: the hint's plan, copy and wait stand beside the
layer's own, and `offload wait_blocks` beside both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from sparda_compile.passes.base import Fact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparda_compile.graph.op_index import Op, OpIndex
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["HINT_OPS", "LayerOps", "hint_source", "layers_of", "wrong_counts", "wrong_order"]

# What a hint adds to its layer, besides the plan, the copy and the wait that InsertPrefetch makes.
HINT_OPS: Final[dict[str, tuple[str, ...]]] = {
    "forecast": ("score_blocks", "select_blocks"),
    "next_query": ("score_blocks", "select_blocks"),
    "previous_step": ("recall_ids", "remember_ids"),
    "previous_layer": (),
}

# Within a layer, all ops of the first role come before all of the second, as far as there are any.
# What one op makes and the other takes is not listed: the graph's own check sees to that.
_ORDER: Final = (
    ("score_blocks", "update_summary"),  # the new token's block is selected whatever its score
    ("recall_ids", "remember_ids"),  # else the hint were this step's own selection
    ("hint wait_blocks", "plan"),  # the plan may give away pages that the copy fills
    ("fetch_blocks", "sparse_attention"),
    ("wait_blocks", "sparse_attention"),
    ("wait_blocks", "attend_missing"),
    ("append_kv", "sparse_attention"),  # a token attends to itself
    ("append_kv", "attend_resident"),
    ("sparse_attention", "store_blocks"),
    ("sparse_attention", "offload_blocks"),
    ("attend_missing", "offload_blocks"),
    ("prefill_attention", "extend_kv"),  # which may evict what attention reads of the past
    ("extend_kv", "store_blocks"),
    ("extend_kv", "offload_blocks"),
)


class LayerOps:
    """The ops of one layer by the role that they play.

    Attributes:
        shape: The layer.
        ops: In program order.
        by_role: Ops by role; each list in program order.
        title: The layer in words.
    """

    def __init__(self, index: OpIndex, shape: LayerShape) -> None:
        self.shape = shape
        self.ops = index.by_layer.get(shape.layer, [])
        self.by_role: defaultdict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            for role in _roles(index, op):
                self.by_role[role].append(op)
        nodes = [*index.sites.get(shape.layer, ()), *(op.node for op in self.ops)]
        self.title = f"layer {shape.layer}, that of {nodes[0] if nodes else 'no op'},"

    def one(self, role: str) -> Op | None:
        """Return the op of a role, None if there is none."""
        return next(iter(self.by_role.get(role, ())), None)


def layers_of(index: OpIndex, layout: CacheLayout) -> list[LayerOps]:
    """Return the layers of a graph."""
    return [LayerOps(index, shape) for shape in layout.layers]


def _roles(index: OpIndex, op: Op) -> tuple[str, ...]:
    if op.name == "plan_pages":
        return ("hint plan" if op.args["is_hint"] else "plan",)
    if op.name == "select_pages":
        return ("select_blocks", "hint plan" if op.args["is_hint"] else "plan")
    if op.name == "prefetch_blocks":
        plan = index.maker(op.args["miss_blocks"])
        return ("hint prefetch_blocks" if plan and plan.args.get("is_hint") else op.name,)
    if op.name == "wait_blocks":
        copy = index.maker(op.args["ticket"])
        if copy is None or copy.name not in ("prefetch_blocks", "offload_blocks"):
            return (op.name,)
        copies = _roles(index, copy)[0]
        return (
            copies.replace("offload_blocks", "offload ").replace("prefetch_blocks", "") + op.name,
        )
    return (op.name,)


def hint_source(shape: LayerShape, ctx: PassContext) -> LayerShape | None:
    """Return the layer that a layer's hint is made in, None if it has no hint.

    The first layer has none before it, so where a hint can do without, it is made in its own.
    """
    assert ctx.layout is not None
    layers, hint = ctx.layout.layers, ctx.config.hint
    if ctx.config.mode != "exact" or not ctx.is_decode or shape.kind == "window":
        return None
    before = [other for other in layers if other.layer < shape.layer]
    if hint == "previous_layer":
        sparse = [other for other in before if other.kind != "window"]
        same = sparse and sparse[-1].num_groups == shape.num_groups
        return sparse[-1] if same else None
    if before:
        return before[-1]
    return None if hint == "next_query" else shape


def _required(shape: LayerShape, ctx: PassContext, facts: frozenset[Fact]) -> Counter[str]:
    """Return how often each role has to be there in a layer."""
    assert ctx.layout is not None
    layout, mode = ctx.layout, ctx.config.mode
    if shape.kind == "window":
        return Counter(["window_attention"])
    is_async = layout.offload and Fact.TRANSFERS_ASYNC in facts
    roles = ["update_summary"] * len(layout.summaries())
    copies = ["offload_blocks"] if is_async else []
    if layout.offload:
        roles += ["offload_blocks", "offload wait_blocks"] if is_async else ["store_blocks"]
    if not ctx.is_decode:
        return Counter([*roles, "prefill_attention", "extend_kv", *["fork_stream"] * len(copies)])
    roles += ["plan", "append_kv"]
    roles += ["all_blocks"] if mode == "dense" else ["score_blocks", "select_blocks"]
    if Fact.FORECAST_INSERTED in facts and hint_source(shape, ctx):
        roles += HINT_OPS[ctx.config.hint]
        if is_async:
            roles += ["hint plan", "hint prefetch_blocks", "hint wait_blocks"]
            copies.append("hint prefetch_blocks")
    if is_async and mode != "query":
        roles += ["prefetch_blocks", "wait_blocks"]
        copies.append("prefetch_blocks")
    elif layout.offload:
        roles.append("fetch_blocks")
    if is_async and mode == "exact":
        roles += ["attend_resident", "attend_missing"]
    else:
        roles.append("sparse_attention")
    return Counter([*roles, *["fork_stream"] * len(copies)])


def wrong_counts(layers: list[LayerOps], ctx: PassContext, facts: frozenset[Fact]) -> Iterator[str]:
    """Yield what a layer has too often, or not often enough."""
    for layer in layers:
        required = _required(layer.shape, ctx, facts)
        for role in dict.fromkeys([*required, *layer.by_role]):
            found = layer.by_role.get(role, [])
            if len(found) != required[role]:
                names = f" ({', '.join(op.node.name for op in found)})" if found else ""
                yield (
                    f"{layer.title} has {len(found)} {role}{names} where {ctx.phase} in mode "
                    f"{ctx.config.mode} has {required[role]}"
                )


def wrong_order(layers: list[LayerOps]) -> Iterator[str]:
    """Yield which ops of a layer come in the wrong order."""
    for layer in layers:
        for before, behind in _ORDER:
            first, second = layer.by_role.get(before), layer.by_role.get(behind)
            if first and second and first[-1].place > second[0].place:
                yield f"{first[-1].node.name} comes behind {second[0].node.name}"
