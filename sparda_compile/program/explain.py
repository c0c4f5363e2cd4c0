"""Make a `Report` from plans."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.graph.nodes import fake_value, module_path
from sparda_compile.graph.tags import JOINED
from sparda_compile.graph.text import graph_text
from sparda_compile.passes.schedule.expected_blocks import expected_repair
from sparda_compile.program.chunks import RESERVE, chunk_sizes, largest_chunk
from sparda_compile.program.lower import lower
from sparda_compile.program.memory import prompt_memory
from sparda_compile.program.plan import forecast_shapes
from sparda_compile.program.prompt_graphs import MOST_BYTES, longest_short
from sparda_compile.program.rank_order import collectives_of
from sparda_compile.ranks.shards import local_of, splits_heads
from sparda_compile.report.model import LayerPlan, PassSummary, Report, SiteSummary
from sparda_compile.report.text import selection_sentence, speculation_sentence

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparda_compile.config import SpardaConfig
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.program.plan import Plan
    from sparda_compile.report.model import PromptMemory
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["build_report", "refused_report"]

_TABLES = ("block_table", "page_block", "page_stamp", "counters")


def build_report(
    model: nn.Module, prefill: Plan, decode: Plan, memory_bytes: int | None = None
) -> Report:
    """Return what is known about a rewritten model.

    Args:
        model: The model.
        prefill: Its plan for a prompt.
        decode: Its plan for steps.
        memory_bytes: Memory of the GPU; None is no limit.
    """
    layout = decode.layout
    schedules = [p.schedule for p in (decode, prefill) if p.schedule is not None]
    shapes = forecast_shapes(decode)
    num_ranks = decode.captured.ranks.size
    weights = _weight_bytes(model, decode, [shape.num_weights for shape in shapes.values()])
    room = None
    if memory_bytes is not None:
        room = memory_bytes - weights - layout.num_bytes(on_host=False)
    return Report(
        model=type(model).__name__,
        mode=layout.config.mode,
        batch_size=layout.batch_size,
        max_tokens=layout.max_tokens,
        sites=tuple(_site(s) for s in decode.sites),
        layers=tuple(_layer(layout, shape) for shape in layout.layers),
        passes=tuple(s for plan in (prefill, decode) for s in _passes(plan)),
        schedules=tuple(schedules),
        forecast_parameters=sum(shape.num_weights for shape in shapes.values()),
        model_parameters=sum(p.numel() for p in model.parameters()),
        selection_starts_at=layout.config.selection_starts_at,
        selection=selection_sentence(layout.config, layout.max_tokens),
        weight_bytes=weights,
        prompt=_prompt_memory(prefill, room),
        speculation=_speculation(decode),
        num_ranks=num_ranks,
        kv_copies=1 if splits_heads(model) else num_ranks,
        collectives=_collectives(decode),
        kv_format=_formats(layout),
        has_stored_pages=any(layout.has_stored_pages(shape.layer) for shape in layout.layers),
        page_reason=layout.page_reason,
        machine=decode.machine.name,
    )


def _formats(layout: CacheLayout) -> str:
    """Return the formats of full blocks, each with its layers where there are several."""
    layers: dict[str, list[str]] = {}
    for shape in layout.layers:
        if shape.kind == "sparse":
            layers.setdefault(layout.kv_format(shape.layer).name, []).append(str(shape.layer))
    if len(layers) < 2:
        name = next(iter(layers), "model")
        return f"{name} (auto: {layout.format_reason})" if layout.format_reason else name
    return "; ".join(
        f"{name} in layer{'s' if len(of) > 1 else ''} {', '.join(of)}"
        for name, of in layers.items()
    )


def _collectives(decode: Plan) -> str:
    """Return what ranks do together in a step, in words; nothing for a single process."""
    found = Counter(text.split()[0] for text in collectives_of(decode.graph_module.graph))
    return ", ".join(f"{count} {name}" for name, count in found.items())


def _speculation(decode: Plan) -> str:
    """Return which layers speculate, in a sentence; nothing in modes that do not."""
    counts = next((s.counts for s in decode.stages if s.name == "insert_speculation"), None)
    if decode.layout.strategy.predictor is None:
        return ""
    if counts is None:
        return "Nothing is predicted: disable_passes leaves insert_speculation out."
    layout = decode.layout
    machine = decode.machine.name
    said = speculation_sentence(counts["speculated"], counts["left"], layout.num_predicted, machine)
    return f"{said} {_repair(layout)}" if counts["speculated"] else said


def _repair(layout: CacheLayout) -> str:
    """Return how many blocks are expected to be repaired, and what becomes of the others."""
    late = expected_repair(layout, layout.config.expected_overlap)
    in_vain = max(layout.num_predicted - (layout.num_selected - late), 0.0)
    kept = "left out of the result" if layout.config.repair == "exact" else "kept in the result"
    return (
        f"Of {layout.num_selected} selected blocks {late:.0f} are expected to be repaired, and "
        f"of those predicted {in_vain:.0f} to be {kept}."
    )


def _prompt_memory(prefill: Plan, room: int | None) -> PromptMemory:
    """Return the memory of the last chunk of a prompt that fills the KV cache.

    Args:
        prefill: The plan.
        room: Bytes that it may take, which choose the chunk where the configuration does not.
    """
    most, config = prefill.layout.max_tokens, prefill.layout.config
    program = lower(prefill.graph_module, "eager")

    def memory(chunk: int) -> PromptMemory:
        num_tokens = max(min(chunk, most), 2)
        return prompt_memory(prefill, num_tokens, max(most - num_tokens, 0), program=program)

    def fits(chunk: int) -> bool:
        return room is None or memory(chunk).peak_bytes * RESERVE <= room

    chunk = config.chunk_tokens or most
    if config.chunk_tokens is None and not fits(most):
        chunk = largest_chunk(config, most, fits) or chunk_sizes(config, most)[-1]
    found, longest = memory(chunk), min(longest_short(prefill.layout.batch_size), most)
    kept = 0
    if config.cuda_graph and prefill.machine.overlaps and longest > 1:
        kept = min(memory(longest).peak_bytes, MOST_BYTES)
    return dataclasses.replace(found, room_bytes=room, kept_bytes=kept)


def _weight_bytes(model: nn.Module, decode: Plan, forecasts: list[int]) -> int:
    joined = JOINED.get(decode.graph_module, {})
    copies = [n for n in decode.graph_module.graph.nodes if n.name in joined]
    itemsize = next(model.parameters()).dtype.itemsize
    return (
        sum(map(_bytes, (*model.parameters(), *model.buffers())))
        + sum(_bytes(fake_value(node)) for node in copies)
        + sum(forecasts) * itemsize
    )


def _bytes(tensor: Tensor) -> int:
    tensor = local_of(tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def refused_report(
    model: nn.Module, config: SpardaConfig, batch_size: int, max_tokens: int, error: str
) -> Report:
    """Return the report of a model that cannot be rewritten."""
    parameters = sum(p.numel() for p in model.parameters())
    return Report(
        type(model).__name__,
        config.mode,
        batch_size,
        max_tokens,
        (),
        (),
        (),
        (),
        0,
        parameters,
        error,
    )


def _site(site: AttentionSite) -> SiteSummary:
    reason = (
        f"sliding window of {site.window} tokens: all of it is read, so it stays on the device"
        if site.window
        else ""
    )
    return SiteSummary(
        layer=site.layer,
        module=site.module,
        form=site.form,
        kind=site.kind,
        reason=reason,
        num_heads=site.num_heads,
        num_groups=site.num_groups,
        head_dim=site.head_dim,
        scale=site.scale,
        window=site.window,
        softcap=site.softcap,
        projection=module_path(site.projection),
        position="rope" if site.rotation else "none",
    )


def _layer(layout: CacheLayout, shape: LayerShape) -> LayerPlan:
    specs = layout.tensors(shape)
    device = {n: s.num_bytes for n, s in specs.items() if not s.on_host}
    pages = sum(device.get(n, 0) for n in ("pages", "tail", "ring_k", "ring_v"))
    hinted = [n for kept in layout.strategy.keepers for n in kept.state(layout, shape)]
    tables = sum(device.get(n, 0) for n in (*_TABLES, *hinted))
    return LayerPlan(
        layer=shape.layer,
        host_bytes=sum(s.num_bytes for s in specs.values() if s.on_host),
        page_bytes=pages,
        summary_bytes=sum(device.values()) - pages - tables,
        table_bytes=tables,
    )


def _passes(plan: Plan) -> list[PassSummary]:
    summaries: list[PassSummary] = []
    before, nodes_before = "", 0
    for stage, graph in zip(plan.stages, plan.graphs(), strict=True):
        text, nodes = graph_text(graph), len(graph.nodes)
        if stage is not plan.stages[0]:
            summaries.append(
                PassSummary(
                    phase=plan.phase,
                    name=stage.name,
                    counts=stage.counts,
                    ms=stage.ms,
                    nodes_before=nodes_before,
                    nodes_after=nodes,
                    before=before,
                    after=text,
                )
            )
        before, nodes_before = text, nodes
    return summaries
