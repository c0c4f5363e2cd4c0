"""What a pass is: graph in, graph out, and a count of what it did."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, fx

from sparda_compile.state.strategy import Strategy, strategy_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.config import SpardaConfig
    from sparda_compile.passes.machine import Machine
    from sparda_compile.report.schedule import Schedule
    from sparda_compile.state.layout import CacheLayout

__all__ = ["Fact", "GraphPass", "PassContext", "PassResult"]


class Fact(enum.Enum):
    """What holds of a graph. Passes require facts and ensure facts."""

    SITES_TAGGED = "every attention carries an AttentionSite"
    ATTENTION_REPLACED = "attention reads selected blocks of the KV cache"
    FORECAST_INSERTED = "blocks are scored by a Forecast where the mode says so"
    PROJECTIONS_FUSED = (
        "projections of one input, one small, are one matrix multiplication on a GPU"
    )
    TRANSFERS_ASYNC = "copies have a start and a wait"
    SPECULATION_INSERTED = "attention begins with predicted blocks where the mode says so"
    SELECTION_FUSED = "a selection and its plan are one op where they can be"
    TRANSFERS_SCHEDULED = "every transfer has its place and its stream"
    TRANSFERS_VERIFIED = "no two conflicting accesses are unordered"


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What passes may know besides the graph.

    Attributes:
        config: The user's configuration.
        phase: `prefill`, `sparse_prefill` or `decode`.
        windows: Sliding window of each layer from the model's config, 0 for none; a layer that
            is not named has none.
        model: Class name of the model, for messages.
        layout: Sizes of the KV cache, with a sample number of sequences; None only before
            FindAttention has run.
        machine: Constants that the scheduler plans with.
        batch_size: Sequences that the schedule is made for.
        weights: Values of the graph's placeholders, by name, for the proof of each attention.
        reach: Tokens that a text may have, beyond which no mask is proved; 0 for any number.
    """

    config: SpardaConfig
    phase: str
    windows: dict[int, int]
    model: str
    layout: CacheLayout | None
    machine: Machine
    batch_size: int = 1
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, repr=False)
    reach: int = 0

    @property
    def strategy(self) -> Strategy:
        """What the mode means."""
        return strategy_of(self.config)

    @property
    def is_decode(self) -> bool:
        """Whether the graph takes one token per sequence."""
        return self.phase == "decode"

    @property
    def is_sparse_prefill(self) -> bool:
        """Whether each token of a prompt reads blocks of its own."""
        return self.phase == "sparse_prefill"


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
