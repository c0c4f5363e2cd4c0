"""What was found on texts: records of single samples, rows of configurations, and their file.

A record is one answer, or the scored tokens of one document, under one configuration. Rows are made
of records alone, so a file of records is all that an evaluation needs to go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.environment import result_to_go_on, write_result
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.cases import DENSE
from sparda_compile.evaluation.text.intervals import Estimate, ratio_estimate, share_estimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Record", "TextFile", "TextRow", "digest_of", "rows_of"]

_NAME: Final = "eval_text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One steps part of one sample under one configuration.

    Attributes:
        task: `perplexity`, `needle` or `chat`.
        length: Tokens of the sample.
        case: Name of the configuration; `dense` is the model itself.
        sample: Name of the document, trial or conversation.
        label: Depth of a needle, or the question of a conversation.
        digest: Hash of the tokens that were fed.
        mode: Of the configuration, and the next three.
        selector: Empty for the model itself.
        hints: Names, joined by `+`.
        prefill: What the prompt's tokens read.
        num_read: Blocks that a step reads at the end of the sample.
        num_blocks: Blocks of the sample.
        tokens: Predictions that count.
        nll: Their negative log-likelihood, nats, summed.
        kl: Their KL divergence from the model itself, nats, summed.
        same: Those whose likeliest token is the model's.
        is_right: Whether all of their likeliest tokens are right.
        kv_format: How full blocks are written.
        prefill_selector: Who selects for the tokens of a sparse prompt; empty for the selector.
        prefill_candidates: Blocks that they score, as a multiple of those chosen; 0 for all.
    """

    task: str
    length: int
    case: str
    sample: str
    label: str
    digest: str
    mode: str
    selector: str
    hints: str
    prefill: str
    num_read: int
    num_blocks: int
    tokens: int
    nll: float
    kl: float
    same: int
    is_right: bool
    kv_format: str = "model"
    prefill_selector: str = ""
    prefill_candidates: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRow:
    """One configuration on one task at one length; intervals are of 95%.

    Attributes:
        task: As in records, like the next six.
        length: Tokens of a sample.
        case: Name of the configuration.
        mode: Its mode.
        selector: Its selector.
        hints: Its hints.
        prefill: What the prompt's tokens read.
        budget: Share of the blocks that a step reads.
        num_samples: Documents, trials or conversations: the clusters.
        tokens: Predictions that count.
        perplexity: Of the right tokens.
        ratio: Perplexity over that of the model itself on the same tokens.
        kl: Mean divergence of a prediction from the model's own, nats.
        top1: Share of predictions whose likeliest token is the model's.
        right: Share of right answers; None for perplexity.
        right_gain: Share of right answers less that of the model itself; None likewise.
        right_by_label: Share of right answers by depth or question.
        kv_format: How full blocks are written.
        prefill_selector: As in records.
        prefill_candidates: As in records.
    """

    task: str
    length: int
    case: str
    mode: str
    selector: str
    hints: str
    prefill: str
    budget: float
    num_samples: int
    tokens: int
    perplexity: Estimate
    ratio: Estimate
    kl: Estimate
    top1: Estimate
    right: Estimate | None
    right_gain: Estimate | None
    right_by_label: dict[str, float]
    kv_format: str = "model"
    prefill_selector: str = ""
    prefill_candidates: float = 0.0


def rows_of(records: Sequence[Record]) -> list[TextRow]:
    """Return a row for each task, length and configuration, in the order of their first records."""
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.length, record.case), []).append(record)
    dense = {(r.task, r.length, r.sample, r.label): r for r in records if r.case == DENSE}
    return [
        _row(group, [dense[r.task, r.length, r.sample, r.label] for r in group])
        for group in groups.values()
    ]


