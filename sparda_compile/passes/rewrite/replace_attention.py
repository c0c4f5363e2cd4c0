"""ReplaceAttention: attention reads selected blocks of a paged KV cache.

Decode, mode `query`; one layer before:

    %kv_update = sparda.kv_update(%k, %v, 0)
    %attn = scaled_dot_product_attention(%q, %key, %value, attn_mask=%mask)

after (every copy still in line, so the graph is correct as it stands):

    %scores = sparda.score_blocks(%q, [%pooled_k, %recent_k], %lengths, "infllm2", ...)
    %block_ids = sparda.select_blocks(%scores, %lengths, 96, 64, 1, 32)
    %plan = sparda.plan_pages(%block_ids, %lengths, %block_table, ...)
    sparda.fetch_blocks(%miss_blocks, %miss_pages, %host, %pages)              with offload
    sparda.append_kv(%k, %v, %tail_page, %lengths, %pages)
    sparda.update_summary(%k, %lengths, None, [%pooled_k, %recent_k], "pooled_keys", ...)
    %attn = sparda.sparse_attention(%q, %pages, %page_ids, %block_ids, %lengths, scale, softcap)
    sparda.store_blocks([], %tail_page, None, %lengths, None, %pages, %host, ...)   with offload

Prefill attends densely, then extends the cache:

    %attn = sparda.prefill_attention(%q, %k, %v, %token_mask, %lengths, %pages, %host, ...)
    sparda.extend_kv(%k, %v, None, %token_mask, %lengths, %pages, %block_table, ...)

Sparse prefill selects for each token what a decode step would select there:

    sparda.update_summary(%k, %lengths, %token_mask, [%pooled_k, %recent_k], "pooled_keys", ...)
    %block_ids = sparda.select_tokens(%q, [%pooled_k, %recent_k], %token_mask, %lengths, ...)
    %attn = sparda.attend_tokens(%q, %k, %v, %block_ids, %token_mask, %lengths, %pages, ...)
    sparda.extend_kv(%k, %v, %block_ids, %token_mask, %lengths, %pages, %block_table, ...)

A layer with a sliding window becomes `sparda.window_attention` over a ring. The last node of the
graph is `sparda.advance_lengths`. Masks that nobody reads any more are erased.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import fx

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.graph.tags import SITE
from sparda_compile.passes.base import Fact, PassContext, PassResult

if TYPE_CHECKING:
    from sparda_compile.state.layout import CacheLayout, LayerShape
from sparda_compile.graph.nodes import replace_and_erase
from sparda_compile.graph.writer import (
    StateInputs,
    geometry_of,
    plan_pages,
    select_by_score,
    select_for_tokens,
)

__all__ = ["ReplaceAttention"]


@dataclasses.dataclass(frozen=True)
class ReplaceAttention:
    """Rewrite every tagged site. Counts: sparse, window, erased."""

    name: ClassVar[str] = "replace_attention"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_TAGGED})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTENTION_REPLACED})
    preserves_numerics: ClassVar[bool] = False

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph in place."""
        assert ctx.layout is not None
        state = StateInputs(gm.graph, ctx.layout)
        shapes = {shape.layer: shape for shape in ctx.layout.layers}
        counts = {"sparse": 0, "window": 0, "erased": 0}
        for site in sites_of(gm.graph):
            emitter = Emitter(gm.graph, site.anchor, site.anchor, site.layer)
            rewrite = _Rewrite(site, shapes[site.layer], emitter, state, ctx)
            new = rewrite.window() if site.window else rewrite.sparse()
            SITE.put(new, site)
            counts[site.kind] += 1
            counts["erased"] += replace_and_erase(gm.graph, site.anchor, new)
            _loosen_views(new)
        output = next(n for n in gm.graph.nodes if n.op == "output")
        mask = None if ctx.is_decode else state.token_mask()
        last = Emitter(gm.graph, output, sites_of(gm.graph)[-1].query, -1)
        last.call("advance_lengths", mask, state.lengths, name="advance_lengths")
        return PassResult(gm, modified=True, counts=counts)


# What changes the shape or the order of an attention's output, and no number in it.
_LAYOUT: Final = ("transpose", "permute", "contiguous", "reshape", "view", "flatten")


def _loosen_views(node: fx.Node) -> None:
    """Let what views the output of an attention copy it instead, where its strides are others.

    Our ops return [B, H, T, D] as it lies in memory; the attention that they stand for had the
    strides of its query, and a model may count on them.
    """
    for user in node.users:
        if user.op != "call_method" or user.target not in _LAYOUT:
            continue
        if user.target == "view" and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"
        _loosen_views(user)


