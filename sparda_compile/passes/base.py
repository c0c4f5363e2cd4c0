"""What a pass is: graph in, graph out, and a count of what it did."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.cache_layout import CacheLayout
    from sparda_compile.config import SpardaConfig
    from sparda_compile.machine import Machine
    from sparda_compile.schedule import Schedule

__all__ = ["AttentionSite", "Fact", "GraphPass", "PassContext", "PassResult"]


class Fact(enum.Enum):
    """What holds of a graph. Passes require facts and ensure facts."""

    SITES_TAGGED = "every attention carries an AttentionSite"
    ATTENTION_REPLACED = "attention reads selected blocks of the KV cache"
    FORECAST_INSERTED = "blocks are scored by a Forecast where the mode says so"
    PROJECTIONS_FUSED = (
        "projections of one input, one small, are one matrix multiplication on a GPU"
    )
    TRANSFERS_ASYNC = "copies have a start and a wait"
    SELECTION_FUSED = "a selection and its plan are one op where they can be"
    TRANSFERS_SCHEDULED = "every transfer has its place and its stream"
    TRANSFERS_VERIFIED = "no two conflicting accesses are unordered"


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of the model, as nodes of the graph.

    Attributes:
        layer: Index of the decoder layer.
        module: Path of the attention module.
        form: `sdpa` or `eager`.
        anchor: Node whose value is the attention output [B, H, T, D].
        query: [B, H, T, D], after rotation.
        k: New keys [B, G, T, D], after rotation.
        v: New values [B, G, T, D].
        hidden: [B, T, hidden], the tensor that feeds the query projection.
        projection: The linear that makes the query.
        rotation_input: Where the rotation of the query begins; `query` itself if there is none.
        rotation: Nodes from `rotation_input` (left out) to `query`.
        num_heads: H.
        num_groups: G.
        head_dim: D.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        window: Sliding window in tokens, 0 for none.
    """

    layer: int
    module: str
    form: str
    anchor: fx.Node
    query: fx.Node
    k: fx.Node
    v: fx.Node
    hidden: fx.Node
    projection: fx.Node
    rotation_input: fx.Node
    rotation: tuple[fx.Node, ...]
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    softcap: float
    window: int

    @property
    def kind(self) -> str:
        """`window` for a sliding window, which stays dense; else `sparse`."""
        return "window" if self.window else "sparse"

    def mapped(self, change: Callable[[fx.Node], fx.Node]) -> AttentionSite:
        """Return the site with something else in the place of each node."""
        nodes: dict[str, Any] = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), fx.Node)
        }
        return dataclasses.replace(self, **nodes, rotation=tuple(map(change, self.rotation)))


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What passes may know besides the graph.

    Attributes:
        config: The user's configuration.
        phase: `prefill` or `decode`.
        windows: Sliding window of each layer from the model's config, 0 for none; a layer that
            is not named has none.
        model: Class name of the model, for messages.
        layout: Sizes of the KV cache, with a sample number of sequences; None only before
            FindAttention has run.
        machine: Constants that the scheduler plans with.
        batch_size: Sequences that the schedule is made for.
    """

    config: SpardaConfig
    phase: str
    windows: dict[int, int]
    model: str
    layout: CacheLayout | None
    machine: Machine
    batch_size: int = 1

    @property
    def is_decode(self) -> bool:
        """Whether the graph takes one token per sequence."""
        return self.phase == "decode"


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        graph_module: The rewritten graph; the same object when edited in place.
        modified: Whether anything changed.
        counts: What was counted, for logs, reports and tests.
        schedule: The predicted schedule, from ScheduleTransfers alone.
    """

    graph_module: fx.GraphModule
    modified: bool
    counts: dict[str, int]
    schedule: Schedule | None = None


class GraphPass(Protocol):
    """One rewrite of the graph; runs once."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]]
    ensures: ClassVar[frozenset[Fact]]
    preserves_numerics: ClassVar[bool]

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite the graph."""
