"""The retrieval behind `sparda demo`: the shipped model finds needles in a haystack, in every mode.

The original model reads the haystack of 16K tokens once, and each mode takes its KV cache over.
The questions and answers are decode steps: the mode picks its blocks, and its greedy answers are
compared with the right ones. A wrong one is an error.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from sparda_compile.api import optimize
from sparda_compile.capture.cache_name import cache_of
from sparda_compile.config import Mode, SpardaConfig, round_up
from sparda_compile.demo.small_model import SMALL_CONFIG, load_small_forecast, load_small_model
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.metrics import RecallSums
from sparda_compile.evaluation.reading import Reading
from sparda_compile.evaluation.run import budget_config
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.evaluation.vocabulary import spell
from sparda_compile.program.explain import build_report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.evaluation.haystack import TaskBatch
    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.report import Report

__all__ = ["NEEDLE_MODES", "NeedleDemo", "NeedleRow", "run_needle_demo", "run_shipped_model"]

NEEDLE_MODES: Final[tuple[str, ...]] = get_args(Mode)

_SPECULATING: Final[dict[str, Any]] = {"offload": "never", "speculate_where": "always"}
_TASK: Final = "multi_query"
_SHARE: Final = 0.1
_NUM_TOKENS: Final = 16448
# With fewer blocks the share, rounded, would be less than those that are always read.
_LEAST_BLOCKS: Final = math.ceil((SMALL_CONFIG.num_forced - 0.5) / _SHARE)
_LEAST_TOKENS: Final = (_LEAST_BLOCKS - 1) * SMALL_CONFIG.block_size + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleRow:
    """One mode of the demo.

    Attributes:
        mode: The mode.
        blocks: Blocks that a step reads per KV head.
        num_blocks: Blocks of the whole cache.
        answers: What it answered, spelled.
        num_right: Answers that are right.
        recall: Share of the attention to blocks that have to be found which the blocks that the
            mode picks hold; None for mode `dense`, which reads all.
        h2d_bytes: Bytes copied to the device by the decode steps.
        step_bytes: The same for one step.
        device_bytes: Device memory of the KV cache, tables and summaries included.
        token_ms: Median milliseconds of a decode step.
    """

    mode: str
    blocks: int
    num_blocks: int
    answers: tuple[str, ...]
    num_right: int
    recall: float | None
    h2d_bytes: int
    step_bytes: int
    device_bytes: int
    token_ms: float


@dataclasses.dataclass(frozen=True)
class NeedleDemo:
    """What the demo found.

    Attributes:
        num_tokens: Tokens of the haystack.
        questions: Keys that were asked for, spelled.
        right_answers: Their values, spelled.
        places: Where in the haystack they stand.
        reading_ms: Milliseconds that the original model took to read it.
        rows: One for each mode.
        mismatches: Wrong answers, in words.
        report: What was done to the model in the last mode.
    """

    num_tokens: int
    questions: tuple[str, ...]
    right_answers: tuple[str, ...]
    places: tuple[int, ...]
    reading_ms: float
    rows: tuple[NeedleRow, ...]
    mismatches: tuple[str, ...]
    report: Report = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "questions": list(self.questions),
            "right_answers": list(self.right_answers),
            "places": list(self.places),
            "reading_ms": self.reading_ms,
            "mismatches": list(self.mismatches),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


@torch.no_grad()
def run_needle_demo(
    model: Any,
    forecast: Mapping[int, Tensor] | None = None,
    *,
    modes: Sequence[str] = NEEDLE_MODES,
    num_tokens: int = _NUM_TOKENS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> NeedleDemo:
    """Ask for four of 32 needles in every mode.

    Args:
        model: A causal LM with the vocabulary of the tasks, in eval mode, on the CPU.
        forecast: Its Forecast by target layer; without one, mode `forecast` runs untrained, with
            a warning, and `exact` goes by the step before.
        modes: Modes to run.
        num_tokens: Tokens of haystack, questions and answers.
        seed: Seed of the haystack.
        progress: Called with what is being done, before each mode.

    Raises:
        ConfigError: If a mode is not known, or the length too small for the task or the budget.
    """
    if num_tokens < _LEAST_TOKENS:
        raise ConfigError(
            f"num_tokens={num_tokens} is too small for a budget of {_SHARE:.0%}, which has to hold "
            f"the {SMALL_CONFIG.num_forced} blocks that are always read; use {_LEAST_TOKENS} or "
            "more."
        )
    configs = [_config(mode, num_tokens, has_forecast=bool(forecast)) for mode in modes]
    batch = make_batch(_TASK, batch_size=1, length=num_tokens, seed=seed)
    progress(f"reading {batch.question_start} tokens with the original model")
    begin = time.perf_counter()
    past = cache_of(model(batch.ids_BT[:, : batch.question_start], logits_to_keep=1))
    reading_ms = 1e3 * (time.perf_counter() - begin)
    reading = Reading.of(past)
    fast: OptimizedModule | None = None
    rows = []
    for config in configs:
        progress(f"mode {config.mode}")
        weights = forecast if config.needs_forecast else None
        fast = optimize(fast or model, config, forecast=weights)
        answers, token_ms = _answer(fast, past, batch)
        recall = None
        if config.mode != "dense" and (forecast or config.mode != "forecast"):
            tail = batch.ids_BT[:, batch.question_start : -1]
            records = decode(model, reading, tail, config, forecast=forecast).records
            recall = _recall(records, config, batch)
        rows.append(_row(fast, config, answers, batch, recall, token_ms))
    assert fast is not None
    questions = batch.ids_BT[0, batch.answer_positions_A - 1].tolist()
    right = tuple(map(spell, batch.answers_BA[0].tolist()))
    return NeedleDemo(
        num_tokens=batch.question_start,
        questions=tuple(map(spell, questions)),
        right_answers=right,
        places=tuple(batch.evidence_BA[0].tolist()),
        reading_ms=reading_ms,
        rows=tuple(rows),
        mismatches=tuple(
            f"mode {row.mode} answers {', '.join(row.answers)} instead of {', '.join(right)}"
            for row in rows
            if row.answers != right
        ),
        report=build_report(
            model, fast.programs.latest_plan("prefill"), fast.programs.latest_plan("decode")
        ),
    )


def run_shipped_model(
    *,
    modes: Sequence[str] | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> NeedleDemo:
    """Run the demo with the model that the package ships.

    Args:
        modes: Modes to run; None is all.
        num_tokens: Tokens of haystack, questions and answers; None is 16448.
        seed: Seed of the haystack.
        progress: Called with what is being done, before each mode.

    Raises:
        BackendUnavailableError: If the model's weights are not there.
        ConfigError: As for `run_needle_demo`.
    """
    return run_needle_demo(
        load_small_model(),
        load_small_forecast(),
        modes=modes or NEEDLE_MODES,
        num_tokens=num_tokens or _NUM_TOKENS,
        seed=seed,
        progress=progress,
    )


def _config(mode: str, num_tokens: int, *, has_forecast: bool) -> SpardaConfig:
    guess = {"hint": "forecast" if has_forecast else "previous_step"}
    base = SMALL_CONFIG.replace(
        mode=mode,
        **(_SPECULATING if mode == "speculate" else guess),
        lowering="eager",
        max_tokens=round_up(num_tokens, SMALL_CONFIG.block_size),
        top_k=None,
    )
    return budget_config(base, num_tokens, _SHARE)


def _answer(fast: OptimizedModule, past: Any, batch: TaskBatch) -> tuple[list[int], float]:
    """Return the greedy answers, and the median milliseconds of a step."""
    start, last = batch.question_start, batch.ids_BT.shape[1] - 1
    places = set(batch.answer_positions_A.tolist())
    cache = fast.new_cache(past=past)
    answers: list[int] = []
    times: list[float] = []
    for place in range(start, last):
        given = answers[-1] if place in places else int(batch.ids_BT[0, place])
        begin = time.perf_counter()
        out = fast(torch.tensor([[given]]), past_key_values=cache)
        times.append(1e3 * (time.perf_counter() - begin))
        if place + 1 in places:
            answers.append(int(out.logits[0, -1].argmax()))
    return answers, statistics.median(times)


def _recall(records: list[Any], config: SpardaConfig, batch: TaskBatch) -> float:
    """Return the recall of attention mass at the questions, in the layers where everyone chose."""
    sums = RecallSums()
    steps = (batch.answer_positions_A - 1 - batch.question_start).tolist()
    sums.add(records[step] for step in steps)
    found = sums.get("forecast" if config.mode == "forecast" else "query")
    assert found is not None
    return float(found[0].sum() / found[1].sum())


def _row(
    fast: OptimizedModule,
    config: SpardaConfig,
    answers: list[int],
    batch: TaskBatch,
    recall: float | None,
    token_ms: float,
) -> NeedleRow:
    layout = fast.programs.latest_plan("decode").layout
    num_steps = batch.ids_BT.shape[1] - 1 - batch.question_start
    h2d_bytes = fast.sparda.stats().total.h2d_bytes
    right = batch.answers_BA[0].tolist()
    return NeedleRow(
        mode=config.mode,
        blocks=layout.num_selected,
        num_blocks=layout.num_blocks,
        answers=tuple(map(spell, answers)),
        num_right=sum(a == b for a, b in zip(answers, right, strict=True)),
        recall=recall,
        h2d_bytes=h2d_bytes,
        step_bytes=h2d_bytes // num_steps,
        device_bytes=layout.num_bytes(on_host=False),
        token_ms=token_ms,
    )