def _row(records: list[Record], dense: list[Record]) -> TextRow:
    first, samples = records[0], list(dict.fromkeys(r.sample for r in records))

    def sums(values: Iterable[float]) -> list[float]:
        total = dict.fromkeys(samples, 0.0)
        for record, value in zip(records, values, strict=True):
            total[record.sample] += value
        return list(total.values())

    tokens, answers = sums(r.tokens for r in records), sums(1.0 for _ in records)
    pairs = list(zip(records, dense, strict=True))
    gains = sums(float(r.is_right) - float(d.is_right) for r, d in pairs)
    is_answered = first.task != "perplexity"
    labels = dict.fromkeys(r.label for r in records) if is_answered else {}
    return TextRow(
        task=first.task,
        length=first.length,
        case=first.case,
        mode=first.mode,
        selector=first.selector,
        hints=first.hints,
        prefill=first.prefill,
        budget=first.num_read / first.num_blocks,
        num_samples=len(samples),
        tokens=int(sum(tokens)),
        perplexity=ratio_estimate(sums(r.nll for r in records), tokens).map(_exp),
        ratio=ratio_estimate(sums(r.nll - d.nll for r, d in pairs), tokens).map(_exp),
        kl=ratio_estimate(sums(r.kl for r in records), tokens, (0.0, math.inf)),
        top1=ratio_estimate(sums(r.same for r in records), tokens, (0.0, 1.0)),
        right=share_estimate(sums(float(r.is_right) for r in records), answers)
        if is_answered
        else None,
        right_gain=ratio_estimate(gains, answers, (-1.0, 1.0)) if is_answered else None,
        right_by_label={
            label: _mean([float(r.is_right) for r in records if r.label == label])
            for label in labels
        },
        kv_format=first.kv_format,
        prefill_selector=first.prefill_selector,
        prefill_candidates=first.prefill_candidates,
    )


def _exp(nats: float) -> float:
    """Return e to the power of nats: infinity where that is more than a float has."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weights: its safetensors or .bin files."""
    found = hashlib.sha256()
    weights = (".safetensors", ".bin")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in weights)
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                found.update(block)
    return found.hexdigest()


class TextFile:
    """Records of an evaluation, kept in a JSON file, from which it goes on.

    Args:
        path: The file; None keeps nothing.
        head: What decides the numbers of a record beside its task, length and configuration, as
            plain data: model, texts, settings.
        commit: Of this package, where it is not a git checkout.

    Raises:
        ConfigError: If there is a file that was made with something else.
    """

    def __init__(self, path: Path | None, head: dict[str, Any], commit: str | None = None) -> None:
        self.path, self._commit = path, commit
        self._head = {"name": _NAME, **head}
        self.records: list[Record] = []
        if path is not None and path.exists():
            self.records = self._found(path)
        self._known = {self._key(record) for record in self.records}

    def has(self, task: str, length: int, case: str, samples: Iterable[tuple[str, str]]) -> bool:
        """Whether a configuration was measured on samples, each given by its name and digest."""
        return all((task, length, case, *sample) in self._known for sample in samples)

    def add(self, records: Sequence[Record]) -> None:
        """Add records that are not known, and write the file."""
        new = [record for record in records if self._key(record) not in self._known]
        self.records += new
        self._known |= {self._key(record) for record in new}
        if new and self.path is not None:
            write_result(self.path, self.to_dict(), self._commit)

    def to_dict(self) -> dict[str, Any]:
        """Return settings, rows and records as plain data; what is not finite becomes None."""
        rows = [_plain(dataclasses.asdict(row)) for row in rows_of(self.records)]
        records = [_plain(vars(record)) for record in self.records]
        return {**self._head, "rows": rows, "records": records}

    def _found(self, path: Path) -> list[Record]:
        content = result_to_go_on(path, self._head, ["records"], self._commit)
        try:
            return [Record(**_with_nan(plain)) for plain in content["records"]]
        except (AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is no file of this command; give another one.") from error

    @staticmethod
    def _key(record: Record) -> tuple[Any, ...]:
        return record.task, record.length, record.case, record.sample, record.digest


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record, with NaN where a number was not finite."""
    return {name: math.nan if value is None else value for name, value in plain.items()}
