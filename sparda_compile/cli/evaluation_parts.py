"""The parts of `sparda eval`: each task at each length, checked before the first one begins."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.cli.console import INTERRUPTED, fail
from sparda_compile.cli.devices import check_memory
from sparda_compile.errors import ConfigError
from sparda_compile.registry import SELECTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from sparda_compile.config import SpardaConfig
    from sparda_compile.evaluation.results import EvaluationFile
    from sparda_compile.forecast.weights import ForecastWeights

__all__ = ["EvaluationParts", "prompts_of", "selectors_of"]

_USUAL: Final = "infllm2"
# Bytes that tokens are spelled in are less than this.
_ASCII: Final = 128
# What selects -> how a configuration's name ends.
_ENDINGS: Final = {"dense": "", "sparse": ", and its prompt", "alone": ", its prompt alone"}


@dataclasses.dataclass(frozen=True)
class EvaluationParts:
    """What is to be measured.

    Attributes:
        bases: A configuration for each mode, selector and format of blocks, without a budget.
        budgets: Shares of the blocks.
        prompts: What selects: `dense`, `sparse` or `alone` (`evaluation/names.py`).
        tasks: Names of tasks.
        lengths: Tokens of a sequence, or bytes.
        num_samples: Sequences of each task and length.
        batch_size: Sequences at once.
        seed: Seed of the sequences.
        as_bytes: Whether the model's vocabulary is bytes.
        hints: Whose guesses are counted.
    """

    bases: list[SpardaConfig]
    budgets: tuple[float, ...]
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_samples: int
    batch_size: int
    seed: int
    as_bytes: bool
    hints: tuple[str, ...] = ()

    def configs(self, length: int) -> dict[str, SpardaConfig]:
        """Return the configurations by name: dense once, every other at each budget and prompt.

        A name says the format of full blocks, where that is not the model's.

        Raises:
            ConfigError: If a budget does not hold the blocks that are always read.
        """
        configs: dict[str, SpardaConfig] = {}
        for name, config, prompt in self._variants(length):
            is_read = prompt == "alone"
            configs[name] = config.replace(mode="dense", top_k=None) if is_read else config
        return configs

    def prompt_configs(self, length: int) -> dict[str, SpardaConfig]:
        """Return those by which a prompt is read, for the names whose prompt selects."""
        return {name: config for name, config, prompt in self._variants(length) if prompt}

    def _variants(self, length: int) -> list[tuple[str, SpardaConfig, str]]:
        """Return a name, a configuration, and `sparse`, `alone` or nothing for a dense prompt."""
        from sparda_compile.evaluation.run import budget_config

        found: dict[str, tuple[str, SpardaConfig, str]] = {}
        for base in self.bases:
            tail = f" {base.kv_format}" if base.kv_format != "model" else ""
            if base.mode == "dense":
                found.setdefault(f"dense{tail}", (f"dense{tail}", base, ""))
                continue
            rule = base.mode if base.selector == _USUAL else f"{base.mode} {base.selector}"
            if base.mode == "speculate" and base.repair == "union":
                rule = f"{rule} union"
            for share in self.budgets:
                config = budget_config(base, length, share)
                by = f" by {base.prefill_selector}" if base.prefill_selector else ""
                times = base.prefill_candidates
                by += f" of {times:g}x candidates" if times else ""
                for prompt, ending in _ENDINGS.items():
                    name = f"{rule} {100 * share:g}%{tail}{ending}{by if ending else ''}"
                    if prompt in self.prompts:
                        kind = "" if prompt == "dense" else prompt
                        found.setdefault(name, (name, config, kind))
        return list(found.values())

    def check(self, model_config: Any, device: torch.device) -> None:
        """Refuse what a part would find out after hours.

        Raises:
            ConfigError: If a length is too small for a task or a budget, or too large for the
                device's memory, or the model does not have the tokens of the tasks.
        """
        from sparda_compile.evaluation.tasks import make_batch

        self._check_vocabulary(model_config)
        size = min(self.batch_size, self.num_samples)
        for length in self.lengths:
            check_memory(model_config, size, length, device)
            for task in self.tasks:
                make_batch(task, batch_size=1, length=length, as_bytes=self.as_bytes)
            self.configs(length)

    def _check_vocabulary(self, model_config: Any) -> None:
        from sparda_compile.evaluation.vocabulary import NUM_TOKENS

        needed = _ASCII if self.as_bytes else NUM_TOKENS
        has = model_config.get_text_config().vocab_size
        if has < needed:
            raise ConfigError(
                f"the tasks are written in {needed} tokens, and the model has {has}; add --bytes "
                "if its tokens are bytes, or measure it on texts with `sparda eval text`."
            )

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers of a part, beside its configurations, as plain data."""
        names = ("num_samples", "batch_size", "as_bytes")
        found = {name: getattr(self, name) for name in names}
        return found | ({"hints": [*self.hints]} if self.hints else {})

    def measure(
        self,
        model: Any,
        weights: ForecastWeights | None,
        file: EvaluationFile,
        say: Callable[[str], None],
    ) -> None:
        """Measure each part that the file does not have, and save it.

        Args:
            model: In eval mode, on its device.
            weights: Of its Forecast.
            file: Where rows are kept.
            say: Told what is being done, and how long it will take.
        """
        from sparda_compile.evaluation.pace import Pace
        from sparda_compile.evaluation.run import evaluate

        parts = [(length, task) for length in self.lengths for task in self.tasks]
        pace = Pace(float(self.num_samples * len(self.tasks) * sum(self.lengths)))
        for number, (length, task) in enumerate(parts):
            configs = self.configs(length)
            if file.keep(task, length, configs):
                say(f"{task}, {length} tokens: kept from {file.path}")
                pace.leave_out(self.num_samples * length)
                continue
            try:
                found = evaluate(
                    model,
                    configs,
                    tasks=[task],
                    length=length,
                    num_samples=self.num_samples,
                    batch_size=self.batch_size,
                    forecast=weights,
                    prompts=self.prompt_configs(length),
                    hints=self.hints,
                    seed=self.seed,
                    as_bytes=self.as_bytes,
                    progress=lambda text: say(", ".join(filter(None, (text, str(pace))))),
                    on_batch=lambda size, length=length: pace.add(size * length),  # type: ignore[misc]
                )
            except KeyboardInterrupt:
                fail(_stopped(number, len(parts), file), INTERRUPTED)
            file.save(found.rows)


