"""The traced forwards of one model, and where their attentions are.

    model --trace--> captured --FindAttention--> sites      once for each phase and configuration

Optimizing, training and benchmarks all begin here.
"""

from __future__ import annotations

import dataclasses
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from sparda_compile.capture.forward import CapturedGraph, capture, share_weights
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.graph.nodes import copy_graph, fake_value, snapshot
from sparda_compile.graph.site import AttentionSite, sites_of
from sparda_compile.passes import PIPELINE
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import Machine, machine_for
from sparda_compile.passes.manager import StageRecord, run_passes
from sparda_compile.program.choose_format import with_format
from sparda_compile.program.joined_weight import JoinedWeight
from sparda_compile.progress import stage
from sparda_compile.ranks.agreement import ranks_of
from sparda_compile.ranks.shards import check_heads, local_of
from sparda_compile.state.layout import CacheLayout, LayerShape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import fx, nn

    from sparda_compile.config import SpardaConfig

__all__ = ["Captures", "FoundSites"]


class Captures:
    """The traced forwards of one model; shared by every module optimized from it.

    Args:
        model: A causal LM of transformers.
        windows: Sliding window of each layer, 0 for none.
        reach: Tokens that a text may have, where a window is left out because it holds all
            positions; 0 for any number.

    Attributes:
        original: The model as it was given, which its owner may change.
        model: A copy of its modules that nobody changes; the weights are the same.
        ranks: The processes that it is sharded over.
    """

    def __init__(self, model: nn.Module, windows: Mapping[int, int], reach: int = 0) -> None:
        self.original = model
        self.model = share_weights(model)
        self.model_name = type(model).__name__
        self.ranks = ranks_of(model)
        check_heads(model, self.ranks.size)
        self.windows = dict(windows)
        self.reach = reach
        self._graphs: dict[tuple[str, bool], CapturedGraph] = {}
        self._found: dict[tuple[str, bool, SpardaConfig], FoundSites] = {}
        # By what finding reads of a configuration.
        self._tagged: dict[Any, tuple[fx.GraphModule, tuple[StageRecord, ...]]] = {}
        # By their sources; each is there for as long as a program has it.
        self._joined: weakref.WeakValueDictionary[tuple[int, ...], JoinedWeight] = (
            weakref.WeakValueDictionary()
        )
        self._machines: dict[str | None, Machine] = {}

    @property
    def vocabulary(self) -> int | None:
        """Token ids that the model has an embedding of; None if it does not say where that is."""
        find: Any = getattr(self.model, "get_input_embeddings", None)
        if find is None:  # a plain module
            return None
        try:
            table = getattr(find(), "weight", None)
        except NotImplementedError:
            # transformers raises it for a class of whose embedding it does not know the name. Such
            # a model runs; only that an id is too large is then said by torch, not before.
            return None
        return None if table is None else int(table.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def machine(self, config: SpardaConfig) -> Machine:
        """Return the constants to plan with: those of the first rank, once they were agreed on."""
        agreed = self._machines.get(config.machine)
        return machine_for(config.machine, self.device) if agreed is None else agreed

    def agree(self, config: SpardaConfig) -> None:
        """Let all ranks plan with the constants of the first one; nothing for a single process."""
        if not self.ranks.is_alone:
            self._machines[config.machine] = self.ranks.from_first(self.machine(config))

    def plan_for(self, config: SpardaConfig, device: torch.device) -> None:
        """Plan with the constants of a device that the model is not on."""
        self._machines[config.machine] = machine_for(config.machine, device)

    @property
    def num_captures(self) -> int:
        """Times that a forward was traced."""
        return len(self._graphs)

    def get(self, phase: str, *, last_logits_only: bool = True) -> CapturedGraph:
        """Return a traced forward, for any number of sequences; traced when first asked for."""
        key = (phase, last_logits_only)
        if key not in self._graphs:
            with stage("capture", f"the {phase}"):
                captured = capture(
                    self.model,
                    phase,
                    last_logits_only=last_logits_only,
                    limits={*self.windows.values(), self.reach},
                )
            self._graphs[key] = dataclasses.replace(captured, joined=self._joined, ranks=self.ranks)
        return self._graphs[key]

    def refresh_joined(self) -> None:
        """Copy the weights that are joined again, whether or not torch counted a change."""
        JoinedWeight.copy_all(list(self._joined.values()))

    def sites(
        self, phase: str, config: SpardaConfig, *, last_logits_only: bool = True
    ) -> FoundSites:
        """Return a traced forward whose attentions are found; no size of a cache changes that.

        Args:
            phase: `prefill` or `decode`.
            config: What to build.
            last_logits_only: Whether it returns the logits of the last token alone.

        Raises:
            AttentionNotFoundError: If the model has no attention, or one that is not implemented.
            UnsupportedInputError: If the model's forward does not use position_ids.
        """
        key = (phase, last_logits_only, config)
        if key not in self._found:
            captured = self.get(phase, last_logits_only=last_logits_only)
            ctx = PassContext(
                config=config,
                phase=phase,
                windows=self.windows,
                reach=self.reach,
                model=self.model_name,
                layout=None,
                machine=self.machine(config),
                weights=captured.weights,
            )
            shared = (phase, last_logits_only, ctx.strategy.selector, config.dump_dir)
            if shared not in self._tagged:
                self._tagged[shared] = _tag(captured, ctx)
            gm, stages = self._tagged[shared]
            machine = partial(self.machine, config)
            weight_bytes = sum(local_of(each).nbytes for each in self.model.parameters())
            self._found[key] = FoundSites(captured, gm, stages, ctx, machine, weight_bytes)
        return self._found[key]


@dataclasses.dataclass(frozen=True)
class FoundSites:
    """A traced forward whose attentions are found.

    Attributes:
        captured: The forward.
        graph_module: Its graph with every attention tagged; shared, so `copy` it to change it.
        stages: How it came to be.
        ctx: What the first pass knew; there is no cache yet.
        machine: Returns the constants to plan with.
        weight_bytes: Of the model's parameters, those of a rank.
    """

    captured: CapturedGraph
    graph_module: fx.GraphModule
    stages: tuple[StageRecord, ...]
    ctx: PassContext
    machine: Callable[[], Machine]
    weight_bytes: int

    def copy(self) -> fx.GraphModule:
        """Return the graph as a copy that passes may change."""
        return snapshot(self.graph_module)

    def records(self) -> list[StageRecord]:
        """Return the stages for one more plan, which shares no graph with others."""
        return [
            dataclasses.replace(stage, rebuild=partial(_copy_of, stage)) for stage in self.stages
        ]

    def layout(self, batch_size: int, max_tokens: int) -> CacheLayout:
        """Return the KV cache of these attentions.

        Args:
            batch_size: Sequences.
            max_tokens: Tokens per sequence.
        """
        shapes = tuple(_layer_shape(s, max_tokens) for s in sites_of(self.graph_module.graph))
        layout = CacheLayout(self.ctx.config, shapes, batch_size, max_tokens)
        return with_format(layout, self.machine(), self.weight_bytes)

    def context(self, layout: CacheLayout) -> PassContext:
        """Return what the passes behind the first one may know."""
        return dataclasses.replace(
            self.ctx,
            layout=layout.traced(),
            batch_size=layout.batch_size,
            # Read again: it may have been calibrated since.
            machine=self.machine(),
        )


def _tag(
    captured: CapturedGraph, ctx: PassContext
) -> tuple[fx.GraphModule, tuple[StageRecord, ...]]:
    """Return a traced forward with its attentions tagged, and how it came to be."""
    gm = captured.copy()
    num_nodes = {"nodes": len(gm.graph.nodes)}
    first = StageRecord("capture", lambda: captured.copy().graph, num_nodes, 0.0)
    stages = run_passes(gm, PIPELINE[:1], ctx, lambda _: gm.graph)
    _check_positions(captured, gm, ctx.model)
    return gm, (first, *stages)


def _copy_of(record: StageRecord) -> fx.Graph:
    return copy_graph(record.graph)


def _layer_shape(site: AttentionSite, max_tokens: int) -> LayerShape:
    window = min(site.window, max_tokens) if site.window else 0
    dtype = fake_value(site.k).dtype
    return LayerShape(site.layer, site.kind, site.num_groups, site.head_dim, window, dtype)


def _check_positions(captured: CapturedGraph, gm: fx.GraphModule, model_name: str) -> None:
    names = [name for name, role in captured.inputs.items() if role == "position_ids"]
    used = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in names and n.users]
    if not used:
        raise UnsupportedInputError(
            f"{model_name}: forward does not use position_ids, so a decode step cannot tell it "
            "where its token stands. Give forward a position_ids argument (absolute positions, "
            "[B, T] int64) and derive every position from it."
        )
