"""`sparda eval`: how often a model is right when it reads few blocks, and who finds the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparda_compile.cli.console import (
    AsJson,
    errors_as_sentences,
    make_console,
    print_json,
    print_paths,
    progress,
)
from sparda_compile.cli.devices import find_device
from sparda_compile.cli.evaluation_parts import (
    EvaluationParts,
    prompts_of,
    selectors_of,
)
from sparda_compile.cli.options import (
    LARGEST_SEED,
    MOST_SEQUENCES,
    MOST_TOKENS,
    Hint,
    KvFormat,
    LocalBlocks,
    Mode,
    PrefillCandidates,
    PrefillSelector,
    Prompt,
    Repair,
    Selector,
    ShortList,
    Task,
)
from sparda_compile.cli.outputs import check_outputs, check_plot, write_file
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from sparda_compile.evaluation.run import Evaluation
    from sparda_compile.forecast.weights import ForecastWeights

__all__ = ["evaluate_model"]

_SMALL: Final = "small"
_TASKS: Final = ("single_needle", "multi_key", "key_value")
_DEFAULT_MODES: Final[tuple[Mode, ...]] = ("dense", "query")
# Fields that --ema gives, in order.
_EMA: Final = ("ema_level", "ema_trend", "ema_damping")
_SELECTOR: Final = "infllm2"
_LENGTH: Final = 4096
_BUDGETS: Final = (0.1,)
_PROMPT: Final = "dense"
_REPAIR: Final = "exact"

Model = Annotated[
    str,
    typer.Argument(help="A folder with a model of transformers, or small: the shipped one."),
]
Modes = Annotated[
    list[Mode] | None,
    typer.Option(
        help="Mode to measure, may be given again.", show_default=", ".join(_DEFAULT_MODES)
    ),
]
Selectors = Annotated[
    list[Selector] | None,
    typer.Option(help="Selector of a query, may be given again.", show_default=_SELECTOR),
]
Hints = Annotated[
    list[Hint] | None,
    typer.Option(
        help="Hint whose guesses are counted at 1, 1.25, 1.5 and 2 times the budget, beside those "
        "by the last steps and their scores. May be given again; ema and next_query are mixed too.",
        show_default="none",
    ),
]
Ema = Annotated[
    tuple[float, float, float] | None,
    typer.Option(
        help="How hint ema predicts: ema_level, ema_trend and ema_damping.",
        show_default=f"{SpardaConfig.ema_level} {SpardaConfig.ema_trend} "
        f"{SpardaConfig.ema_damping}",
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option("--ema-calibrate", help="Calibrate hint ema by the first of the steps."),
]
Repairs = Annotated[
    list[Repair] | None,
    typer.Option(
        help="Of mode speculate: exact reads what its query selects, union what was predicted too. "
        "May be given again.",
        show_default=_REPAIR,
    ),
]
KvFormats = Annotated[
    list[KvFormat] | None,
    typer.Option(help="How full blocks are written, may be given again.", show_default="model"),
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of blocks to read, may be given again.",
        show_default=", ".join(map(str, _BUDGETS)),
    ),
]
Prompts = Annotated[
    list[Prompt] | None,
    typer.Option(
        "--prefill",
        help="What selects blocks: dense: the decode steps alone; sparse: the prompt's tokens too; "
        "alone: the prompt's tokens alone. May be given again.",
        show_default=_PROMPT,
    ),
]
Tasks = Annotated[
    list[Task] | None,
    typer.Option(help="Task, may be given again.", show_default=", ".join(_TASKS)),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens of a sequence, may be given again.",
        show_default=str(_LENGTH),
    ),
]
PoolSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens of one pooled key.",
        show_default=f"as the Forecast's, else {SpardaConfig.pool_size}",
    ),
]
PoolStride = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_TOKENS,
        help="Tokens between pooled keys.",
        show_default=f"as the Forecast's, else {SpardaConfig.pool_stride}",
    ),
]
Samples = Annotated[
    int,
    typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences of each task and length."),
]
Batch = Annotated[int, typer.Option(min=1, max=MOST_SEQUENCES, help="Sequences to run at once.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sequences.")]
ForecastFile = Annotated[Path | None, typer.Option(help="Safetensors file of Forecast weights.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(help="JSON file to write as results come, and to go on from if it is there."),
]
AsBytes = Annotated[bool, typer.Option("--bytes", help="The model's vocabulary is bytes.")]


def evaluate_model(
    model: Model = _SMALL,
    mode: Modes = None,
    selector: Selectors = None,
    short_list: ShortList = SpardaConfig.short_list,
    hint: Hints = None,
    ema: Ema = None,
    ema_calibrate: Calibrate = False,
    repair: Repairs = None,
    budget: Budgets = None,
    kv_format: KvFormats = None,
    prefill: Prompts = None,
    prefill_selector: PrefillSelector = None,
    prefill_candidates: PrefillCandidates = None,
    task: Tasks = None,
    tokens: Lengths = None,
    samples: Samples = 32,
    batch: Batch = 4,
    local_blocks: LocalBlocks = 2,
    pool_size: PoolSize = None,
    pool_stride: PoolStride = None,
    forecast: ForecastFile = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")] = "cpu",
    as_bytes: AsBytes = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Plot to write, such as eval.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy and recall of modes, selectors and budgets against the dense model."""
    with errors_as_sentences(evaluate_model):
        check_outputs(json_file=json_file)
        check_plot(plot)
        prompts, how = prompts_of(prefill or (_PROMPT,), prefill_selector, prefill_candidates)
        with progress() as say:
            say("importing torch and transformers")
            from sparda_compile.evaluation.results import EvaluationFile

            where = find_device(device)
            weights = _forecast(model, forecast)
            fields = _sizes(weights, ema, pool_size=pool_size, pool_stride=pool_stride)
            fields |= {"ema_calibrate": True} if ema_calibrate else {}
            fields |= {"short_list": short_list, "local_blocks": local_blocks, **how}
            parts = EvaluationParts(
                _bases(mode or _DEFAULT_MODES, selector or (_SELECTOR,), repair, kv_format, fields),
                tuple(budget or _BUDGETS),
                prompts,
                tuple(map(str, task or _TASKS)),
                tuple(tokens or (_LENGTH,)),
                num_samples=samples,
                batch_size=batch,
                seed=seed,
                as_bytes=as_bytes,
                hints=tuple(map(str, hint or ())),
            )
            parts.check(_config_of(model), where)
            loaded = _load(model, where, say)
            settings = {**parts.settings(), **fields, **_sources(model, forecast), "device": device}
            file = EvaluationFile(json_file, type(loaded).__name__, seed, settings)
            parts.measure(loaded, weights, file, say)
        _show(file.evaluation(), json_file, plot, as_json=as_json)


