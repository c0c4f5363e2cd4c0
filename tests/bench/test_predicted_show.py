from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from sparda_compile.bench.predicted import EXACT_SINCE, Point
from sparda_compile.bench.predicted_show import print_predicted


def test_a_point_has_a_ratio_where_it_is_judged():
    console = Console(file=io.StringIO(), width=130)
    point = Point(
        "a.json", EXACT_SINCE, "h200", "8b", 16, 131072, "scheduled", "exact", 0.9, 10000.0
    )
    older = dataclasses.replace(point, date="2026-11-25", mode="forecast")
    print_predicted([(point, 9000.0), (older, 5000.0)], console)
    printed = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "a 8b scheduled exact 16 0.9 9.000 10.000 0.900" in printed
    assert "a 8b scheduled forecast 16 0.9 5.000 10.000 -" in printed
    assert "1 points, from 0.900 to 0.900 of measured." in printed


def test_nothing_is_judged():
    console = Console(file=io.StringIO(), width=130)
    older = Point("a.json", "2026-11-25", "h100", "8b", 1, 4096, "body", "forecast", 0.5, 10.0)
    print_predicted([(older, 5.0)], console)
    assert "of measured" not in console.file.getvalue()
