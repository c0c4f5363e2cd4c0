"""An evaluation on texts: tasks x lengths x configurations, each beside the model itself."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.api import optimize
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.pace import Pace
from sparda_compile.evaluation.text.cases import DENSE, Case
from sparda_compile.evaluation.text.chat import chat_scripts
from sparda_compile.evaluation.text.needle import needle_scripts
from sparda_compile.evaluation.text.results import Record
from sparda_compile.evaluation.text.scripts import (
    Part,
    Scored,
    Script,
    dense_reading,
    module_logits,
    stack,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from sparda_compile.evaluation.text.documents import Documents
    from sparda_compile.evaluation.text.results import TextFile
    from sparda_compile.evaluation.text.scripts import Reading
    from sparda_compile.module.optimized import OptimizedModule

__all__ = ["TextEvaluation", "TextPart", "make_scripts", "text_scripts"]

# Characters of the progress bar.
_BAR: Final = 20
# Tokens of a prompt that take about as long as a decode step: for the time that is left.
_STEP_COST: Final = 16


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Samples of one task and length, and the configurations to measure on them."""

    task: str
    length: int
    scripts: list[Script]
    cases: list[Case]


def text_scripts(documents: Documents, length: int, num_scored: int) -> list[Script]:
    """Return a sample of each document: its first tokens, the last of which are scored.

    Args:
        documents: Each of `length` tokens or more.
        length: Tokens of a sample.
        num_scored: Tokens at its end that are predicted by decode steps.

    Raises:
        ConfigError: If that leaves no prompt.
    """
    if num_scored > length - 2:
        raise ConfigError(
            f"scored={num_scored} of length={length} tokens leaves no prompt; score "
            f"{max(length - 2, 0)} or fewer, or raise length."
        )
    scripts = []
    for document in documents.each:
        ids = [*documents.begin, *document.ids_T[: length - len(documents.begin)].tolist()]
        ids_1T = document.ids_T.new_tensor([ids])
        cut = length - num_scored - 1
        parts = (Part(ids_1T[:, :cut]), Part(ids_1T[:, cut:-1], ids_1T[:, cut + 1 :]))
        scripts.append(Script(document.name, parts, ("",)))
    return scripts


def make_scripts(
    task: str, tokenizer: Any, documents: Documents, length: int, settings: Mapping[str, int]
) -> list[Script]:
    """Return the samples of a task.

    Args:
        task: `perplexity`, `needle` or `chat`.
        tokenizer: Of the model.
        documents: Whose text it is.
        length: Tokens of a sample.
        settings: `scored`, `trials`, `depths` and `seed`.

    Raises:
        ConfigError: If the length is too small, or the documents are too short.
    """
    if task == "perplexity":
        return text_scripts(documents, length, settings["scored"])
    trials, seed = settings["trials"], settings["seed"]
    if task == "needle":
        return needle_scripts(
            tokenizer, documents, length, trials=trials, depths=settings["depths"], seed=seed
        )
    return chat_scripts(tokenizer, documents, length, chats=trials, seed=seed)


