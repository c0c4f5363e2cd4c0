"""Predicted beside measured: the steps of result files, planned again without a GPU.

Every program that `sparda bench decode`, `budget` or `profile` has timed is planned on a model of
the same shape that has no weights, for the machine that the file names, and its step is predicted
at the file's overlaps. As there, a program is scheduled once, for what is expected by default.

A prediction is of the programs of today. What was measured before `SINCE` ran others: it is
listed, and its ratio says nothing.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.decode import VARIANTS
from sparda_compile.bench.programs import plan_body, predicted_us, variant_config
from sparda_compile.bench.shapes import SHAPES, build_model
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.passes.machine import MACHINES
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sparda_compile.program.plan import Plan

__all__ = ["EXACT_SINCE", "SINCE", "Point", "Predictor", "points_in", "read_points"]

# The first day on which the attention and the gather of today were measured.
SINCE: Final = "2026-11-26"
# The first on which repairs of mode `exact` had a stream of their own.
EXACT_SINCE: Final = "2026-11-30"
_BUDGET_SIDES: Final = ("resident", "scheduled")
_FIELDS: Final = ("hint", "kv_format", "page_format", "selector", "top_k", "page_ratio")


@dataclasses.dataclass(frozen=True)
class Point:
    """One program at one overlap, as a file has it.

    Attributes:
        file: Name of the file.
        date: When it was measured.
        machine: Whose constants it is predicted with, a key of `MACHINES`.
        shape: A key of `SHAPES`.
        batch_size: Sequences.
        max_tokens: Tokens per sequence that the KV cache holds.
        variant: One of `decode.VARIANTS`.
        mode: Of all variants but `dense` and `body`.
        overlap: Share of scored blocks that a step has in common with the one before.
        measured_us: Median of its steps, microseconds.
        fields: Of SpardaConfig, with their values: those that the file names.
    """

    file: str
    date: str
    machine: str
    shape: str
    batch_size: int
    max_tokens: int
    variant: str
    mode: str
    overlap: float
    measured_us: float
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def is_judged(self) -> bool:
        """Whether the programs of today were measured."""
        return self.date >= (EXACT_SINCE if self.mode == "exact" else SINCE)


def read_points(path: Path) -> list[Point]:
    """Return the points of a file that `sparda bench` has written.

    Raises:
        ConfigError: If it is no file of `decode`, `budget` or `profile`, or of an unknown machine.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return list(points_in(content, path.name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no result of `sparda bench` decode, budget or profile "
            f"({type(error).__name__}: {error}); give files that one of these has written."
        ) from error


def points_in(content: Mapping[str, Any], file: str) -> Iterator[Point]:
    """Yield the points of a result.

    Args:
        content: Of a file of `decode`, `budget` or `profile`.
        file: Its name.
    """
    environment = content["environment"]
    head = {
        "file": file,
        "date": environment["date"],
        "machine": _machine_of(environment["gpu"], file),
        "shape": content["shape"],
        "max_tokens": content["max_tokens"],
        "mode": content.get("mode", "forecast"),
        "fields": tuple((name, _hashable(content[name])) for name in _FIELDS if name in content),
    }
    if content["name"] == "profile":
        what = {"batch_size": content["batch_size"], "overlap": content["overlap"]}
        measured_us = content["measured"]["step_us"]
        yield Point(**head, **what, variant="scheduled", measured_us=measured_us)
        return
    is_budget = {"decode": False, "decode-trace": False, "budget": True}[content["name"]]
    for result in content["results"]:
        for overlap, row in result["by_overlap"].items():
            for variant in _BUDGET_SIDES if is_budget else VARIANTS:
                if variant in row:
                    yield Point(
                        **head,
                        batch_size=(result[variant] if is_budget else result)["batch_size"],
                        variant=variant,
                        overlap=row.get("recorded", {}).get("overlap_by_bytes", float(overlap)),
                        measured_us=row[variant]["median"],
                    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _machine_of(gpu: str | None, file: str) -> str:
    known = [name for name in MACHINES if name in (gpu or "").lower()]
    if not known:
        raise ConfigError(
            f"{file} was measured on {gpu or 'no GPU'}, whose constants are not known; known are "
            f"{', '.join(MACHINES)}."
        )
    return known[0]


class Predictor:
    """Plans each program once, and predicts its steps at any overlap."""

    def __init__(self) -> None:
        self._captures: dict[str, Captures] = {}
        self._plans: dict[Point, Plan] = {}

    def step_us(self, point: Point) -> float:
        """Return the predicted time of a point's step, microseconds."""
        captures = self._captures_of(point.shape)
        key = dataclasses.replace(point, file="", date="", overlap=0.0, measured_us=0.0)
        if key not in self._plans:
            self._plans[key] = _plan(captures, point)
        return predicted_us(captures, self._plans[key], point.overlap)

    def _captures_of(self, shape: str) -> Captures:
        if shape not in self._captures:
            model = build_model(SHAPES[shape], torch.device("meta"), torch.bfloat16)
            self._captures[shape] = Captures(model, {})
        return self._captures[shape]


def _plan(captures: Captures, point: Point) -> Plan:
    if point.variant == "body":
        config = SpardaConfig(mode="dense", offload="never", machine=point.machine)
        return plan_body(captures, point.batch_size, config)
    settings = {"machine": point.machine, "mode": point.mode, **dict(point.fields)}
    config = variant_config(point.variant, point.max_tokens, 0, **settings)
    batch_size, max_tokens = point.batch_size, point.max_tokens
    return make_plan(captures, "decode", config, batch_size=batch_size, max_tokens=max_tokens)
