"""FindAttention: tag every attention of the graph with an `AttentionSite`.

Matches by data flow, not by template, so one walk serves every model:

    anchor      scaled_dot_product_attention, or matmul(P, V) where P comes from a softmax of
                matmul(Q, K^T)
    keys        back from the anchor over repeats and transposes to `sparda::kv_update`, or, for
                a module without a cache, to the tensor that the repeats begin with
    hidden      the nearest node through which query, key and value all get what they know of the
                input (a dominator); behind a fused projection, the input of that projection
    rotation    the nodes that mix positions into the query

Before, and after (only names and metadata change):

    %kv_update : call_function[sparda.kv_update](%k_0, %v_0, 0)
    %attn : call_function[scaled_dot_product_attention](%query_0, %key, %value, ...)
    %SITE.put(attn, AttentionSite(layer=0, query=query_0, hidden=hidden_0, ...))

Every site is proved by running its nodes (`attention_proof.py`), and its mask at every distance
(`mask_proof.py`). Attention that this library does
not implement raises AttentionNotFoundError with the layer, the module and what was in the way:
multi-head latent attention, sinks, biases, ALiBi, projections that are no linear.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

from torch import fx

from sparda_compile.errors import AttentionNotFoundError, UnsupportedInputError
from sparda_compile.graph.nodes import find_ops, module_path, tensor_shape
from sparda_compile.graph.site import AttentionSite
from sparda_compile.graph.tags import SITE
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.find.anchors import (
    Anchor,
    marker_of,
    match_anchor,
    scale_of,
    softcap_of,
    unrepeated,
    why_unmatched,
)
from sparda_compile.passes.find.attention_proof import ends_in_one, find_difference
from sparda_compile.passes.find.dataflow import Dataflow, RefusedAttentionError
from sparda_compile.passes.find.mask_proof import MaskProof, changed_by_position

__all__ = ["FindAttention"]

_NOT_CACHED: Final = (
    "its keys are not those of the KV cache, as in multi-head latent attention (MLA) and "
    "cross-attention"
)
_SHARED: Final = "it shares the KV cache of layer {layer}, as with Gemma-3n's num_kv_shared_layers"


@dataclasses.dataclass(frozen=True)
class FindAttention:
    """Tag attention sites. Counts: sites, sparse, window."""

    name: ClassVar[str] = "find_attention"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_TAGGED})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Tag sites; raise AttentionNotFoundError, or UnsupportedInputError for the selector."""
        flow = Dataflow(gm.graph)
        masks = None if ctx.is_decode else MaskProof(flow, ctx.weights, ctx.reach)
        markers = find_ops(gm.graph, "kv_update")
        anchors = [a for a in (match_anchor(n, flow) for n in gm.graph.nodes) if a]
        sites: list[AttentionSite] = []
        claimed: set[fx.Node] = set()
        for anchor in anchors:
            marker = marker_of(anchor)
            if markers and marker is None:
                raise self._refusal(ctx, anchor.node, len(sites), _NOT_CACHED)
            layer = marker.args[2] if marker else len(sites)
            assert isinstance(layer, int)
            if marker is not None and marker in claimed:
                raise self._refusal(ctx, anchor.node, len(sites), _SHARED.format(layer=layer))
            try:
                site = self._site(anchor, marker, layer, flow, ctx)
                _check_mask(anchor, site, marker, flow, masks)
            except RefusedAttentionError as refused:
                raise self._refusal(ctx, anchor.node, layer, str(refused)) from None
            if marker is not None:
                claimed.add(marker)
            self._check_retention(site, ctx)
            SITE.put(anchor.node, site)
            _name_nodes(site)
            sites.append(site)
        for marker in markers:
            if marker not in claimed:
                reason = why_unmatched(marker)
                raise self._refusal(ctx, marker, int(str(marker.args[2])), reason)
        if not sites:
            raise AttentionNotFoundError(
                f"{ctx.model} has no attention: no scaled_dot_product_attention and no "
                "softmax(Q K^T) V in its graph, so there is no KV cache to optimize."
            )
        sparse = sum(site.kind == "sparse" for site in sites)
        counts = {"sites": len(sites), "sparse": sparse, "window": len(sites) - sparse}
        return PassResult(gm, modified=True, counts=counts)

    def _refusal(
        self, ctx: PassContext, node: fx.Node, layer: int, reason: str
    ) -> AttentionNotFoundError:
        where = module_path(node) or "the module"
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        kind = getattr(stack[-1][1], "__name__", str(stack[-1][1])) if stack else "attention"
        return AttentionNotFoundError(
            f"{ctx.model}: layer {layer} ({where}, {kind}) is an attention that sparda_compile "
            f"does not implement: {reason}. The model was left as it was; see docs/models.md for "
            "what is covered."
        )

    def _check_retention(self, site: AttentionSite, ctx: PassContext) -> None:
        """Refuse selector `nosa` for queries that do not end in the constant 1."""
        selector = ctx.strategy.selector
        reads = selector is not None and selector.reads_retention
        if not reads or site.window or not ctx.is_decode:
            return
        assert selector is not None
        if not ends_in_one(site.query, site.projection, ctx.weights):
            raise UnsupportedInputError(
                f"{ctx.model}: selector={selector.name!r} reads a retention score from the last "
                f"channel of each key, and layer {site.layer} ({site.module}) has none: "
                "the last channel of its queries is not always 1. Use selector='infllm2' or "
                "'quest', or a model that carries the score; see docs/models.md."
            )

    def _site(
        self,
        anchor: Anchor,
        marker: fx.Node | None,
        layer: int,
        flow: Dataflow,
        ctx: PassContext,
    ) -> AttentionSite:
        k, v = _new_kv(anchor, marker)
        _check_shapes(anchor.query, k, v)
        hidden, projection = flow.hidden(anchor.query, k, v)
        known_kv = _cached_nodes(marker, k, v)
        softcap = softcap_of(anchor, ctx.weights)
        scale = scale_of(anchor, k, known_kv, softcap, ctx.weights)
        window = ctx.windows.get(layer, 0)
        difference = find_difference(
            anchor.node,
            anchor.query,
            k,
            v,
            known_kv,
            ctx.weights,
            scale=scale,
            softcap=softcap,
            window=window,
        )
        if difference:
            raise RefusedAttentionError(difference)
        rotation_input, rotation = flow.rotation(hidden, anchor.query)
        return AttentionSite(
            layer=layer,
            module=module_path(anchor.node),
            form=anchor.form,
            anchor=anchor.node,
            query=anchor.query,
            k=k,
            v=v,
            hidden=hidden,
            projection=projection,
            rotation_input=rotation_input,
            rotation=rotation,
            num_heads=int(tensor_shape(anchor.query)[1]),
            num_groups=int(tensor_shape(k)[1]),
            head_dim=int(tensor_shape(k)[3]),
            scale=scale,
            softcap=softcap,
            window=window,
        )


