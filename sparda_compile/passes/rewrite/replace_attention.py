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
    sparda.update_summary(%k, %lengths, [], [%pooled_k, %recent_k], "pooled_keys", ...)
    %attn = sparda.sparse_attention(%q, %pages, %page_ids, %block_ids, %lengths, scale, softcap)
    sparda.store_blocks([], %tail_page, [], %lengths, None, %pages, %host, ...)   with offload

Prefill numbers its tokens once, before all layers. Each layer attends densely, then extends the
cache:

    %tokens = sparda.number_tokens(%token_mask, %lengths)
    %attn = sparda.prefill_attention(%q, %k, %v, %token_mask, %lengths, %pages, %host, ...)
    sparda.extend_kv(%k, %v, None, [%positions, ...], %lengths, %pages, %block_table, ...)

Sparse prefill selects for each token what a decode step would select there:

    sparda.update_summary(%k, %lengths, [%positions, ...], [%pooled_k, %recent_k], ...)
    %block_ids = sparda.select_tokens(%q, [%pooled_k, %recent_k], %positions, ...)
    %attn = sparda.attend_tokens(%q, %k, %v, %block_ids, %token_mask, %lengths, %pages, ...)
    sparda.extend_kv(%k, %v, %block_ids, [%positions, ...], %lengths, %pages, %block_table, ...)

A layer with a sliding window becomes `sparda.window_attention` over a ring. The last node of the
graph is `sparda.advance_lengths`. Masks that nobody reads any more are erased.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

import torch
from torch import fx

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import replace_and_erase
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import SITE
from sparda_compile.graph.writer import StateInputs
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.rewrite.site_rewrite import SiteRewrite

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
            rewrite = SiteRewrite(site, shapes[site.layer], emitter, state, ctx)
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

    Our ops return [B, H, T, D] in an order of their own; the attention that they stand for had the
    strides of its query, and a model may count on them.
    """
    for user in node.users:
        if user.op != "call_method" or user.target not in _LAYOUT:
            continue
        if user.target == "view" and not isinstance(user.args[1], torch.dtype):
            user.target = "reshape"
        _loosen_views(user)
