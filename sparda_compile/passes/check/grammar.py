"""What a layer of a legal graph is made of: how many of which ops, and in which order.

Every op plays one role in its layer, the fused `select_pages` two. A role is the op's name, with a
word before it where a layer may have several: the hints' plans, copies and waits stand beside the
layer's own, and `offload wait_blocks` beside all, or in a prompt beside `stage wait_blocks`. What
marks the end of a side stream's work, and the wait for it, are named after that work.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from sparda_compile.graph.tags import SITE
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.passes.base import Fact
from sparda_compile.passes.schedule.layer_times import attends_before_repair, speculates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparda_compile.graph.op_index import Op, OpIndex
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import CacheLayout, LayerShape
    from sparda_compile.state.strategy import HintMethod

__all__ = ["LayerOps", "hints_of", "layers_of", "wrong_counts", "wrong_order"]

# Orders of roles that are no names of ops; those of ops stand in the table of instructions. What
# one op makes and the other takes is not listed: the graph's own check sees to that.
_ORDER: Final = (
    ("hint wait_blocks", "plan"),  # the plan may give away pages that the copy fills
    ("append_kv", "parts wait_blocks"),  # it runs while predicted blocks are attended to
)


def _orders() -> Iterator[tuple[str, str]]:
    """Yield what comes before what in a layer: all ops of the first before all of the second."""
    yield from _ORDER
    for it in INSTRUCTIONS.values():
        yield from ((it.name, later) for later in it.before)
        yield from ((earlier, it.name) for earlier in it.behind)


class LayerOps:
    """The ops of one layer by the role that they play.

    Attributes:
        shape: The layer.
        sites: Nodes that carry the site of its attention; one in a legal graph.
        ops: In program order.
        by_role: Ops by role; each list in program order.
        title: The layer in words.
    """

    def __init__(self, index: OpIndex, shape: LayerShape) -> None:
        self.shape = shape
        self.sites = index.sites.get(shape.layer, [])
        self.ops = index.by_layer.get(shape.layer, [])
        self.by_role: defaultdict[str, list[Op]] = defaultdict(list)
        for op in self.ops:
            for role in _roles(index, op):
                self.by_role[role].append(op)
        nodes = [*self.sites, *(op.node for op in self.ops)]
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
        if copy is not None and copy.name == "record_event":
            return (f"{_marked(index, copy)} {op.name}",)
        if copy is None or copy.name not in ("prefetch_blocks", "offload_blocks"):
            return (op.name,)
        copies = _roles(index, copy)[0]
        return (
            copies.replace("offload_blocks", "offload ").replace("prefetch_blocks", "") + op.name,
        )
    if op.name == "record_event":
        return (f"{_marked(index, op)} {op.name}",)
    return (op.name,)


def _marked(index: OpIndex, mark: Op) -> str:
    """Return in a word whose end a mark is: of state, that of the prediction which writes it."""
    makers = [index.maker(node) for node in mark.args["inputs"]]
    made = next((maker.name for maker in makers if maker is not None), None)
    return {"attend_predicted": "parts", None: "prediction"}.get(made, "stage")


def hints_of(shape: LayerShape, ctx: PassContext) -> dict[str, tuple[HintMethod, LayerShape]]:
    """Return the hints that a layer has, by name, each with the layer that it is made in."""
    assert ctx.layout is not None
    if not ctx.is_decode or shape.kind == "window":
        return {}
    made = ((hint, hint.source(shape, ctx.layout.layers)) for hint in ctx.strategy.hints)
    return {hint.name: (hint, source) for hint, source in made if source is not None}


def _begins_early(layer: LayerOps, ctx: PassContext, facts: frozenset[Fact]) -> bool:
    """Whether a layer has to attend to predicted blocks, or prepare that in a prompt."""
    if Fact.SPECULATION_INSERTED not in facts or not layer.sites:
        return False
    site = SITE.of(layer.sites[0])
    return speculates(layer.shape, site.num_heads // site.num_groups, ctx)


def _required(layer: LayerOps, ctx: PassContext, facts: frozenset[Fact]) -> Counter[str]:
    """Return how often each role has to be there in a layer."""
    assert ctx.layout is not None
    shape, layout, strategy = layer.shape, ctx.layout, ctx.strategy
    if shape.kind == "window":
        return Counter(["window_attention"])
    is_async = layout.offload and Fact.TRANSFERS_ASYNC in facts
    is_early = _begins_early(layer, ctx, facts)
    roles = ["update_summary"] * len(layout.summaries(shape.layer))
    copies = ["offload_blocks"] if is_async else []
    if layout.offload:
        roles += ["offload_blocks", "offload wait_blocks"] if is_async else []
    if layout.stores(shape.layer) and not is_async:
        roles.append("store_blocks")
    if not ctx.is_decode:
        roles += ["extend_kv", *["fork_stream"] * len(copies)]
        sparse = ("select_tokens", "stage_blocks", "attend_tokens")
        roles += sparse if ctx.is_sparse_prefill else ("prefill_attention",)
        if ctx.is_sparse_prefill and is_async and layout.stages_ahead:
            roles += ["select_past", "stage record_event", "stage wait_blocks", "fork_stream"]
        keepers = [*strategy.hints] if Fact.FORECAST_INSERTED in facts else []
        if strategy.predictor is not None and is_early:
            keepers.append(strategy.predictor)
        for keeper in keepers:
            roles += keeper.prompt_ops if ctx.is_sparse_prefill else keeper.dense_prompt_ops
        return Counter(roles)
    roles += ["plan", "append_kv"]
    roles += ["all_blocks"] if not strategy.selects else ["score_blocks", "select_blocks"]
    for hint, _ in hints_of(shape, ctx).values() if Fact.FORECAST_INSERTED in facts else ():
        roles += hint.ops
        if is_async:
            roles += ["hint plan", "hint prefetch_blocks", "hint wait_blocks"]
            copies.append("hint prefetch_blocks")
        if is_async and any(map(_is_beside, hint.ops)):
            roles += ["prediction record_event", "prediction wait_blocks", "fork_stream"]
    is_split = is_async and strategy.repairs and attends_before_repair(shape, ctx)
    if is_split or (is_async and strategy.overlaps and not strategy.repairs):
        roles += ["prefetch_blocks", "wait_blocks"]
        copies.append("prefetch_blocks")
    elif layout.offload:
        roles.append("fetch_blocks")
    if is_split:
        roles += ["attend_resident", "attend_missing"]
    elif strategy.predictor is not None and is_early:
        roles += ["attend_predicted", "repair_predicted", *strategy.predictor.ops]
        for work in ("parts", "prediction"):
            roles += [f"{work} record_event", f"{work} wait_blocks", "fork_stream"]
    else:
        roles.append("sparse_attention")
    return Counter([*roles, *["fork_stream"] * len(copies)])


def _is_beside(op: str) -> bool:
    """Whether an op of a hint runs beside the model: only later steps use what it does."""
    it = INSTRUCTIONS[op]
    return it.is_for_later and it.stream is None


def wrong_counts(layers: list[LayerOps], ctx: PassContext, facts: frozenset[Fact]) -> Iterator[str]:
    """Yield what a layer has too often, or not often enough."""
    for layer in layers:
        required = _required(layer, ctx, facts)
        free = {op.name for op in layer.ops if (it := INSTRUCTIONS.get(op.name)) and it.is_free}
        for role in dict.fromkeys([*required, *(r for r in layer.by_role if r not in free)]):
            found = layer.by_role.get(role, [])
            if len(found) != required[role]:
                names = f" ({', '.join(op.node.name for op in found)})" if found else ""
                yield (
                    f"{layer.title} has {len(found)} {role}{names} where {ctx.phase} in mode "
                    f"{ctx.config.mode} has {required[role]}"
                )


def wrong_order(layers: list[LayerOps]) -> Iterator[str]:
    """Yield which ops of a layer come in the wrong order."""
    orders = tuple(_orders())
    for layer in layers:
        for before, behind in orders:
            first, second = layer.by_role.get(before), layer.by_role.get(behind)
            if first and second and first[-1].place > second[0].place:
                yield f"{first[-1].node.name} comes behind {second[0].node.name}"