def _check_mask(
    anchor: Anchor,
    site: AttentionSite,
    marker: fx.Node | None,
    flow: Dataflow,
    masks: MaskProof | None,
) -> None:
    """Refuse an attention whose mask, at some distance, is not the one that the rewrite has."""
    cached = (site.query, *_cached_nodes(marker, site.k, site.v))
    reason = changed_by_position(anchor, flow, cached)
    if masks is not None:  # the one token of a decode sees itself
        reason = reason or masks.difference(anchor, site.window)
    if reason:
        raise RefusedAttentionError(reason)


def _name_nodes(site: AttentionSite) -> None:
    """Give the nodes of a site names that say what they are."""
    for word in ("hidden", "query", "k", "v"):
        node: fx.Node = getattr(site, word)
        if node.op != "placeholder":
            node._rename(f"{word}_{site.layer}")


def _new_kv(anchor: Anchor, marker: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    if marker is not None:
        k, v = marker.args[0], marker.args[1]
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        return k, v
    query_shape = tensor_shape(anchor.query)
    if len(query_shape) != 4:
        raise RefusedAttentionError(f"its query has shape {query_shape}, not [B, heads, T, D]")
    key = anchor.key
    if anchor.form == "eager" and tensor_shape(key)[-1] != query_shape[3]:
        key = key.all_input_nodes[0]  # K^T
    return unrepeated(key, query_shape[1]), unrepeated(anchor.value, query_shape[1])


def _cached_nodes(marker: fx.Node | None, k: fx.Node, v: fx.Node) -> dict[fx.Node, fx.Node]:
    """Return the nodes that hand out cached keys and values -> the new ones."""
    if marker is None:
        return {k: k, v: v}
    return {user: (k, v)[int(str(user.args[1]))] for user in marker.users}


def _check_shapes(query: fx.Node, k: fx.Node, v: fx.Node) -> None:
    q_shape, k_shape, v_shape = (tensor_shape(n) for n in (query, k, v))
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        raise RefusedAttentionError(
            f"query, key and value are not all [B, heads, T, D] but {q_shape} {k_shape}"
        )
    if q_shape[3] != k_shape[3] or k_shape[3] != v_shape[3]:
        raise RefusedAttentionError(
            f"query, key and value heads have different widths ({q_shape[3]}, {k_shape[3]}, "
            f"{v_shape[3]}), as in multi-head latent attention (MLA)"
        )
    if len({shape[2] for shape in (q_shape, k_shape, v_shape)}) > 1:
        raise RefusedAttentionError(
            f"{q_shape[2]} query tokens meet {k_shape[2]} keys and {v_shape[2]} values of one "
            "call, as with attention sinks and cross-attention"
        )
    if q_shape[1] % k_shape[1] or k_shape[1] != v_shape[1]:
        raise RefusedAttentionError(
            f"{q_shape[1]} query heads do not divide into {k_shape[1]} KV heads"
        )