class TextEvaluation:
    """Measures configurations on samples, and keeps what it finds in a file.

    Args:
        model: A causal LM in eval mode, on its device.
        forecast: Forecast weights by target layer, for configurations that need them.
        file: Where records are kept.
        batch_size: Samples of one shape to run at once.
        say: Told what is being done, how much is done, and how long it will take.
    """

    def __init__(
        self,
        model: Any,
        forecast: Mapping[int, Tensor] | None,
        file: TextFile,
        batch_size: int,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._forecast, self._file = model, forecast, file
        self._batch_size, self._say = batch_size, say
        self._modules: dict[SpardaConfig, OptimizedModule] = {}

    def measure(self, parts: Sequence[TextPart]) -> None:
        """Measure every configuration on every sample that the file does not have."""
        units = [
            (part, batch) for part in parts for batch in _batches(part.scripts, self._batch_size)
        ]
        costs = [_cost(batch, case) for part, batch in units for case in (None, *part.cases)]
        progress = _Progress(sum(costs), self._say)
        for part, batch in units:
            what = f"{part.task}, {part.length} tokens, {_name_of(batch)}"
            samples = [(script.name, script.digest) for script in batch]
            is_known = partial(self._file.has, part.task, part.length, samples=samples)
            missing = [case for case in part.cases if not is_known(case.name)]
            progress.keep(sum(_cost(batch, case) for case in part.cases if case not in missing))
            if missing or not is_known(DENSE):
                self._measure(part, batch, missing, partial(progress.during, what))
                continue
            progress.keep(_cost(batch, None))
            self._say(f"{what}: kept from {self._file.path}")

    def _measure(
        self,
        part: TextPart,
        batch: list[Script],
        cases: list[Case],
        during: Callable[[str, float], AbstractContextManager[None]],
    ) -> None:
        stacked = stack(batch)
        with during(DENSE, _cost(batch, None)):
            reading = dense_reading(self._model, stacked)
            config = SpardaConfig(mode="dense", prefill="dense")
            found = _scored(stacked, reading.logits, reading)
            self._file.add(_records(part, batch, Case(DENSE, config), found))
        for case in cases:
            with during(case.name, _cost(batch, case)):
                own = case.config.prefill == "sparse"
                logits = module_logits(self._module(case), stacked, None if own else reading)
                found = _scored(stacked, logits, reading)
                self._file.add(_records(part, batch, case, found))

    def _module(self, case: Case) -> OptimizedModule:
        """Return the module of a configuration, made from the one before it if there is one."""
        config = case.config
        if config not in self._modules:
            made_from = next(reversed(self._modules.values()), self._model)
            weights = self._forecast if config.needs_forecast else None
            self._modules[config] = optimize(made_from, config, forecast=weights)
        return self._modules[config]


class _Progress:
    """A bar, and how long the rest will take."""

    def __init__(self, total: float, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._done = 0.0
        self._pace = Pace(total)

    def keep(self, amount: float) -> None:
        """Count work that a file has."""
        self._done += amount
        self._pace.leave_out(amount)

    @contextlib.contextmanager
    def during(self, what: str, name: str, amount: float) -> Iterator[None]:
        """Say what is done inside the block, and count it when it has ended."""
        full = round(_BAR * self._done / self._total)
        bar = "#" * full + "." * (_BAR - full)
        self._say(", ".join(filter(None, (f"[{bar}] {what}, {name}", str(self._pace)))))
        yield
        self._done += amount
        self._pace.add(amount)


def _batches(scripts: Sequence[Script], size: int) -> Iterator[list[Script]]:
    """Yield neighbouring scripts of one shape, at most `size` at a time."""
    for _, same in itertools.groupby(scripts, key=lambda script: script.shape):
        alike = list(same)
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _cost(batch: Sequence[Script], case: Case | None) -> float:
    """Return the work of a configuration, None being the model itself, in tokens of a prompt."""
    total = 0
    for place, part in enumerate(batch[0].parts):
        tokens = part.ids_BT.shape[1]
        if case is not None and part.targets_BA is not None:
            total += _STEP_COST * tokens
        elif case is None or place or case.config.prefill == "sparse":
            total += tokens
    return float(total * len(batch))


def _name_of(batch: Sequence[Script]) -> str:
    more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
    return f"{batch[0].name}{more}"


def _scored(
    parts: Sequence[Part], logits: Sequence[Tensor], reading: Reading
) -> list[list[Scored]]:
    """Return what counts, by steps part and sample."""
    targets = [part.targets_BA for part in parts if part.targets_BA is not None]
    return [
        Scored.of(each, dense, right_BA.to(each.device))
        for each, dense, right_BA in zip(logits, reading.logits, targets, strict=True)
    ]


def _prompt_selector(config: SpardaConfig) -> str:
    """Return who selects for the prompt's tokens, if that is not who selects for steps."""
    return (config.prefill_selector or "") if config.prefill == "sparse" else ""


def _prompt_candidates(config: SpardaConfig) -> float:
    """Return the multiple of chosen blocks that the prompt's tokens score; 0 for all of them."""
    return (config.prefill_candidates or 0.0) if config.prefill == "sparse" else 0.0


def _records(
    part: TextPart, batch: Sequence[Script], case: Case, found: list[list[Scored]]
) -> list[Record]:
    config, is_model = case.config, case.name == DENSE
    num_blocks = -(-part.length // config.block_size)
    return [
        Record(
            task=part.task,
            length=part.length,
            case=case.name,
            sample=script.name,
            label=label,
            digest=script.digest,
            mode=config.mode,
            selector="" if is_model else config.selector,
            hints="+".join(config.hints),
            prefill=config.prefill,
            prefill_selector=_prompt_selector(config),
            prefill_candidates=_prompt_candidates(config),
            num_read=config.num_selected(num_blocks),
            num_blocks=num_blocks,
            kv_format=str(config.kv_format),
            **dataclasses.asdict(scored[row]),
        )
        for row, script in enumerate(batch)
        for label, scored in zip(script.labels, found, strict=True)
    ]
