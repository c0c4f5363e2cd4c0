"""What `auto` stands for in `kv_format` and `page_format`, by the size of a cache.

    link = B * sum over layers of G * scored * fresh * bytes of a block / link rate
    rest = (weights + summaries) / memory rate + blocks read, unpacked or not + latencies
    step = max(link, rest) in modes that copy beside compute, else link + rest

`fresh` is `CacheLayout.fresh_share` at `expected_overlap`, blocks that a step finds without a page.

Choices are the formats, each with the kinds of pages that are allowed. Of `kv_format="auto"` they
are the package's formats whose error is allowed: 3% of RMS, or what `auto:PERCENT` says. With
`page_format="auto"` a format has pages of the model's dtype and, if it rounds whole blocks, stored
ones.

A cache that has to be in CPU memory takes the most exact format of those whose step is within 5% of
the fastest. What does not fit `host_bytes` or `device_bytes` is left out where something does. Of
one format the faster pages are taken, those of the model's dtype if both are as fast.

A cache that may stay on the device does, if a choice fits `device_bytes`: in the model's dtype if
that fits, else in the most exact format that does. Pages of the model's dtype are as large in every
format, so that such a cache is rounded on stored pages alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.base import allowed_error
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparda_compile.formats.base import BlockFormat
    from sparda_compile.passes.machine import Machine
    from sparda_compile.state.layout import CacheLayout

__all__ = ["with_format"]

# A format is left for a more exact one that is expected to be at most so much slower.
_MARGIN: Final = 1.05
_NO_COPIES: Final = "so that no block is copied"
# Kernels of the model in a layer of a decode step.
_KERNELS: Final = 6


def with_format(layout: CacheLayout, machine: Machine, weight_bytes: int) -> CacheLayout:
    """Return a layout whose format and pages are known.

    Args:
        layout: Of a configuration whose `kv_format` and `page_format` may be `auto`.
        machine: Constants to plan with.
        weight_bytes: Of the model.

    Raises:
        ConfigError: If full blocks would have to be in CPU memory in every choice, and the mode
            wants them on the device.
    """
    allowed, pages = allowed_error(layout.config.kv_format), layout.config.page_format
    if allowed is None and pages != "auto":
        return layout
    choices = _choices(layout, allowed)
    resident = [each for each in choices if each.stays_on_device]
    steps = {each: _step_us(each, machine, weight_bytes) for each in resident or choices}
    fits = [each for each in steps if _fits(each)] or list(steps)
    if not resident:
        fastest = min(steps[each] for each in fits)
        fits = [each for each in fits if steps[each] <= _MARGIN * fastest]
    chosen = min(fits, key=lambda each: (_error(each), steps[each]))
    format_reason = "" if allowed is None else _why_format(chosen, choices[0], steps)
    if format_reason and not resident and pages == "model":
        other = with_format(_with(layout, layout.config.kv_format, "auto"), machine, weight_bytes)
        if other.stays_on_device:
            name = other.config.kv_format
            format_reason += f"; page_format='auto' would keep it on the device, in {name}"
    chosen = dataclasses.replace(chosen, format_reason=format_reason)
    if pages != "auto":
        return chosen
    return dataclasses.replace(chosen, page_reason=_why_pages(chosen, choices, steps))


def _choices(layout: CacheLayout, allowed: float | None) -> list[CacheLayout]:
    """Return the layout with each format and kind of pages that is allowed.

    The model's dtype comes first, of formats and of the pages of each.
    """
    given = layout.config.page_format
    kinds = ("model", "stored") if given == "auto" else (given,)
    plain = _with(layout, "model", kinds[0])
    formats: list[Any] = [layout.config.kv_format]
    if allowed is not None:
        formats = [each.name for each in _candidates(plain, allowed)]
    found = []
    for name in formats:
        first = _with(layout, name, kinds[0])
        others = [_with(layout, name, kind) for kind in kinds[1:] if _may_be_stored(first)]
        found += [first, *others]
    return found


def _with(layout: CacheLayout, kv_format: Any, page_format: Any) -> CacheLayout:
    config = layout.config.replace(kv_format=kv_format, page_format=page_format)
    return dataclasses.replace(layout, config=config)


def _formats_of(layout: CacheLayout) -> list[BlockFormat]:
    """Return the format of each layer with blocks."""
    return [layout.kv_format(shape.layer) for shape in layout.layers if shape.kind == "sparse"]


def _may_be_stored(layout: CacheLayout) -> bool:
    """Whether pages of stored runs are allowed, and others than those of the model's dtype."""
    formats = _formats_of(layout)
    return any(f.rounds for f in formats) and all(f.summary is None for f in formats)


def _error(layout: CacheLayout) -> float:
    """Return the error of the least exact layer."""
    return max((each.error for each in _formats_of(layout) if each.rounds), default=0.0)


def _fits(layout: CacheLayout) -> bool:
    """Whether a cache fits the memory that it may take."""
    config = layout.config
    return all(
        most is None or layout.num_bytes(on_host=on_host) <= most
        for on_host, most in ((True, config.host_bytes), (False, config.device_bytes))
    )


def _why_format(chosen: CacheLayout, plain: CacheLayout, steps: Mapping[CacheLayout, float]) -> str:
    """Say why a format was chosen, given the layout in the model's dtype and estimated steps."""
    config = chosen.config
    if chosen.stays_on_device:
        if _error(chosen):
            return (
                f"the KV cache stays on the device, where it takes {chosen.resident_bytes:,} of "
                f"device_bytes={config.device_bytes:,} and in the model's dtype would take "
                f"{plain.resident_bytes:,}"
            )
        why = "where pages have that dtype" if config.page_format == "model" else _NO_COPIES
        return f"the KV cache is on the device, {why}"
    best: dict[str, float] = {}
    for each, us in steps.items():
        name = str(each.config.kv_format)
        best[name] = min(us, best.get(name, us))
    times = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in best.items())
    return f"milliseconds a step at an overlap of {config.expected_overlap:g}: {times}"


def _why_pages(
    chosen: CacheLayout, choices: Sequence[CacheLayout], steps: Mapping[CacheLayout, float]
) -> str:
    """Say why pages were chosen, given all choices and the estimated steps of some."""
    config = chosen.config
    mine = [each for each in choices if each.config.kv_format == config.kv_format]
    if len(mine) == 1:
        return "such formats have no others"
    if chosen.format_reason and chosen.stays_on_device:
        return "others are as large in every format"
    model, stored = mine
    if model not in steps or (_fits(stored) and not _fits(model)):
        sizes = [
            each.resident_bytes if chosen.stays_on_device else each.num_bytes(on_host=False)
            for each in (stored, model)
        ]
        return (
            f"they take {sizes[0]:,} bytes of device_bytes={config.device_bytes:,}, and pages of "
            f"the model's dtype would take {sizes[1]:,}"
        )
    times = [f"{each.config.page_format} {steps[each] / 1e3:.2f}" for each in mine if each in steps]
    return f"milliseconds a step: {', '.join(times)}"


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
        if not layout.stays_on_device:
            fresh = layout.fresh_share(config.expected_overlap)
            fetched += pairs * layout.num_scored * fresh * stored
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
