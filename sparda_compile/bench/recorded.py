"""Selections that follow what a model selected on real text, stretched to a benchmark's length.

A recorded step has K of F blocks that can be chosen; the benchmark's has f * K of n >= f * F. So
the recorded context stands f times in the long one, at even distances, and each copy reads its own:

    block i of F, copy c    block  first + c * floor(n / f) + i
    layer l of L            layer  floor(l * L_recorded / L)
    KV head g, sequence b   head g mod G_recorded of text b mod D, begun at a step of its own

The map is one to one, so what a step has in common with the one before is what the recorded steps
have, in each layer exactly, and blocks that were neighbours still are. What is not real are the
length itself, and that the f copies change at the same steps.

Dimensions: L layers, S steps, G KV heads, K chosen blocks, B sequences, N blocks, D texts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.bench.synthetic import trace_steps_of
from sparda_compile.bench.trace import TRACE
from sparda_compile.errors import ConfigError
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.traces import Recording, TraceFile

__all__ = ["RecordedSteps", "choose_cases", "follow_recorded"]


@dataclasses.dataclass(frozen=True)
class RecordedSteps:
    """Recordings of one selector and budget, and how often each stands in the long context.

    Attributes:
        case: Selector and budget.
        recordings: One for each text.
        copies: f.
    """

    case: str
    recordings: tuple[Recording, ...]
    copies: int

    @property
    def scored(self) -> int:
        """Blocks that a step of the benchmark chooses."""
        return self.copies * self.recordings[0].ids_LSGK.shape[-1]

    def check(self, config: SpardaConfig, num_tokens: int, needed: int) -> None:
        """Refuse what a benchmark cannot follow.

        Args:
            config: Of the benchmark.
            num_tokens: Tokens at the first step.
            needed: Steps that are run.

        Raises:
            ConfigError: If a text has fewer steps, or the copies do not fit.
        """
        num_free = _num_free(config, num_tokens)
        largest = max(each.num_free for each in self.recordings)
        if largest > num_free // self.copies:
            raise ConfigError(
                f"{self.copies} copies of {largest} blocks do not fit the {num_free} that can be "
                f"chosen in {num_tokens} tokens; use {max(num_free // largest, 1)} or fewer, or "
                "more tokens."
            )
        fewest = min(each.ids_LSGK.shape[1] for each in self.recordings)
        if fewest < needed:
            raise ConfigError(
                f"the trace has {fewest} steps, fewer than the {needed} that are run; use fewer "
                "steps, or record more."
            )

    def overlap(self) -> float:
        """Return the mean overlap of all steps, layers and texts."""
        layers = [layer for each in self.recordings for layer in each.overlap_by_layer()]
        return sum(layers) / len(layers)

    def plain(self) -> dict[str, Any]:
        """Return what is followed, for JSON."""
        return {
            "case": self.case,
            "copies": self.copies,
            "scored": self.scored,
            "recorded_scored": self.recordings[0].ids_LSGK.shape[-1],
            "recorded_free": self.recordings[0].num_free,
            "texts": [
                {"name": each.text, "sha256": each.sha256, "overlap": _mean(each)}
                for each in self.recordings
            ],
        }


def choose_cases(
    traces: TraceFile, names: Sequence[str], copies: int | None, top_k: int
) -> list[RecordedSteps]:
    """Return the recordings to follow.

    Args:
        traces: What was recorded.
        names: Of cases, such as `infllm2 10%`; empty for all.
        copies: How often each stands in the long context; None comes nearest to `top_k`.
        top_k: Blocks that a step would choose without a trace.

    Raises:
        ConfigError: If there is no such case, or they choose different numbers of blocks.
    """
    cases = traces.cases()
    unknown = [name for name in names if name not in cases]
    if unknown:
        raise ConfigError(
            f"trace_case={unknown[0]!r} is not in the trace; use some of {', '.join(cases)}."
        )
    found = []
    for name in names or cases:
        recordings = tuple(cases[name])
        chosen = recordings[0].ids_LSGK.shape[-1]
        found.append(RecordedSteps(name, recordings, copies or max(round(top_k / chosen), 1)))
    counts = {each.case: each.scored for each in found}
    if len({*counts.values()}) > 1:
        words = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ConfigError(
            f"the cases of the trace choose different numbers of blocks in a step ({words}); name "
            "some that do not by trace_case, or run them one by one."
        )
    return found


def follow_recorded(kv: KVCache, num_tokens: int, steps: RecordedSteps, needed: int) -> list[float]:
    """Write recorded steps into a cache whose selection follows a trace; see `bench.trace`.

    Args:
        kv: The cache.
        num_tokens: Tokens at the first step.
        steps: What to follow.
        needed: Steps that are run; behind them the trace begins again.

    Returns:
        For each layer the share of a step's scored blocks that the step before chose too, over
        the steps that are run and all sequences.

    Raises:
        ConfigError: If a text has fewer steps, or the copies do not fit.
    """
    config, room = kv.layout.config, trace_steps_of(kv.layout)
    assert kv.layout.num_selected - config.num_forced == steps.scored
    steps.check(config, num_tokens, needed)
    first = config.sink_blocks
    apart = _num_free(config, num_tokens) // steps.copies
    overlaps = []
    for number, shape in enumerate(kv.layout.layers):
        trace = kv.state[state_name(TRACE, shape.layer)]
        trace.zero_()
        batch, groups = trace.shape[:2]
        ids = _ids(steps, number / len(kv.layout.layers), (batch, groups), needed)
        starts_F1 = torch.arange(steps.copies)[:, None] * apart + first
        spread = (ids[..., None, :] + starts_F1).flatten(-2).to(kv.state[LENGTHS].device)
        for step in range(needed):
            named = trace[:, :, (num_tokens + step) % room]
            named.scatter_(-1, spread[:, :, step], True)
        kept = (ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]).any(-1)
        overlaps.append(float(kept.double().mean()))
    return overlaps


def _ids(steps: RecordedSteps, place: float, size: tuple[int, int], needed: int) -> Tensor:
    """Return the recorded ids of a layer, [B, G, S, K] int64, counted from the first free block.

    Args:
        steps: What to follow.
        place: Of the layer among all, from 0 on and less than 1.
        size: B and G.
        needed: S.
    """
    batch, groups = size
    recordings = steps.recordings
    rounds = -(-batch // len(recordings))
    rows = []
    for row in range(batch):
        recording = recordings[row % len(recordings)]
        ids_SGK = recording.ids_LSGK[int(place * len(recording.ids_LSGK))].long()
        spare = len(ids_SGK) - needed
        begin = spare * (row // len(recordings)) // max(rounds - 1, 1)
        heads = torch.arange(groups) % ids_SGK.shape[1]
        rows.append(ids_SGK[begin : begin + needed, heads] - recording.sink_blocks)
    return torch.stack(rows).transpose(1, 2)


def _num_free(config: SpardaConfig, num_tokens: int) -> int:
    """Return the blocks that a step can choose."""
    return num_tokens // config.block_size - config.local_blocks - config.sink_blocks


def _mean(recording: Recording) -> float:
    layers = recording.overlap_by_layer()
    return round(sum(layers) / len(layers), 4)
