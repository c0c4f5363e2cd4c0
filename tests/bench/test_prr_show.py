from __future__ import annotations

import io

import pytest
from rich.console import Console

prr_show = pytest.importorskip("sparda_compile.bench.prr_show")


def spread(us, **more):
    return {"median": us, "low": us, "high": us, "runs": 8, **more}


def ratios(us, **more):
    return spread(us, over_torch=100 / us, over_query=50 / us, floor_us=5.0, **more)


ABLATION = {
    "recompute": 1.02, "kernels_alone": 2.0, "repair": 2.1, "ema": 2.5,
    "paper": {"recompute": 1.01, "repair": 1.30, "ema": 1.56},
}  # fmt: skip
PROGRAMS = {
    "torch_sdpa": ratios(100.0),
    "query": ratios(50.0),
    "speculate_b1.5_c0.98_update": ratios(40.0, coverage=0.979, budget=1.5),
}
RESULTS = [
    {
        "part": "8b 131072 tokens batch 1",
        "by_overlap": {
            "0.9": {
                "best_torch": "torch_sdpa",
                "programs": PROGRAMS,
                "headline": PROGRAMS["speculate_b1.5_c0.98_update"],
                "ladder": {"torch_sdpa_without_graph": 321.0},
                "ablation": ABLATION,
                "skipped": {"flashinfer_auto": "ModuleNotFoundError: No module"},
            },
            "0.7": {"programs": {"query": ratios(51.0)}, "ablation": ABLATION, "skipped": {}},
        },
        "skipped": {},
    },
    {
        "part": "8b 524288 tokens batch 16",
        "by_overlap": {},
        "skipped": {"everything": "the cache of all layers needs 200.0 GiB"},
    },
    {
        "part": "attention",
        "tokens": 131072,
        "cells": [
            {"block": 16, "budget": 1024, "ours": spread(5.0), "sdpa": spread(20.0),
             "gather_sdpa": spread(30.0), "floor_us": 1.2, "paper": 1.17,
             "skipped": {"flashinfer": "ImportError: no flashinfer"}},
            {"block": 64, "budget": 8192, "ours": spread(12.0), "flashinfer": spread(36.0),
             "over_flashinfer": 3.0, "floor_us": 8.0, "skipped": {}},
        ],
        "ratios": {"over_sdpa": {"mean": 4.0, "best": 4.5, "least": 3.5}},
    },
    {
        "part": "selection 8b",
        "by_tokens": {
            "131072": {"score": spread(8.0), "select": spread(6.0), "both": spread(13.5),
                       "torch": spread(60.0), "floor_us": 1.0, "paper_us": 62.53},
            "384": {"score": spread(8.0), "select": spread(6.0), "both": spread(13.5),
                    "torch": spread(60.0), "floor_us": 1.0},
        },
    },
    {
        "part": "prediction 8b",
        "by_tokens": {
            "65536": {"update": spread(2.5), "predict": spread(7.0), "calibrate": spread(90.0),
                      "paper_calibration_us": {"exposed": 280, "all": 11200}},
        },
        "paper_us": 10.0,
    },
    {
        "part": "summary",
        "shapes": 1,
        "found": {"best_over_torch": 2.5, "least_over_query": 0.99},
        "bars": {"best_over_torch": 1.64, "least_over_query": 1.0},
        "passed": {"best_over_torch": True, "least_over_query": False},
    },
]  # fmt: skip


@pytest.fixture
def printed():
    console = Console(file=io.StringIO(), width=130)
    prr_show.print_prr(RESULTS, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "8b 131072 tokens batch 1 321.0 100.0 50.0 40.0 1.5 0.979 2.50 1.25",
        "8b 131072 tokens batch 1 0.9 1.02 2.00 2.10 2.50",
        "8b 131072 tokens batch 1 0.7 1.02 2.00 2.10 2.50",
        "the paper 1.01 - 1.30 1.56",
        "8b 131072 tokens batch 1, overlap 0.7",
        "speculate_b1.5_c0.98_update 40.00 5.00 0.979 2.50 1.25",
        "query 51.00 5.00 - 1.96 0.98",
        "8b 131072 tokens batch 1: flashinfer_auto is left out: ModuleNotFoundError: No module.",
        "8b 524288 tokens batch 16: everything is left out: "
        "the cache of all layers needs 200.0 GiB.",
        "16 1024 5.0 20.0 30.0 - 1.2 - 1.17",
        "64 8192 12.0 - - 36.0 8.0 3.00 -",
        "over_sdpa: mean 4.00, best 4.50, least 3.50.",
        "attention: flashinfer is left out: ImportError: no flashinfer.",
        "131072 8.0 6.0 13.5 60.0 1.0 62.5",
        "384 8.0 6.0 13.5 60.0 1.0 -",
        "65536 2.5 7.0 10 90.0 11200",
        "best_over_torch 2.500 1.64 yes",
        "least_over_query 0.990 1 NO",
    ],
)
def test_everything_is_shown(printed, line):
    assert line in printed


def test_nothing_is_shown_of_what_is_not_there():
    console = Console(file=io.StringIO(), width=130)
    prr_show.print_prr(RESULTS[1:2], console)
    assert "left out" in console.file.getvalue()
    assert "Bars" not in console.file.getvalue()
