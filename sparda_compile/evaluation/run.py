"""An evaluation: configurations x tasks x lengths, each measured against the dense model."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.early_reads import reads_early
from sparda_compile.evaluation.guesses import Guess, GuessSums, num_first_steps
from sparda_compile.evaluation.metrics import (
    RecallSums,
    bootstrap_interval,
    kl_divergence,
    right_answers,
    wilson_interval,
)
from sparda_compile.evaluation.reading import read_ahead, read_selected
from sparda_compile.evaluation.tasks import TASKS, make_batch
from sparda_compile.kernels.begin_prediction import WINDOW
from sparda_compile.registry import SELECTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig
    from sparda_compile.evaluation.haystack import TaskBatch

__all__ = ["Evaluation", "EvaluationRow", "Recall", "budget_config", "evaluate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """How much of what was to be found was found. Shares, NaN if there was nothing.

    Attributes:
        name: Who chose: `query`, `oracle` or a predictor.
        layer: Which layer; None is all in which everyone chose.
        mass: Share of the attention outside the blocks that are always read.
        mass_low: Lower end of the 95% bootstrap interval.
        mass_high: Upper end of it.
        blocks: Share of the true query's blocks.
        blocks_low: Lower end of the 95% bootstrap interval.
        blocks_high: Upper end of it.
    """

    name: str
    layer: int | None
    mass: float
    mass_low: float
    mass_high: float
    blocks: float
    blocks_low: float
    blocks_high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One configuration on one task at one length.

    Attributes:
        name: Name of the configuration.
        mode: Its mode.
        selector: Its selector.
        task: Task.
        length: Tokens of a sequence; bytes for a model of bytes.
        budget: Share of the blocks that a step may read, forced ones included.
        num_blocks: Blocks of a sequence.
        num_samples: Sequences.
        num_right: Sequences with every answer right.
        accuracy: Share of them.
        low: Lower end of its 95% Wilson interval.
        high: Upper end of it.
        kl: Mean KL divergence from the dense model at the answers, in nats.
        agreement: Share of answer places where the likeliest token is the dense model's.
        recalls: By who chose and layer; empty for mode `dense` without a budget.
        prompt: Mode by which the tokens of the prompt selected; `dense` if they read everything.
        guesses: What hints guessed of the blocks that steps read, if any was asked for.
        kv_format: How full blocks are written.
    """

    name: str
    mode: str
    selector: str
    task: str
    length: int
    budget: float
    num_blocks: int
    num_samples: int
    num_right: int
    accuracy: float
    low: float
    high: float
    kl: float
    agreement: float
    recalls: tuple[Recall, ...]
    prompt: str = "dense"
    guesses: tuple[Guess, ...] = ()
    kv_format: str = "model"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        model: Class of the model.
        seed: Seed of the sequences.
        rows: One for each configuration, task and length.
    """

    model: str
    seed: int
    rows: tuple[EvaluationRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; what is not a number becomes None."""
        plain: dict[str, Any] = _without_nan(dataclasses.asdict(self))
        return plain