def prompts_of(
    names: Sequence[str], selector: str | None, candidates: float | None = None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the kinds of prompts as plain strings, and the fields that say how they select.

    Args:
        names: `dense`, and others, in which tokens select.
        selector: Who selects for them; None is none of its own.
        candidates: Multiple of the budget that they score; None for all blocks.

    Raises:
        ConfigError: If either would have no effect.
    """
    given = {"prefill_selector": selector and str(selector), "prefill_candidates": candidates}
    given = {field: value for field, value in given.items() if value is not None}
    if given and all(name == "dense" for name in names):
        field, value = next(iter(given.items()))
        raise ConfigError(
            f"--{field.replace('_', '-')} {value} is how tokens of a sparse prompt score blocks, "
            "and no prompt is sparse here; add --prefill sparse, or leave it out."
        )
    return tuple(map(str, names)), given


def selectors_of(mode: str, selectors: Sequence[str], heads: int = 1) -> list[str]:
    """Return the selectors that make a difference to a mode.

    Args:
        mode: The mode.
        selectors: What was asked for.
        heads: Of the Forecast for each KV head; several are scored by the selector itself.
    """
    if mode in ("query", "exact", "speculate") or (mode == "forecast" and heads > 1):
        return list(selectors)
    if mode == "dense":
        return [_USUAL]
    # Of those that score a Forecast alike one is enough: the usual one, or the first.
    named = {SELECTORS[rule].forecast_selector: rule for rule in (*reversed(selectors), _USUAL)}
    return [
        named[scorer] for scorer in dict.fromkeys(SELECTORS[r].forecast_selector for r in selectors)
    ]


def _stopped(done: int, total: int, file: EvaluationFile) -> str:
    found = f"stopped after {done} of {total} parts (a task at a length each)"
    if file.path is None:
        return f"{found}, which were not kept; with --json-file they are, part by part."
    if not done:
        return f"{found}; the same command begins again."
    return f"{found}; they are in {file.path}, and the same command goes on with the others."
