"""The program writer: state inputs, page plans and selections."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from sparda_compile.graph.effects import argument, results_of, set_argument, takes
from sparda_compile.graph.emit import Emitter, new_fake
from sparda_compile.graph.nodes import fake_value, find_ops
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.selectors import SELECTORS
from sparda_compile.state.layout import LENGTHS, CacheLayout, LayerShape, state_name

__all__ = [
    "MAY_HIDE",
    "NUM_PAST",
    "TOKEN_MASK",
    "PagePlan",
    "StateInputs",
    "add_scores",
    "add_selection",
    "fetch_format_of",
    "geometry_of",
    "page_format_of",
    "plan_pages",
    "read_format_of",
    "select_by_score",
    "select_for_tokens",
    "select_past",
    "stage_blocks",
    "store_format_of",
    "written_pool",
]


TOKEN_MASK = "sparda_token_mask"
# What the caller of a prefill knows without asking the device.
NUM_PAST = "sparda_num_past"
MAY_HIDE = "sparda_may_hide"


class StateInputs:
    """The state tensors of a cache as placeholders of a graph, added when first asked for."""

    def __init__(self, graph: fx.Graph, layout: CacheLayout) -> None:
        self._graph = graph
        self._specs = layout.all_tensors()
        self._nodes: dict[str, fx.Node] = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        self._tokens: list[fx.Node] = []

    def get(self, tensor: str, layer: int) -> fx.Node:
        """Return a layer's tensor."""
        return self._input(state_name(tensor, layer))

    @property
    def lengths(self) -> fx.Node:
        """Tokens per sequence before this step, [B] int32."""
        return self._input(LENGTHS)

    def token_mask(self) -> fx.Node:
        """Which tokens of a prefill are real, [B, T] bool."""
        ids = next(n for n in self._nodes.values() if "input_ids" in n.name)
        return self.add(TOKEN_MASK, tuple(fake_value(ids).shape), torch.bool)

    def add(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
        """Return the placeholder of that name, made if it is not there."""
        if name not in self._nodes:
            like = next(n for n in self._nodes.values() if isinstance(fake_value(n), torch.Tensor))
            self._placeholder(name, new_fake(fake_value(like), shape, dtype))
        return self._nodes[name]

    def tokens(self) -> list[fx.Node]:
        """Return the results of `number_tokens`, which is put before all else when first asked for.

        Every layer takes them: positions [B, T], columns [B, T] and totals [B], int32.
        """
        if not self._tokens:
            numbered = find_ops(self._graph, "number_tokens")
            if numbered:
                chosen = {node.args[1]: node for node in numbered[0].users}
                self._tokens = [chosen[i] for i in range(len(results_of(numbered[0])))]
            else:
                self._tokens = self._number_tokens()
        return self._tokens

    def _number_tokens(self) -> list[fx.Node]:
        mask, lengths = self.token_mask(), self.lengths
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        emit = Emitter(self._graph, first, first, -1)
        node = emit.call("number_tokens", mask, lengths, name="number_tokens")
        return [emit.item(node, i, f"token_{n}") for i, n in enumerate(results_of(node))]

    def num_past(self) -> fx.Node:
        """Most tokens that a sequence of the cache has, known to the host."""
        return self._number(NUM_PAST, 0)

    def may_hide(self) -> fx.Node:
        """Whether the mask may hide some token, known to the host."""
        return self._number(MAY_HIDE, True)

    def _number(self, name: str, sample: int) -> fx.Node:
        if name not in self._nodes:
            self._placeholder(name, sample)
        return self._nodes[name]

    def _placeholder(self, name: str, value: Any) -> None:
        last: fx.Node = next(reversed(self._nodes.values()))
        with self._graph.inserting_after(last):
            node = self._graph.placeholder(name)
        node.meta["val"] = value
        self._nodes[name] = node

    def _input(self, name: str) -> fx.Node:
        spec = self._specs[name]
        if spec.on_host and spec.num_bytes and self._device.type != "cpu":
            # Addresses, one per sequence and head: see runtime/transfer.py.
            return self.add(name, spec.shape[:2], torch.int64)
        return self.add(name, spec.shape, spec.dtype)

    @property
    def _device(self) -> torch.device:
        values = (fake_value(n) for n in self._nodes.values())
        device: torch.device = next(v for v in values if isinstance(v, torch.Tensor)).device
        return device


@dataclasses.dataclass(frozen=True)
class PagePlan:
    """The results of a `plan_pages` node."""

    node: fx.Node
    page_ids: fx.Node
    is_miss: fx.Node
    miss_blocks: fx.Node
    miss_pages: fx.Node
    tail_page: fx.Node


def plan_pages(
    emit: Emitter,
    block_ids: fx.Node,
    state: StateInputs,
    layout: CacheLayout,
    prefix: str = "",
    *,
    is_hint: bool,
) -> PagePlan:
    """Add a `plan_pages` and the choice of each of its results."""
    names = ("block_table", "page_block", "page_stamp", "counters")
    tables = [state.get(name, emit.layer) for name in names]
    node = emit.call(
        "plan_pages",
        block_ids,
        state.lengths,
        *tables,
        layout.config.block_size,
        layout.config.eviction,
        is_hint,
        name=f"{prefix}plan_{emit.layer}",
    )
    items = {
        name: emit.item(node, i, f"{prefix}{name}_{emit.layer}")
        for i, name in enumerate(results_of(node))
    }
    return PagePlan(node, **items)


def select_by_score(
    emit: Emitter,
    query: fx.Node,
    selector: str,
    scale: float,
    shape: LayerShape,
    state: StateInputs,
    layout: CacheLayout,
    prefix: str = "",
) -> fx.Node:
    """Add `score_blocks` and `select_blocks`; returns the ids."""
    scores = add_scores(emit, query, selector, scale, shape, state, layout, prefix)
    return add_selection(emit, scores, shape, state, layout, prefix)


def add_scores(
    emit: Emitter,
    query: fx.Node,
    selector: str,
    scale: float,
    shape: LayerShape,
    state: StateInputs,
    layout: CacheLayout,
    prefix: str = "",
) -> fx.Node:
    """Add `score_blocks`; returns the scores."""
    summary = SELECTORS[selector].summary.name
    tensors = [state.get(n, shape.layer) for n in layout.summary_tensors(summary, shape)]
    scores = emit.call(
        "score_blocks",
        query,
        tensors,
        state.lengths,
        selector,
        scale,
        *geometry_of(layout),
        name=f"{prefix}scores_{shape.layer}",
    )
    if layout.geometry.short_list:
        for name in ("short_list", "sink_blocks", "local_blocks"):
            set_argument(scores, name, getattr(layout.geometry, name))
    return scores


def add_selection(
    emit: Emitter,
    scores: fx.Node,
    shape: LayerShape,
    state: StateInputs,
    layout: CacheLayout,
    prefix: str = "",
) -> fx.Node:
    """Add `select_blocks`; returns the ids."""
    config = layout.config
    return emit.call(
        "select_blocks",
        scores,
        state.lengths,
        layout.num_selected,
        config.block_size,
        config.sink_blocks,
        config.local_blocks,
        name=f"{prefix}block_ids_{shape.layer}",
    )


def select_for_tokens(
    emit: Emitter,
    query: fx.Node,
    selector: str,
    scale: float,
    shape: LayerShape,
    state: StateInputs,
    layout: CacheLayout,
) -> fx.Node:
    """Add `select_tokens`, which picks the blocks of each token of a prompt; returns the ids."""
    config = layout.config
    summary = SELECTORS[selector].summary.name
    ids = emit.call(
        "select_tokens",
        query,
        [state.get(n, shape.layer) for n in layout.summary_tensors(summary, shape)],
        state.tokens()[0],
        state.lengths,
        state.num_past(),
        selector,
        scale,
        *geometry_of(layout),
        layout.num_selected,
        config.sink_blocks,
        config.local_blocks,
        name=f"block_ids_{shape.layer}",
    )
    if layout.geometry.short_list:
        set_argument(ids, "short_list", layout.geometry.short_list)
    if config.shared_tokens > 1:
        set_argument(ids, "shared", config.shared_tokens)
    num_candidates = config.num_candidates(layout.num_blocks)
    if num_candidates:
        set_argument(ids, "num_candidates", num_candidates)
    return ids


def select_past(emit: Emitter, picked: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Add `select_past` with what a `select_tokens` takes; returns the ids and their scores."""
    names = INSTRUCTIONS["select_past"].places
    shared = [argument(picked, name) for name in names if takes(picked, name)]
    node = emit.call("select_past", *shared, name=f"past_{emit.layer}")
    ids, scores = _items(emit, node)
    return ids, scores


def stage_blocks(
    emit: Emitter, block_ids: fx.Node, state: StateInputs, layout: CacheLayout
) -> tuple[fx.Node, fx.Node]:
    """Add `stage_blocks` for what tokens of a prompt select; returns the buffer and its slots."""
    node = emit.call(
        "stage_blocks",
        block_ids,
        state.lengths,
        *(state.get(name, emit.layer) for name in ("pages", "host", "block_table")),
        state.num_past(),
        name=f"stage_{emit.layer}",
        **read_format_of(layout, emit.layer, state),
    )
    staging, slots = _items(emit, node)
    return staging, slots


def _items(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Add the choice of each result of a node."""
    return [emit.item(node, i, f"{name}_{emit.layer}") for i, name in enumerate(results_of(node))]


def read_format_of(layout: CacheLayout, layer: int, state: StateInputs) -> dict[str, Any]:
    """Return the arguments of what reads full blocks of a layer from wherever they are.

    Their format, keys that stay, and `tail` beside pages of stored runs. None where blocks keep the
    model's dtype, as for `page_format_of`.
    """
    return {**fetch_format_of(layout, layer, state), **store_format_of(layout, layer, state)}


def fetch_format_of(layout: CacheLayout, layer: int, state: StateInputs) -> dict[str, Any]:
    """Return the arguments of what copies full blocks of a layer to pages.

    None where pages hold what CPU memory does: blocks move as they are.
    """
    if layout.has_stored_pages(layer):
        return {}
    kept = {name: state.get(name, layer) for name in layout.staying_keys(layer)}
    return {**_format_of(layout, layer), **kept}


def page_format_of(layout: CacheLayout, layer: int, state: StateInputs) -> dict[str, Any]:
    """Return the arguments of what reads pages of a layer alone.

    None where these hold the model's dtype.
    """
    return store_format_of(layout, layer, state) if layout.has_stored_pages(layer) else {}


def store_format_of(layout: CacheLayout, layer: int, state: StateInputs) -> dict[str, Any]:
    """Return the arguments of what stores full blocks of a layer: their format, and `tail`."""
    tail = {"tail": state.get("tail", layer)} if layout.has_stored_pages(layer) else {}
    return {**_format_of(layout, layer), **tail}


def _format_of(layout: CacheLayout, layer: int) -> dict[str, str]:
    """Return the argument that says how full blocks of a layer are written.

    None where they keep the model's dtype: that is the default of the ops that take it.
    """
    found = layout.kv_format(layer)
    return {"kv_format": found.name} if found.rounds else {}


def written_pool(
    layout: CacheLayout, layer: int, state: StateInputs
) -> tuple[fx.Node, dict[str, Any]]:
    """Return the pool that new tokens of a layer are written to, and what says which one it is."""
    if layout.has_stored_pages(layer):
        return state.get("tail", layer), {"is_tail": True}
    return state.get("pages", layer), {}


def geometry_of(layout: CacheLayout) -> tuple[int, int, int, int]:
    """Return the sizes that ops on summaries take: blocks, block, pooled window and its stride."""
    g = layout.geometry
    return g.num_blocks, g.block_size, g.pool_size, g.pool_stride
