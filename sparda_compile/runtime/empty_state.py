"""What a cache's tensors hold when no token is there, put back with few launches.

A layer has about ten tensors, so a model of 32 layers would be filled by 300 launches, and the
first token of a prompt would wait for the CPU to issue them. Tensors of one dtype are filled
together instead: with zeros, or from one copy of what equal tensors of all layers hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparda_compile.state.layout import CacheLayout, LayerShape, TensorSpec

__all__ = ["EmptyState"]


class EmptyState:
    """The state of an empty cache.

    Args:
        layout: Sizes of the cache.
        state: Its tensors by graph input name, as they are while it is empty; addresses stay.
    """

    def __init__(self, layout: CacheLayout, state: Mapping[str, Tensor]) -> None:
        self._zeros: dict[torch.dtype, list[Tensor]] = {}
        self._others: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        # By short name and form: layers that are alike share it.
        samples: dict[tuple[str, TensorSpec], Tensor] = {}
        for layer in layout.layers:
            by_summary = _names_of_summaries(layout, layer)
            for short, spec in layout.tensors(layer).items():
                if spec.on_host:
                    continue
                tensor = state[state_name(short, layer.layer)]
                if not spec.fill and short not in by_summary:
                    self._zeros.setdefault(tensor.dtype, []).append(tensor)
                    continue
                if (short, spec) not in samples:
                    samples[short, spec] = tensor.clone()
                targets, sources = self._others.setdefault(tensor.dtype, ([], []))
                targets.append(tensor)
                sources.append(samples[short, spec])
        self._zeros.setdefault(torch.int32, []).append(state[LENGTHS])

    def restore(self) -> None:
        """Let the cache be empty again."""
        for zeros in self._zeros.values():
            torch._foreach_zero_(zeros)
        for targets, sources in self._others.values():
            torch._foreach_copy_(targets, sources)


def _names_of_summaries(layout: CacheLayout, layer: LayerShape) -> set[str]:
    """Return the tensors of a layer that are empty as their summary says."""
    if layer.kind != "sparse":
        return set()
    return {
        name
        for summary in layout.summaries(layer.layer)
        for name in layout.summary_tensors(summary, layer)
    }