def _show(
    evaluation: Evaluation, json_file: Path | None, plot: Path | None, *, as_json: bool
) -> None:
    from sparda_compile.evaluation.show import print_evaluation, write_plot

    written = [json_file, write_file(lambda path: write_plot(evaluation, path), plot)]
    if as_json:
        print_json(evaluation.to_dict())
        return
    print_evaluation(evaluation, make_console())
    print_paths(written)


def _sizes(
    weights: ForecastWeights | None,
    ema: tuple[float, float, float] | None,
    **given: int | None,
) -> dict[str, Any]:
    """Return what is given: of sizes of blocks and pooled keys, else the Forecast's; its heads."""
    info = weights.info if weights is not None else None
    sizes: dict[str, Any] = info.settings if info is not None else {}
    predict = dict(zip(_EMA, ema, strict=True)) if ema is not None else {}
    return sizes | predict | {field: size for field, size in given.items() if size is not None}


def _bases(
    modes: Sequence[Mode],
    selectors: Sequence[str],
    repairs: Sequence[Repair] | None,
    kv_formats: Sequence[str] | None,
    fields: Mapping[str, Any],
) -> list[SpardaConfig]:
    """Return a configuration for each mode, selector, format and, of `speculate`, repair.

    A budget sets its `top_k` later.

    Raises:
        ConfigError: If repairs are given and no mode repairs.
    """
    if repairs and "speculate" not in modes:
        raise ConfigError("--repair is what mode speculate does; add --mode speculate.")
    names = [str(name) for name in kv_formats or ("model",)]
    bases = []
    for mode in modes:
        kinds = (repairs or (_REPAIR,)) if mode == "speculate" else (_REPAIR,)
        more: dict[str, Any] = {"top_k": None, **_memory(mode), **fields}
        bases += [
            SpardaConfig(mode=mode, selector=rule, kv_format=name, repair=repair, **more)
            for rule in selectors_of(mode, selectors, fields.get("forecast_heads", 1))
            for name in names
            for repair in kinds
        ]
    return bases


def _memory(mode: str) -> dict[str, Any]:
    """Return where a mode keeps its blocks; what it decides does not depend on it."""
    return {"offload": "never"} if mode == "speculate" else {}


def _forecast(name: str, path: Path | None) -> ForecastWeights | None:
    """Return the weights of a file; without one, those of the shipped model."""
    from sparda_compile.demo.small_model import load_small_forecast
    from sparda_compile.forecast.weights import load_forecast

    if path is not None:
        return load_forecast(path)
    return load_small_forecast() if name == _SMALL else None


def _folder_of(name: str) -> Path:
    """Return the folder of a model.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name == _SMALL:
        from sparda_compile.demo.small_model import checked_folder

        return checked_folder()
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"{name!r} is no folder with a config.json; pass one with a model of "
            f"transformers, or {_SMALL!r}."
        )
    return Path(name)


def _config_of(name: str) -> Any:
    """Return the configuration of a model; its weights are not read."""
    from sparda_compile.cli.targets import folder_config

    return folder_config(_folder_of(name))


def _sources(name: str, forecast: Path | None) -> dict[str, Any]:
    """Return what tells the weights from those of another day."""
    from sparda_compile.evaluation.results import fingerprint

    files = {"weights": fingerprint(_folder_of(name))}
    return files if forecast is None else {**files, "forecast": fingerprint(forecast)}


def _load(name: str, device: torch.device, say: Callable[[str], None]) -> Any:
    """Return the model in eval mode on its device."""
    say(f"loading {name}")
    from sparda_compile.cli.targets import load_target
    from sparda_compile.demo.small_model import load_small_model

    model: Any = load_small_model() if name == _SMALL else load_target(str(_folder_of(name)))
    # Only half precision has a fast attention kernel on a GPU; a CPU computes in float32.
    if device.type == "cpu":
        model = model.float()
    elif name == _SMALL:
        model = model.half()
    return model.to(device)
