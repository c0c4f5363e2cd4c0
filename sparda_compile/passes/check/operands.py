"""What each op of a legal graph takes: an argument takes what its name says, of the op's layer.

In layer 1, `pages` is `sparda_pages_1`, and `page_ids` is the first result of the layer's plan. The
ops of a hint, which say whose they are, take the hint's own ids and plan; `previous_layer` makes
those of another layer's ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sparda_compile.formats.base import STAYING_KEYS
from sparda_compile.graph.effects import results_of
from sparda_compile.graph.tags import HINT, LAYER, SITE
from sparda_compile.passes.base import Fact
from sparda_compile.passes.check.grammar import hints_of
from sparda_compile.passes.check.transfers import (
    full_state,
    marked,
    marked_state,
    pools,
    wrong_transfers,
)
from sparda_compile.selectors import SELECTORS
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparda_compile.graph.op_index import Op, OpIndex
    from sparda_compile.passes.base import PassContext
from sparda_compile.passes.check.compare import (
    Operand,
    Operands,
    StateNames,
    compare,
    kind_of,
    names_of,
    results_of_op,
    token_mask_of,
    words_of,
    wrong_numbers,
)
from sparda_compile.passes.check.grammar import LayerOps

__all__ = ["wrong_operands"]

_TABLES: Final = ("block_table", "page_block", "page_stamp", "counters")
_SELECTIONS: Final = ("select_blocks", "select_pages", "all_blocks")
_SCORING: Final = ("score_blocks", "select_tokens", "select_past", "begin_prediction")
_GUESSES: Final = ("recall_ids", "predict_blocks", "select_blocks")
# What writes new tokens, or reads those of the block that is being written.
_WRITERS: Final = ("append_kv", "extend_kv", "attend_tokens")
_ATTENTIONS: Final = (
    *("sparse_attention", "attend_missing", "repair_predicted", "window_attention"),
    *("prefill_attention", "attend_tokens"),
)


def wrong_operands(
    index: OpIndex, layers: Sequence[LayerOps], ctx: PassContext, facts: frozenset[Fact]
) -> Iterator[str]:
    """Yield which op takes something else than its layer has for it.

    Args:
        index: The ops of the graph.
        layers: Its layers, each with the ops that it has to have.
        ctx: What the passes know.
        facts: What holds of the graph.
    """
    names = StateNames.of(ctx)
    own_ids: dict[int, Any] = {}
    for layer in layers:
        checks = _Layer(index, layer, ctx, facts, names)
        yield from checks.sources(own_ids)
        yield from checks.operands()
        yield from checks.transfers()
    for once in (*index.by_name["number_tokens"], *index.by_name["advance_lengths"]):
        yield from compare(once, {"lengths": LENGTHS, "token_mask": token_mask_of(ctx)})


class _Layer:
    """Compares what the ops of one layer take with what they should."""

    def __init__(
        self,
        index: OpIndex,
        layer: LayerOps,
        ctx: PassContext,
        facts: frozenset[Fact],
        names: StateNames,
    ) -> None:
        self._index = index
        self._layer = layer
        self._ctx = ctx
        by_forecast = ctx.strategy.selects_by_forecast
        self._is_forecast = by_forecast and Fact.FORECAST_INSERTED in facts
        assert ctx.layout is not None
        number, kind = layer.shape.layer, kind_of(layer.shape, ctx.layout)
        self._state = {name: state_name(name, number) for name in names.of_kind[kind]}
        self._mine = names_of(number, self._state)
        of_summary = names.of_summary[kind] if layer.shape.kind != "window" else {}
        self._summaries: dict[str, list[Operand]] = {
            summary: [self._state[name] for name in tensors]
            for summary, tensors in of_summary.items()
        }
        self._own: Operands = {}
        self._hints: dict[str, Operands] = {}
        self._of_hint = {op: HINT.of(op.node) for op in layer.ops if HINT.on(op.node)}

    def sources(self, own_ids: dict[int, Any]) -> Iterator[str]:
        """Find out what is selected and planned, and yield what does not come from this layer.

        Args:
            own_ids: What each layer selects, by layer; this one is added.
        """
        yield from self._site()
        plan = self._layer.one("plan")
        if plan is None:
            return
        number = self._layer.shape.layer
        chosen: Op | None = plan
        if plan.name == "plan_pages":
            chosen = self._index.ops.get(plan.args["block_ids"])
        is_own = chosen is not None and chosen.layer == number and chosen not in self._of_hint
        if chosen is None or chosen.name not in _SELECTIONS or not is_own:
            taken = f"{plan.node.name} takes {words_of(plan.args['block_ids'])}"
            yield f"{taken} as its block_ids, no selection of layer {number}"
            return
        scored = self._index.ops.get(chosen.args.get("scores"))  # type: ignore[arg-type]
        is_own = scored is not None and scored.layer == number and scored not in self._of_hint
        if "scores" in chosen.args and not is_own:
            taken = f"{chosen.node.name} takes {words_of(chosen.args['scores'])}"
            yield f"{taken} as its scores, not those of layer {number}"
            return
        own_ids[number] = ids = (plan.node.name, 0) if chosen is plan else chosen.node.name
        self._own |= {**results_of_op(plan), "block_ids": ids}
        self._own["scores"] = scored.node.name if scored else None
        for name, (hint, source) in hints_of(self._layer.shape, self._ctx).items():
            borrowed = own_ids.get(source.layer) if hint.borrows_ids else None
            self._hints[name] = self._hint_operands(name, borrowed)

    def _hint_operands(self, hint: str, borrowed: Any) -> Operands:
        """Return what the ops of a hint take where the layer's own take something else."""
        mine = [op for op, name in self._of_hint.items() if name == hint]
        by_name = {op.name: op.node.name for op in mine}
        first = next((by_name[n] for n in _GUESSES if n in by_name), None)
        scores = by_name.get("mix_scores", by_name.get("score_blocks"))
        found: Operands = {"scores": scores, "block_ids": first if borrowed is None else borrowed}
        self._own |= {"asked": by_name["score_blocks"]} if "mix_scores" in by_name else {}
        plans = [op for op in self._layer.by_role.get("hint plan", ()) if op in mine]
        return {**(results_of_op(plans[0]) if plans else {}), **found}

    def _site(self) -> Iterator[str]:
        """Take query, key and value from the site that the layer's attention carries."""
        number = self._layer.shape.layer
        sites = self._index.sites.get(number, [])
        ops = [op.node for op in self._layer.ops if op.name in _ATTENTIONS]
        if sites != ops or len(sites) != 1:
            found = f"the site of layer {number} is carried by {words_of(sites)}"
            yield f"{found}, not by {words_of(ops)}"
            return
        site = SITE.of(sites[0])
        self._own |= {**self._state, "lengths": LENGTHS, "token_mask": token_mask_of(self._ctx)}
        self._own |= {"query": site.query.name, "k": site.k.name, "v": site.v.name}
        assert self._ctx.layout is not None
        kept = self._ctx.layout.staying_keys(number)
        self._own |= {name: self._state[name] if name in kept else None for name in STAYING_KEYS}
        self._own["tail"] = self._state.get("tail")
        self._own["new_kv"] = [] if self._ctx.is_decode else [site.k.name, site.v.name]
        # Every layer takes those of the first one, so that there is no use for another.
        numbered = self._index.by_name["number_tokens"][:1]
        names = results_of(numbered[0].node) if numbered else ()
        tokens: list[Operand] = [(numbered[0].node.name, i) for i in range(len(names))]
        self._own |= {**dict(zip(names, tokens, strict=True)), "tokens": tokens}
        if not self._ctx.is_decode:
            picked = self._layer.one("select_tokens")
            self._own["block_ids"] = picked.node.name if picked else None
            self._own["tail_page"] = None
            self._own |= {"near_ids": None, "near_scores": None}
            for role in ("select_past", "stage_blocks"):
                made = self._layer.one(role)
                self._own |= results_of_op(made) if made else {}
        for role in ("attend_resident", "attend_predicted"):
            self._own |= results_of_op(op) if (op := self._layer.one(role)) else {}

    def operands(self) -> Iterator[str]:
        """Yield which op takes what it should not."""
        for op in self._layer.ops:
            hint = self._hints.get(self._of_hint.get(op, ""), {})
            expected = {**self._own, **hint}
            if op.name in _SCORING:
                expected = {**expected, "summary": self._summary_of(op)}
                if self._is_forecast or op in self._of_hint:
                    del expected["query"]
                    yield from self._early_query(op)
                if op.name == "select_past":
                    picked = self._layer.one("select_tokens")
                    query = picked.args["query"] if picked else None
                    expected["query"] = getattr(query, "name", None)
            elif op.name == "update_summary":
                expected = {**expected, "tensors": self._summaries.get(op.args["summary"], [])}
            elif op.name in ("store_blocks", "offload_blocks") and self._ctx.is_decode:
                expected = {**expected, "block_table": None}
            elif op.name == "stage_blocks":
                near = self._own["near_ids"]
                expected = {**expected, "block_ids": near or expected["block_ids"]}
            elif op.name in _WRITERS:
                expected = {**expected, "pages": self._state.get("tail", self._state["pages"])}
            elif op.name == "record_event":
                expected = {"inputs": marked(op, self._layer)}
            elif op.name == "predict_ahead":
                expected = {**expected, "lengths": self._own.get("totals", LENGTHS)}
            yield from wrong_numbers(op, self._ctx)
            yield from compare(op, expected, self._mine)
        updated = [op.args["summary"] for op in self._layer.by_role.get("update_summary", ())]
        if sorted(updated) != sorted(self._summaries):
            yield f"{self._layer.title} updates {updated}, and not {sorted(self._summaries)}"

    def _summary_of(self, scores: Op) -> list[Operand]:
        return self._summaries.get(SELECTORS[scores.args["selector"]].summary.name, [])

    def _early_query(self, scores: Op) -> Iterator[str]:
        """What is scored before the layer's query exists was made for the layer."""
        query, number = scores.args["query"], self._layer.shape.layer
        if LAYER.get(query) != number:
            yield f"{scores.node.name} scores by {words_of(query)}, not made for layer {number}"
        elif HINT.get(query) != self._of_hint.get(scores):
            yield f"{scores.node.name} scores by {words_of(query)}, which is of another hint"

    def transfers(self) -> Iterator[str]:
        """Yield which wait or fork lacks something of its copy."""
        return wrong_transfers(self._index, self._layer, self._of_hint, self._buffers)

    def _buffers(self, copy: Op) -> list[str]:
        """Return what the wait for a copy takes: what it fills, and what choosing it used."""
        if names := marked_state(copy, self._layer, self._state):
            return names
        if copy.name == "offload_blocks":
            return [self._state[name] for name in full_state(self._ctx, copy)]
        if self._ctx.strategy.repairs and copy not in self._of_hint:
            return [self._state["pages"]]
        used = [str(name) for names in self._summaries.values() for name in names]
        hints = hints_of(self._layer.shape, self._ctx)
        if (name := self._of_hint.get(copy)) in hints:
            assert self._ctx.layout is not None
            own = hints[name][0].state(self._ctx.layout, self._layer.shape)
            used += [self._state[tensor] for tensor in own]
        tables = _TABLES if self._ctx.is_decode else ("block_table",)
        return [*(self._state[name] for name in (*pools(self._ctx, copy), *tables)), *used]