@dataclasses.dataclass(frozen=True)
class _Rewrite:
    """One site being rewritten."""

    site: AttentionSite
    shape: LayerShape
    emitter: Emitter
    state: StateInputs
    ctx: PassContext

    def window(self) -> fx.Node:
        site, state = self.site, self.state
        mask = None if self.ctx.is_decode else state.token_mask()
        rings = (state.get("ring_k", site.layer), state.get("ring_v", site.layer))
        return self.emitter.call(
            "window_attention",
            site.query,
            site.k,
            site.v,
            mask,
            state.lengths,
            *rings,
            site.scale,
            site.softcap,
        )

    def sparse(self) -> fx.Node:
        return self._decode() if self.ctx.is_decode else self._prefill()

    def _decode(self) -> fx.Node:
        site, emit, lengths = self.site, self.emitter, self.state.lengths
        layout = self._layout
        block_ids = self._select()
        plan = plan_pages(emit, block_ids, self.state, layout, is_hint=False)
        if layout.offload:
            emit.call(
                "fetch_blocks",
                plan.miss_blocks,
                plan.miss_pages,
                self._get("host"),
                self._get("pages"),
            )
        emit.call("append_kv", site.k, site.v, plan.tail_page, lengths, self._get("pages"))
        self._update_summaries(None)
        out = emit.call(
            "sparse_attention",
            site.query,
            self._get("pages"),
            plan.page_ids,
            block_ids,
            lengths,
            site.scale,
            site.softcap,
        )
        if layout.offload:
            emit.call(
                "store_blocks",
                [],
                plan.tail_page,
                None,
                lengths,
                None,
                self._get("pages"),
                self._get("host"),
                self._get("counters"),
            )
        return out

    def _prefill(self) -> fx.Node:
        site, emit, lengths = self.site, self.emitter, self.state.lengths
        config, mask = self.ctx.config, self.state.token_mask()
        pages, host, table = self._get("pages"), self._get("host"), self._get("block_table")
        past = (mask, lengths, pages, host, table, site.scale, site.softcap)
        block_ids = None
        if self.ctx.is_sparse_prefill:
            self._update_summaries(mask)
            block_ids = self._select_for_tokens()
            out = emit.call("attend_tokens", site.query, site.k, site.v, block_ids, *past)
        else:
            known = self.state.known_to_the_host()
            out = emit.call("prefill_attention", site.query, site.k, site.v, *past, *known)
        emit.call(
            "extend_kv",
            site.k,
            site.v,
            block_ids,
            mask,
            lengths,
            pages,
            table,
            self._get("page_block"),
            self._get("page_stamp"),
            config.sink_blocks,
            config.local_blocks,
            config.eviction,
        )
        if block_ids is None:
            self._update_summaries(mask)
        if self._layout.offload:
            emit.call(
                "store_blocks",
                [site.k, site.v],
                None,
                mask,
                lengths,
                table,
                pages,
                host,
                self._get("counters"),
            )
        return out

    def _select_for_tokens(self) -> fx.Node:
        site, first = self.site, self.ctx.strategy.first_selector
        return select_for_tokens(
            self.emitter, site.query, first, site.scale, self.shape, self.state, self._layout
        )

    def _select(self) -> fx.Node:
        config, site = self.ctx.config, self.site
        strategy = self.ctx.strategy
        if strategy.selector is None:
            return self.emitter.call(
                "all_blocks",
                self._get("block_table"),
                self.state.lengths,
                config.block_size,
                name=f"block_ids_{site.layer}",
            )
        return select_by_score(
            self.emitter,
            site.query,
            strategy.first_selector,
            site.scale,
            self.shape,
            self.state,
            self._layout,
        )

    def _update_summaries(self, mask: fx.Node | None) -> None:
        for summary in self._layout.summaries():
            tensors = [self._get(n) for n in self._layout.summary_tensors(summary, self.shape)]
            self.emitter.call(
                "update_summary",
                self.site.k,
                self.state.lengths,
                mask,
                tensors,
                summary,
                *geometry_of(self._layout),
            )

    @property
    def _layout(self) -> CacheLayout:
        assert self.ctx.layout is not None
        return self.ctx.layout

    def _get(self, tensor: str) -> fx.Node:
        return self.state.get(tensor, self.site.layer)
