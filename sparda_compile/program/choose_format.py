"""The format that `kv_format="auto"` stands for: the most exact one that is about as fast as any.

    link = B * sum over layers of G * scored * (1 - overlap) * bytes of a block / link rate
    rest = (weights + summaries) / memory rate + blocks read, unpacked or not + latencies
    step = max(link, rest) in modes that copy beside compute, else link + rest

Candidates are the package's formats whose error is allowed: 3% of RMS, or what `auto:PERCENT`
says. Of those whose step is within 5% of the fastest, the one with the least error is chosen. What
does not fit `host_bytes` is left out where something does.

A cache on the device keeps the model's dtype: its pages have that in every format, so that rounding
would save nothing there. With `page_format="stored"` it would save memory, but not one copy; name a
format for that.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.base import allowed_error
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from sparda_compile.formats.base import BlockFormat
    from sparda_compile.passes.machine import Machine
    from sparda_compile.state.layout import CacheLayout

__all__ = ["with_format"]

# A format is left for a more exact one that is expected to be at most so much slower.
_MARGIN: Final = 1.05
# Why a cache on the device is not rounded, by `page_format`.
_ON_DEVICE: Final = {"model": "where pages have that dtype", "stored": "so that no block is copied"}
# Kernels of the model in a layer of a decode step.
_KERNELS: Final = 6


def with_format(layout: CacheLayout, machine: Machine, weight_bytes: int) -> CacheLayout:
    """Return a layout whose format is known.

    Args:
        layout: Of a configuration whose `kv_format` may be `auto`.
        machine: Constants to plan with.
        weight_bytes: Of the model.
    """
    allowed = allowed_error(layout.config.kv_format)
    if allowed is None:
        return layout
    plain, page_format = _with(layout, "model"), layout.config.page_format
    if not plain.offload:
        return _with(layout, "model", f"the KV cache is on the device, {_ON_DEVICE[page_format]}")
    steps = {
        found.name: _step_us(_with(layout, found.name), machine, weight_bytes)
        for found in _candidates(plain, allowed)
    }
    most = layout.config.host_bytes
    fits = [n for n in steps if most is None or _with(layout, n).num_bytes(on_host=True) <= most]
    names = fits or list(steps)
    fastest = min(steps[name] for name in names)
    near = [name for name in names if steps[name] <= _MARGIN * fastest]
    chosen = min(near, key=lambda name: (KV_FORMATS[name].error, steps[name]))
    times = ", ".join(f"{name} {steps[name] / 1e3:.2f}" for name in steps)
    overlap = layout.config.expected_overlap
    return _with(layout, chosen, f"milliseconds a step at an overlap of {overlap:g}: {times}")


def _with(layout: CacheLayout, name: str, reason: str = "") -> CacheLayout:
    config = layout.config.replace(kv_format=name)
    return dataclasses.replace(layout, config=config, format_reason=reason)


def _candidates(layout: CacheLayout, allowed: float) -> list[BlockFormat]:
    """Return the formats that are exact enough, run anywhere and fit the model's dtype.

    Keys that stay do so where the selector keeps them anyway: others would take device memory.
    Pages of stored runs have no place for them.
    """
    shapes = [shape for shape in layout.layers if shape.kind == "sparse"]
    found = [KV_FORMATS["model"]]
    for each in KV_FORMATS:
        kept = () if layout.config.page_format == "stored" else layout.scored_summaries()
        needs = {each.summary} - {None, *kept}
        if each.kernels is None or each.error > allowed or needs:
            continue
        try:
            for shape in shapes:
                each.stored(layout.config.block_size, shape.head_dim, shape.dtype)
        except UnsupportedInputError:
            continue
        found.append(each)
    return found


def _step_us(layout: CacheLayout, machine: Machine, weight_bytes: int) -> float:
    """Return what a decode step is expected to take, microseconds."""
    config = layout.config
    fetched, read, pages_us, num_layers = 0.0, float(weight_bytes), 0.0, 0
    for shape in layout.layers:
        if shape.kind != "sparse":
            continue
        num_layers += 1
        pairs = layout.batch_size * shape.num_groups
        stored = layout.stored_bytes(shape.layer, shape.head_dim, shape.dtype)
        fetched += pairs * layout.num_scored * (1.0 - config.expected_overlap) * stored
        pages = pairs * layout.num_selected
        pages_us += machine.pages_us(
            pages * layout.page_bytes(shape), pages * layout.unpacked(shape)
        )
        specs = layout.tensors(shape)
        scoring = (layout.summary_tensors(name, shape) for name in layout.scored_summaries())
        read += sum(specs[name].num_bytes for names in scoring for name in names)
    ops = ("select_pages", "sparse_attention")
    layer_us = sum(map(machine.latency_of, ops)) + _KERNELS * machine.kernel_us
    rest = read / (machine.memory_gbps * 1e3) + pages_us + num_layers * layer_us
    link = fetched / (machine.link_gbps * 1e3)
    return max(link, rest) if machine.overlaps and layout.strategy.overlaps else link + rest