def budget_config(config: SpardaConfig, length: int, share: float) -> SpardaConfig:
    """Return the configuration with as many blocks as a share of a sequence's.

    Args:
        config: What to change; `top_k` becomes what the share leaves beside the forced blocks.
        length: Tokens of a sequence.
        share: Share of its blocks, above 0 and at most 1; 1 selects all.

    Raises:
        ConfigError: If the share is not one, or does not hold the forced blocks.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"budget={share} is not a share of the blocks; use 0.01 to 1.")
    if share == 1.0:
        return config.replace(top_k=None)
    num_blocks = -(-length // config.block_size)
    forced = config.num_forced
    top_k = int(share * num_blocks + 0.5) - forced
    if top_k < 0:
        raise ConfigError(
            f"budget={share} of {num_blocks} blocks is fewer than the {forced} that are always "
            f"read; lower local_blocks, raise length, or use a budget of "
            f"{min(forced / num_blocks, 1.0):.2f} or more."
        )
    if SELECTORS[config.selector].has_short_list and config.short_list > top_k:
        raise ConfigError(
            f"short_list={config.short_list} is more than the {top_k} blocks that budget={share} "
            f"of {num_blocks} blocks leaves to selector {config.selector!r}; use short_list of 0 "
            f"to {top_k}, a larger budget, or raise length."
        )
    return config.replace(top_k=top_k)


@torch.no_grad()
def evaluate(
    model: Any,
    configs: Mapping[str, SpardaConfig],
    *,
    tasks: Sequence[str],
    length: int,
    num_samples: int,
    batch_size: int = 8,
    forecast: Mapping[int, Tensor] | None = None,
    prompts: Mapping[str, SpardaConfig] | None = None,
    hints: Sequence[str] = (),
    seed: int = 0,
    as_bytes: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Measure configurations on sequences that all of them see.

    The haystack is read densely, or by `prompts`; every token of the questions is a decode step,
    fed with the right tokens. A sequence counts as right if each answer token is the likeliest one
    where it stands (or, in tasks whose answers count in any order, where another one does). Greedy
    decoding gives such answers, and where their order counts no others.

    Args:
        model: A causal LM as for `decode`, in eval mode, on any device.
        configs: By the names to show; each has its budget in `top_k`.
        tasks: Names of tasks.
        length: Tokens of each sequence, or bytes.
        num_samples: Sequences of each task.
        batch_size: Sequences to run at once.
        forecast: Forecast weights by target layer.
        prompts: Configurations by which the haystack is read, for some of the names.
        hints: Whose guesses of the blocks to come are counted, beside those that need nothing.
        seed: Seed of the sequences.
        as_bytes: Whether the model's vocabulary is bytes.
        progress: Called with what is being done: reading, and each configuration.
        on_batch: Called with the number of sequences of each batch that all have seen.

    Returns:
        What was measured: a row for each configuration and task.

    Raises:
        ConfigError: If a task is not known, the length too small for it, or there is nothing to
            measure.
        UnsupportedInputError: If the model is not built like Llama.
    """
    if num_samples < 1 or batch_size < 1 or not configs:
        raise ConfigError(
            f"num_samples={num_samples}, batch_size={batch_size} and {len(configs)} "
            "configurations leave nothing to measure; use 1 or more of each."
        )
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"tasks {unknown} are not known; use some of {', '.join(TASKS)}.")
    rows: list[EvaluationRow] = []
    for task in tasks:
        tallies = {name: _Tally(hints, config) for name, config in configs.items()}
        for first in range(0, num_samples, batch_size):
            size = min(batch_size, num_samples - first)
            batch = make_batch(
                task, batch_size=size, length=length, seed=seed + first, as_bytes=as_bytes
            )
            what = f"{task}, {length} tokens, sample {first + 1} of {num_samples}"
            say = partial(_say, progress, what)
            _measure(model, configs, prompts or {}, batch, forecast, tallies, say)
            on_batch(size)
        for name, config in configs.items():
            prompt = prompts[name].mode if prompts and name in prompts else "dense"
            rows.append(tallies[name].row(name, config, prompt, task, length))
    return Evaluation(type(model).__name__, seed, tuple(rows))


