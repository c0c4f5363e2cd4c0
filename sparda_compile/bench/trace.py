"""Selection that follows a trace: how a benchmark sets which blocks a step reads.

    score[g, m]   that of the selector below it, but above all others for the blocks that the trace
                  names in step `length % S`

A trace is one more tensor of a selector's summary, `trace` [B, G, S, N] bool, so programs, caches
and kernels need to know nothing of it: `following` registers a selector that wraps another.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.registry import SELECTORS
from sparda_compile.selectors.base import Selector, Summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig
    from sparda_compile.selectors import Geometry

__all__ = ["TRACE", "following"]

TRACE: Final = "trace"
_BEST: Final = 1e30


class _WithTrace(Summary):
    """A summary and a trace."""

    def __init__(self, inner: Summary, steps: int) -> None:
        self.name = f"{inner.name}_following_{steps}"
        self.kernels = inner.kernels
        self.dtypes = {**inner.dtypes, TRACE: torch.bool}  # type: ignore[misc]
        # Of the trace one step is read, and a plan is to be that of a program without it.
        self.uncounted = inner.uncounted | {TRACE}  # type: ignore[misc]
        self._inner, self._steps = inner, steps

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes behind [B, G]; the trace comes last."""
        return self._inner.shapes(geometry, head_dim) | {TRACE: (self._steps, geometry.num_blocks)}

    def reset(self, tensors: Sequence[Tensor]) -> None:
        """Name no block."""
        self._inner.reset(tensors[:-1])
        tensors[-1].zero_()

    def extend(
        self,
        tensors: Sequence[Tensor],
        k_BGTD: Tensor,
        lengths_B: Tensor,
        token_mask_BT: Tensor | None,
        geometry: Geometry,
    ) -> None:
        """Take in new keys; the trace stays as it is."""
        self._inner.extend(tensors[:-1], k_BGTD, lengths_B, token_mask_BT, geometry)


class _Following(Selector):
    """A selector that finds best what the trace names."""

    def __init__(self, inner: Selector, steps: int) -> None:
        self.name = _name(inner.name, steps)
        self.kernels = (*inner.kernels, "_raise_scores")
        self.summary = _WithTrace(inner.summary, steps)
        self.forecast_selector = _name(inner.forecast_selector, steps)  # type: ignore[misc]
        self.has_short_list = inner.has_short_list  # type: ignore[misc]
        self.reads_retention = inner.reads_retention  # type: ignore[misc]
        self.is_comparable = inner.is_comparable  # type: ignore[misc]
        self.selects_prompts = inner.selects_prompts  # type: ignore[misc]
        self._inner = inner

    @property
    def timed_as(self) -> str:
        """Name of the selector below: a program is planned as it is without the trace."""
        return self._inner.timed_as

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32."""
        trace_BGSN = tensors[-1]
        scores = self._inner.score(query_BHTD, tensors[:-1], lengths_B, scale, geometry)
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        named_BGN = trace_BGSN[rows, :, lengths_B.long() % trace_BGSN.shape[2]]
        return scores.masked_fill(named_BGN, _BEST)


def _name(selector: str, steps: int) -> str:
    return f"{selector}_following_{steps}"


def following(config: SpardaConfig, steps: int) -> SpardaConfig:
    """Return a configuration whose selection follows a trace; the same one in mode `dense`.

    Args:
        config: What to build.
        steps: S, steps of the trace.
    """
    if config.mode == "dense" or steps < 1:
        return config
    for name in (config.selector, SELECTORS[config.selector].forecast_selector):
        if _name(name, steps) not in SELECTORS:
            _register(SELECTORS[name], steps)
    return config.replace(selector=_name(config.selector, steps))


def _register(inner: Selector, steps: int) -> None:
    selector: Selector = SELECTORS.add(_Following(inner, steps))
    if importlib.util.find_spec("triton") is None:
        return
    from sparda_compile.bench.trace_kernel import raise_scores
    from sparda_compile.kernels.gpu.append import SUMMARY_KERNELS
    from sparda_compile.kernels.gpu.extend_summary import PROMPT_SUMMARY_KERNELS
    from sparda_compile.kernels.gpu.score import SCORE_KERNELS

    score, append = SCORE_KERNELS.get(inner.name), SUMMARY_KERNELS.get(inner.summary.name)
    if score is not None:

        def scored(query: Tensor, tensors: Sequence[Tensor], lengths: Tensor, *rest: Any) -> None:
            score(query, tensors[:-1], lengths, *rest)
            raise_scores(tensors[-1], lengths, rest[-1], _BEST)

        SCORE_KERNELS[selector.name] = scored
    if append is not None:
        SUMMARY_KERNELS[selector.summary.name] = lambda k, lengths, tensors, geometry: append(
            k, lengths, tensors[:-1], geometry
        )
    extend = PROMPT_SUMMARY_KERNELS.get(inner.summary.name)
    if extend is not None:
        PROMPT_SUMMARY_KERNELS[selector.summary.name] = lambda *new: extend(
            *new[:-2], new[-2][:-1], new[-1]
        )
