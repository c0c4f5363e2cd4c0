"""The ops that stand for one attention; `replace_attention.py` shows them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparda_compile.graph.writer import (
    StateInputs,
    fetch_format_of,
    geometry_of,
    page_format_of,
    plan_pages,
    read_format_of,
    select_by_score,
    select_for_tokens,
    stage_blocks,
    store_format_of,
    written_pool,
)

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.graph.emit import Emitter
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["SiteRewrite"]


@dataclasses.dataclass(frozen=True)
class SiteRewrite:
    """One attention that becomes ops; each method adds the nodes and returns the new attention.

    Attributes:
        site: The attention.
        shape: Its part of the KV cache.
        emitter: Where nodes go.
        state: The cache's tensors.
        ctx: What passes know.
    """

    site: AttentionSite
    shape: LayerShape
    emitter: Emitter
    state: StateInputs
    ctx: PassContext

    def window(self) -> fx.Node:
        """Attend to the ring of a sliding window."""
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
        """Attend to blocks of the paged cache: selected ones in decode, all or selected before."""
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
                **fetch_format_of(layout, site.layer, self.state),
            )
        written, kind = written_pool(layout, site.layer, self.state)
        emit.call("append_kv", site.k, site.v, plan.tail_page, lengths, written, **kind)
        self._update_summaries([])
        out = emit.call(
            "sparse_attention",
            site.query,
            self._get("pages"),
            plan.page_ids,
            block_ids,
            lengths,
            site.scale,
            site.softcap,
            **page_format_of(layout, site.layer, self.state),
        )
        if layout.stores(site.layer):
            emit.call(
                "store_blocks",
                [],
                plan.tail_page,
                [],
                lengths,
                None,
                self._get("pages"),
                self._get("host"),
                self._get("counters"),
                **store_format_of(layout, site.layer, self.state),
            )
        return out

    def _prefill(self) -> fx.Node:
        site, emit, lengths = self.site, self.emitter, self.state.lengths
        config, mask, tokens = self.ctx.config, self.state.token_mask(), self.state.tokens()
        pages, host, table = self._get("pages"), self._get("host"), self._get("block_table")
        block_ids = None
        if self.ctx.is_sparse_prefill:
            self._update_summaries(tokens)
            block_ids = self._select_for_tokens()
            out = self._attend_tokens(block_ids, tokens)
        else:
            out = emit.call(
                "prefill_attention",
                site.query,
                site.k,
                site.v,
                mask,
                lengths,
                pages,
                host,
                table,
                site.scale,
                site.softcap,
                self.state.num_past(),
                self.state.may_hide(),
                **read_format_of(self._layout, site.layer, self.state),
            )
        written, kind = written_pool(self._layout, site.layer, self.state)
        emit.call(
            "extend_kv",
            site.k,
            site.v,
            block_ids,
            tokens,
            lengths,
            written,
            table,
            self._get("page_block"),
            self._get("page_stamp"),
            config.sink_blocks,
            config.local_blocks,
            config.eviction,
            **kind,
        )
        if block_ids is None:
            self._update_summaries(tokens)
        if self._layout.stores(site.layer):
            emit.call(
                "store_blocks",
                [site.k, site.v],
                None,
                tokens,
                lengths,
                table,
                pages,
                host,
                self._get("counters"),
                **store_format_of(self._layout, site.layer, self.state),
            )
        return out

    def _attend_tokens(self, block_ids: fx.Node, tokens: list[fx.Node]) -> fx.Node:
        site, emit, lengths = self.site, self.emitter, self.state.lengths
        staged = stage_blocks(emit, block_ids, self.state, self._layout)
        written, kind = written_pool(self._layout, site.layer, self.state)
        return emit.call(
            "attend_tokens",
            site.query,
            site.k,
            site.v,
            block_ids,
            tokens,
            lengths,
            *staged,
            written,
            self._get("block_table"),
            site.scale,
            site.softcap,
            **kind,
        )

    def _select_for_tokens(self) -> fx.Node:
        site, first = self.site, self.ctx.strategy.in_prompts.first_selector
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

    def _update_summaries(self, tokens: list[fx.Node]) -> None:
        for summary in self._layout.summaries(self.site.layer):
            tensors = [self._get(n) for n in self._layout.summary_tensors(summary, self.shape)]
            self.emitter.call(
                "update_summary",
                self.site.k,
                self.state.lengths,
                tokens,
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