def _measure(
    model: Any,
    configs: Mapping[str, SpardaConfig],
    prompts: Mapping[str, SpardaConfig],
    batch: TaskBatch,
    forecast: Mapping[int, Tensor] | None,
    tallies: dict[str, _Tally],
    say: Callable[[str], None],
) -> None:
    """Run every configuration on one batch."""
    say("reading")
    device = next(model.parameters()).device
    ids_BT = batch.ids_BT.to(device)
    # Step s predicts the token behind the one it feeds; the last answer is fed to nobody.
    last = int(batch.answer_positions_A[-1])
    steps_A = (batch.answer_positions_A - 1 - batch.question_start).tolist()
    dense, truth_BSV = read_ahead(model, ids_BT[:, :last], batch.question_start)
    haystack_BT = ids_BT[:, : batch.question_start]
    answers_BA = ids_BT[:, batch.answer_positions_A.to(device)]
    for name, config in configs.items():
        say(name)
        reading = dense
        if name in prompts:
            reading = read_selected(model, haystack_BT, prompts[name], forecast=forecast)
        # Tokens of the prompt by which predictions begin, where they decide what is read.
        ahead = min(WINDOW, batch.question_start - 1) if reads_early(config) else 0
        begun = reading.before(batch.question_start - ahead)
        fed_BS = ids_BT[:, begun.length : last]
        decoded = decode(model, begun, fed_BS, config, forecast=forecast, num_ahead=ahead)
        tallies[name].add(
            decoded.logits_BSV[:, steps_A], truth_BSV[:, steps_A], answers_BA, batch.any_order
        )
        if config.top_k is not None:
            tallies[name].recalls.add(decoded.records[step] for step in steps_A)
            if tallies[name].guesses.names:
                say(f"{name}, guesses")
                # As many tokens of the haystack are steps that count as are steps that do not.
                ahead = 2 * num_first_steps(config)
                part = reading.before(max(batch.question_start - ahead, 1))
                steps_BS = ids_BT[:, part.length : last]
                guesses = tallies[name].guesses
                decode(model, part, steps_BS, config, forecast=forecast, guesses=guesses)


def _say(progress: Callable[[str], None], what: str, part: str) -> None:
    progress(f"{what}, {part}")


class _Tally:
    """What is summed over the batches of one row."""

    def __init__(self, hints: Sequence[str], config: SpardaConfig) -> None:
        self.guesses = GuessSums(hints, config)
        self.num_samples = 0
        self.num_right = 0
        self.kls: list[Tensor] = []
        self.agreements: list[Tensor] = []
        self.recalls = RecallSums()

    def add(
        self, logits_BAV: Tensor, truth_BAV: Tensor, answers_BA: Tensor, any_order: bool
    ) -> None:
        predicted_BA = logits_BAV.argmax(-1)
        right_B = right_answers(predicted_BA, answers_BA, any_order=any_order)
        self.num_samples += len(right_B)
        self.num_right += int(right_B.sum())
        self.kls.append(kl_divergence(truth_BAV, logits_BAV).flatten())
        self.agreements.append((predicted_BA == truth_BAV.argmax(-1)).float().flatten())

    def row(
        self, name: str, config: SpardaConfig, prompt: str, task: str, length: int
    ) -> EvaluationRow:
        num_blocks = -(-length // config.block_size)
        low, high = wilson_interval(self.num_right, self.num_samples)
        return EvaluationRow(
            name=name,
            mode=config.mode,
            selector=config.selector,
            prompt=prompt,
            task=task,
            length=length,
            budget=config.num_selected(num_blocks) / num_blocks,
            num_blocks=num_blocks,
            num_samples=self.num_samples,
            num_right=self.num_right,
            accuracy=self.num_right / self.num_samples,
            low=low,
            high=high,
            kl=float(torch.cat(self.kls).mean()),
            agreement=float(torch.cat(self.agreements).mean()),
            recalls=tuple(_recalls(self.recalls)),
            guesses=tuple(self.guesses.guesses()),
            kv_format=str(config.kv_format),
        )


def _recalls(sums: RecallSums) -> list[Recall]:
    recalls = []
    for name in sums.names():
        for layer in (None, *range(sums.num_layers())):
            found = sums.get(name, layer)
            if found is None:
                continue
            mass, all_mass, blocks, all_blocks = found
            mass_low, mass_high = bootstrap_interval(mass, all_mass)
            blocks_low, blocks_high = bootstrap_interval(blocks, all_blocks)
            recalls.append(
                Recall(
                    name=name,
                    layer=layer,
                    mass=_share(mass, all_mass),
                    mass_low=mass_low,
                    mass_high=mass_high,
                    blocks=_share(blocks, all_blocks),
                    blocks_low=blocks_low,
                    blocks_high=blocks_high,
                )
            )
    return recalls


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(found: Tensor, total: Tensor) -> float:
    return float(found.sum() / total.sum()) if float(total.sum()) > 0 else float("nan")
