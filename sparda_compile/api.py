"""The data path in one screen: `optimize` and `explain`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparda_compile.checks import whole
from sparda_compile.config import MOST_TOKENS, SpardaConfig
from sparda_compile.errors import (
    AttentionNotFoundError,
    CaptureError,
    ConfigError,
    UnsupportedInputError,
)
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.forecast.weights import fit_forecast, following_weights, load_forecast
from sparda_compile.module.ambient import neutral
from sparda_compile.module.captures_of import captures_of
from sparda_compile.passes import OPTIONAL_PASSES, PIPELINE
from sparda_compile.passes.manager import check_disabled, check_dump_dir
from sparda_compile.program.compiled_piece import start_compiler
from sparda_compile.program.plan import (
    Plan,
    forecast_shapes,
    make_plan,
    planned_capacity,
)
from sparda_compile.program.prompt_cost import prompt_phase
from sparda_compile.program.rank_order import order_of
from sparda_compile.ranks.agreement import ranks_of
from sparda_compile.ranks.shards import local_of
from sparda_compile.report.text import selection_sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.forecast.projection import Projection
    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.program.captures import Captures
    from sparda_compile.report import Report

__all__ = ["explain", "optimize"]

_log = logging.getLogger(__name__)


def optimize(
    model: nn.Module,
    config: SpardaConfig | None = None,
    *,
    forecast: Mapping[int, Tensor] | str | Path | None = None,
) -> OptimizedModule:
    """Rewrite a causal LM so that decode reads selected KV blocks, kept in CPU memory.

    Args:
        model: A causal LM of transformers in eval mode, adapters of PEFT in it or around it
            included; a module `forward(input_ids,
            position_ids) -> logits` that calls scaled_dot_product_attention; or what `optimize`
            returned before, which is then rebuilt for `config` without tracing again. It is left
            as it is; its weights are shared.
        config: What to build; None is `SpardaConfig()`.
        forecast: Forecast weights by target layer: what `train_forecast` returned, full
            projections [G*F*D, hidden], or a file: what it wrote, or a released `.pt` checkpoint.
            They decide the rank where `config.forecast_rank` is None, and F, the heads for each KV
            head, where `config.forecast_heads` is. None takes those that training starts from, with
            a warning.

    Returns:
        A module with the model's `forward` and `generate`, and `.sparda`.

    Raises:
        UnsupportedInputError: If the model is in training mode, an encoder-decoder, or on a
            device that is not supported.
        CaptureError: If its forward cannot be traced as one graph.
        AttentionNotFoundError: If it has no attention, or one that is not implemented.
        ConfigError: If the configuration or the Forecast weights do not fit the model.
    """
    from sparda_compile.module.optimized import OptimizedModule

    with neutral():
        config = _config_of(config)
        ranks = ranks_of(model)
        with ranks.together("optimize") as facts:
            facts["config"] = config.replace(dump_dir=None)
            check_disabled(config.disable_passes, PIPELINE, OPTIONAL_PASSES)
            check_dump_dir(config.dump_dir)
            given = load_forecast(forecast) if isinstance(forecast, (str, Path)) else forecast
            config = following_weights(config, given)
            captures = captures_of(model)
            device = captures.device
            if device.type not in ("cpu", "cuda"):
                raise UnsupportedInputError(
                    f"the model is on {device}; optimize runs on cpu and cuda. "
                    "Call model.to('cuda') first."
                )
        captures.agree(config)
        if config.dump_dir is not None and not ranks.is_alone:
            config = config.replace(dump_dir=str(Path(config.dump_dir) / f"rank{ranks.rank}"))
        with ranks.together("the plan of optimize") as facts:
            if config.lowering == "inductor":
                start_compiler(device)  # while the model is traced
            decode = make_plan(
                captures,
                "decode",
                config,
                batch_size=1,
                max_tokens=planned_capacity(config),
            )
            _warn_if_serial(decode)
            weights = _forecast_weights(captures, decode, given)
            facts |= order_of(decode.graph_module.graph)
        version = model.version if isinstance(model, OptimizedModule) else None
        fast = OptimizedModule(captures, config, weights, decode, version)
        longest = fast.programs.prompt_phase(1, 0, planned_capacity(config))
        phases = (longest, "decode")
        plans = [fast.programs.latest_plan(phase) for phase in phases]
        _log.info(
            "%s: mode %s, %d attentions, %d left dense",
            captures.model_name,
            config.mode,
            len(plans[1].sites),
            sum(bool(site.window) for site in plans[1].sites),
        )
        _log.info("%s", selection_sentence(config, config.max_tokens))
        return fast


def explain(
    model: nn.Module,
    config: SpardaConfig | None = None,
    *,
    batch_size: int = 1,
    max_tokens: int | None = None,
    memory_bytes: int | None = None,
    tp: int = 1,
) -> Report:
    """Say what `optimize` would do, without running the model.

    Args:
        model: As for `optimize`; its weights may be on the meta device.
        config: As for `optimize`.
        batch_size: Sequences to plan for.
        max_tokens: Tokens per sequence to plan for; None is `config.max_tokens`, or 4096.
        memory_bytes: Memory of the GPU, by which the chunks of a prompt are chosen where
            `config.chunk_tokens` is None. None is that of the GPU that the model is on, and no
            limit where it is on none.
        tp: Ranks that transformers would shard the model over; no process is started. Bytes and
            schedules are those of one rank.

    Returns:
        Sites, what stays dense and why, planned bytes, counts of each pass and schedules. A model
        that cannot be rewritten gives a report with `error`.

    Raises:
        ConfigError: If the configuration does not fit the model, or a size is not allowed.
        UnsupportedInputError: If the model cannot be planned for `tp` ranks here.
    """
    from sparda_compile.module.planned_ranks import as_first_rank

    with neutral():
        config = _config_of(config)
        _check_sizes(batch_size, max_tokens, memory_bytes)
        check_disabled(config.disable_passes, PIPELINE, OPTIONAL_PASSES)
        check_dump_dir(config.dump_dir)
        max_tokens = max_tokens or planned_capacity(config)
        with as_first_rank(model, tp) as planned:
            device = None if planned is model else local_of(next(model.parameters())).device
            return _explained(planned, config, (batch_size, max_tokens), memory_bytes, device)


def _config_of(config: SpardaConfig | None) -> SpardaConfig:
    if config is None:
        return SpardaConfig()
    if not isinstance(config, SpardaConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass a SpardaConfig, for example "
            "SpardaConfig(mode='query')."
        )
    return config


def _check_sizes(batch_size: int, max_tokens: int | None, memory_bytes: int | None) -> None:
    whole("batch_size", batch_size, 1, MOST_TOKENS)
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 1, MOST_TOKENS)
    if memory_bytes is not None:
        whole("memory_bytes", memory_bytes, 1)


def _explained(
    model: nn.Module,
    config: SpardaConfig,
    sizes: tuple[int, int],
    memory_bytes: int | None,
    device: torch.device | None,
) -> Report:
    """Return the report of a model; `device` is where it would run, None for where it is."""
    from sparda_compile.program.explain import build_report, refused_report

    batch_size, max_tokens = sizes
    try:
        captures = captures_of(model)
        if device is not None:
            captures.plan_for(config, device)
        longest = prompt_phase(captures, config, batch_size, 0, max_tokens)
        plans = [
            make_plan(captures, phase, config, batch_size=batch_size, max_tokens=max_tokens)
            for phase in (longest, "decode")
        ]
    except (AttentionNotFoundError, CaptureError, UnsupportedInputError) as error:
        return refused_report(model, config, batch_size, max_tokens, str(error))
    is_optimized = hasattr(model, "sparda_config")
    model = captures.model if is_optimized else model
    device = device or captures.device
    if memory_bytes is None and device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    return build_report(model, plans[0], plans[1], memory_bytes)


def _warn_if_serial(plan: Plan) -> None:
    """Say that mode `speculate` speculates nowhere, where the machine's constants see no gain."""
    config = plan.layout.config
    if config.predictor is None or plan.speculated:
        return
    if "insert_speculation" in config.disable_passes:
        return
    machine = plan.machine.name
    warnings.warn(
        f"mode='speculate' speculates in no layer: on {machine} none is expected to gain by it, so "
        "all attend as in mode='query'. Pass speculate_where='always' to speculate all the same.",
        stacklevel=3,
    )


def _forecast_weights(
    captures: Captures, plan: Plan, given: Mapping[int, Tensor] | None
) -> dict[int, Projection]:
    config = plan.layout.config
    if not config.needs_forecast:
        if given is not None:
            raise ConfigError(
                f"forecast weights were given, but mode={config.mode!r} uses none; use "
                "mode='forecast', or mode='exact' with hint='forecast'."
            )
        return {}
    shapes = forecast_shapes(plan)
    weight = local_of(next(captures.model.parameters()))
    if given is None:
        warnings.warn(
            "Forecast weights are not trained: they start from the mean of each group's query "
            "heads. Train them with `sparda train` or train_forecast, and pass them as forecast.",
            stacklevel=3,
        )
        return initial_forecast(
            plan.stage("find_attention").graph, plan.sites, shapes, plan.captured, weight.dtype
        )
    fitting = fit_forecast(given, shapes, captures.model_name, config, captures.ranks)
    return {layer: found.map(torch.detach).to(weight) for layer, found in fitting.items()}
