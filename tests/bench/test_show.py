from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparda_compile.bench.budget import budget_row
from sparda_compile.bench.memory import GIB, LargestBatch
from sparda_compile.bench.show import (
    print_budget,
    print_decode,
    print_kernels,
    print_machine,
    print_parts,
    print_prefill,
    print_start,
    print_turns,
)
from sparda_compile.passes.machine import MACHINES


def spread(us, **more):
    return {"median": us, "low": us, "high": us, "runs": 60, **more}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=130)


def lines(console):
    """Return what was printed, with single spaces."""
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_decode(console, decode_results):
    print_decode(decode_results, console)
    printed = lines(console)
    assert "sched/ inline/ sched/ pred/" in printed[1]
    columns = "batch overlap scheduled inline resident body body sched floor sched tokens/s MB"
    assert printed[2] == columns
    # Results from before predictions were kept have none.
    assert "1 0.9 5.000 7.500 4.000 3.500 1.429 1.500 1.250 - 3200 40.0" in printed
    assert "16 0.5 20.000 30.000 16.000 14.000 1.429 1.500 1.250 - 800 200.0" in printed
    assert "batch 16: dense is left out: its KV cache needs 64.0 GiB." in printed
    assert "batch 64: scheduled is left out: its KV cache needs 256.0 GiB." in printed


def test_decode_says_how_far_its_prediction_is_off(console, decode_results):
    decode_results[0]["by_overlap"]["0.9"]["scheduled"]["predicted_us"] = 5500.0
    print_decode(decode_results, console)
    assert "1 0.9 5.000 7.500 4.000 3.500 1.429 1.500 1.250 1.100 3200 40.0" in lines(console)


def test_baselines_say_whether_their_logits_agree(console, decode_results):
    print_decode(decode_results, console)
    printed = lines(console)
    assert "batch 1, transformers' caches, overlap 0.9" in printed
    assert "static 54.000 10.800" in printed
    assert "offloaded 200.000 WRONG 40.000" in printed
    assert "offloaded_repaired 210.000 agree (wait) 42.000" in printed
    assert "batch 16: static is left out: a static cache needs 64.0 GiB." in printed


def test_budget(console):
    plan = {
        "resident": LargestBatch(1, "budget", 4 * GIB, 0),
        "scheduled": LargestBatch(19, "CPU memory", 7 * GIB, 76 * GIB),
    }
    times = {"0.9": {"resident": [5000.0], "scheduled": [9500.0]}}
    none = {**plan, "resident": LargestBatch(0, "budget", 0, 0)}
    print_budget([budget_row(plan, 8 * GIB, times), budget_row(none, GIB, {})], console)
    printed = lines(console)
    assert "8 GiB 0.9 resident 1 budget 4.0 0.0 5.000 200" in printed
    assert "8 GiB 0.9 scheduled 19 CPU memory 7.0 76.0 9.500 2000 10.000" in printed
    assert "1 GiB - resident 0 budget 0.0 0.0 - -" in printed
    assert "1 GiB is left out: not one sequence of resident fits: budget." in printed


def test_kernels(console):
    result = {
        "copy": {"us": spread(2000.0), "gbps": 4295.0},
        "gather": {
            "memcpy": spread(160.0, gbps=52.0),
            "by_programs": {8: spread(185.0, gbps=45.0, of_memcpy=0.865)},
        },
        "miss_list_b1": {"chain": spread(12.0), "floor_us": 1.0},
        "attention_b1_g2": {
            "blocks_per_split": 4,
            "by_blocks_per_split": {4: spread(9.0), 8: spread(11.0)},
            "floor_us": 1.5,
            "sdpa_gathered": spread(20.0),
        },
        "prompt": {
            "tokens": 16384,
            "past": 131072,
            "kernels": {"attend_g2": spread(6000.0, floor_us=2400.0, tflops=274.9, of_matmul=0.41)},
            "others": {
                "flex_128x64_g2": spread(
                    9000.0, tflops=183.2, mask_us=12000.0, ours_us=6000.0, over_ours=1.5
                ),
                "nsa_g2": {"skipped": "ImportError: no fla"},
            },
        },
        "beside": {
            "b1": {
                "compute_us": 730.5,
                "by_copy": {
                    "gather 8": {"copy_us": 500.0, "both_us": 830.5, "hidden": 0.8, "held_up": 0.25}
                },
            }
        },
    }
    print_kernels(result, console)
    printed = lines(console)
    assert printed[0] == "Device copy: 4295 GB/s."
    assert "8 185.0 45.0 0.865" in printed
    assert "memcpy 160.0 52.0 1" in printed
    assert "miss_list_b1 12.0 1.00 12.000 - -" in printed
    assert "attention_b1_g2 9.0 1.50 6.000 20.0 -" in printed
    assert "16384 tokens of a prompt behind 131072, 96 blocks a token" in printed
    assert "attend_g2 6000 2400 2.500 275 0.410" in printed
    assert "flex_128x64_g2 9000 183 12000 6000 1.500" in printed
    assert "a prompt: nsa_g2 is left out: ImportError: no fla." in printed
    assert "Beside matrix products, batch 1" in printed
    assert "nobody - 730.5 - -" in printed
    assert "gather 8 500 830.5 0.8 0.25" in printed


def test_machine(console):
    print_machine(MACHINES["h200"], console)
    printed = lines(console)
    assert "h200, measured" in printed
    assert "link, GB/s 50.10" in printed
    assert "select_pages beside its bytes, us 8.80" in printed
    assert "kernel of the model beside its bytes, us 3.10" in printed
    assert "share that a copy takes from compute 0.150" in printed


def test_parts(console):
    parts = [
        {"name": "kernels", "status": "done", "seconds": 61.4},
        {"name": "budget 8 GiB", "status": "left out", "reason": "no time"},
    ]
    print_parts(parts, console)
    assert "kernels done 61" in lines(console)
    assert "budget 8 GiB left out - no time" in lines(console)


def test_start(console):
    def use(first, **stage_s):
        token_s = {"first": first, "second": 0.5, "third": 0.25, "fourth": 0.25}
        return {"token_s": token_s, "total_s": first + 1, "stage_s": stage_s}

    def scenario(name, first, **stage_s):
        again = use(1.0)
        found = {"scenario": name, "first_use": use(first, **stage_s), "repeat": again}
        return {**found, "beyond_s": {"total": first - 1}}

    optimize = {"total_s": 8.0, "stage_s": {"capture": 3.0, "passes": 2.0, "verify": 1.0}}
    cold = {
        "run": "sparda cold",
        "import_s": {"torch": 2.0, "transformers": 1.5},
        "optimize": optimize,
        "scenarios": [scenario("1x20", 9.0, compile=7.0), scenario("2x20", 2.0)],
    }
    warm = {"run": "sparda warm", "scenarios": [scenario("1x20", 3.0)], "failed": "[slow]"}
    skipped = [scenario("1x20", 1.5), {"scenario": "2x20", "skipped": "out of memory"}]
    dynamic = {"run": "dynamic cold", "scenarios": skipped, "note": "it is eager"}
    print_start([cold, warm, dynamic], console)
    printed = lines(console)
    assert "prompts stage cold warm cold" in printed
    begin = printed.index("all of them import 3.50 0.00 0.00")
    assert [line for line in printed[begin + 1 : begin + 18] if line] == [
        "optimize 8.00 0.00 0.00",
        "capture 3.00 0.00 0.00",
        "passes 2.00 0.00 0.00",
        "verify 1.00 0.00 0.00",
        "compile 7.00 0.00 0.00",
        "allocate 0.00 0.00 0.00",
        "beyond 9.00 2.00 0.50",
        "1x20 compile 7.00 0.00 0.00",
        "first 9.00 3.00 1.50",
        "second 0.50 0.50 0.50",
        "beyond 8.00 2.00 0.50",
        "2x20 first 2.00 - -",
        "second 0.50 - -",
        "beyond 1.00 - -",
    ]
    assert "dynamic cold: 2x20 is left out: out of memory." in printed
    assert "dynamic cold: it is eager." in printed
    assert "sparda warm failed: [slow]" in printed


def test_prefill(console):
    def row(seconds, **more):
        return {
            "cold_s": 30.5,
            "first_token_s": {"median": seconds},
            "over_floor": 2.1,
            "tokens_2_to_10_over_steady": [1.25, *[1.0] * 8],
            "steady_s": 0.0061,
            "peak_gpu_bytes_beyond_weights": 3 * GIB,
            "host_kv_bytes": 4 * GIB,
        }

    law = {"first_token_s": 150.0, "linear": 1e-5, "quadratic": 1e-9, "fitted_to": [1024, 131072]}
    results = [
        {
            "tokens": 131072,
            "auto": "sparse",
            "programs": {
                "sparse_forecast": {**row(8.0), "hidden_share": 0.97, "gpu_busy": 0.99},
                "transformers_flash": row(12.0),
            },
            "skipped": {"dense": "no time"},
            "transformers_over": {"sparse_forecast": 1.5},
        },
        {
            "tokens": 524288,
            "auto": "sparse",
            "programs": {"sparse_forecast": {**row(30.0), "copies_skipped": "no time"}},
            "skipped": {"transformers_flash": "too long"},
            "by_law": {"transformers_flash": law},
            "transformers_over": {"sparse_forecast": 5.0},
        },
    ]
    print_prefill({"selector": "lowbit2", "results": results}, console)
    printed = lines(console)
    assert printed[0] == "selector lowbit2"
    assert (
        "131072 sparse_forecast 30.50 8.000 1.500 2.100 1.250 6.10 0.970 0.990 3.0 4.0" in printed
    )
    assert "131072 transformers_flash 30.50 12.000 - 2.100 1.250 6.10 - - 3.0 4.0" in printed
    assert "524288 transformers_flash - 150.000* - - - - - - - -" in printed
    assert '131072 tokens: prefill="auto" is sparse.' in printed
    assert "131072 tokens: dense is left out: no time." in printed
    assert "524288 tokens: transformers_flash is left out: too long." in printed
    assert "524288 tokens: sparse_forecast is not profiled: no time." in printed
    assert "not measured: by the law" in " ".join(printed)


def test_turns(console):
    def row(first, median):
        return {"first_s": first, "median": median}

    results = [
        {
            "past": 131072,
            "programs": {
                "sparse_query": {
                    "by_turn": {
                        "1": {**row(0.5, 0.05), "hidden_share": 0.9, "gpu_busy": 0.5},
                        "200": {**row(0.6, 0.1), "copies_skipped": "no room"},
                    }
                },
                "transformers_flash": {
                    "by_turn": {"1": row(0.1, 0.07), "200": {"skipped": "mask"}}
                },
            },
            "skipped": {"dense": "no memory"},
            "transformers_over": {"1": {"program": "transformers_flash", "sparse_query": 1.4}},
        }
    ]
    chosen = {"selector": "lowbit2", "prefill_selector": "infllm2", "prefill_candidates": 2.5}
    print_turns({**chosen, "results": results}, console)
    printed = lines(console)
    assert "selector lowbit2, selector of prompts infllm2, 2.5x candidates" in printed
    assert "131072 1 sparse_query 500.0 50.0 1.400 0.900 0.500" in printed
    assert "131072 1 transformers_flash 100.0 70.0 - - -" in printed
    assert "131072 200 sparse_query 600.0 100.0 - - -" in printed
    assert "behind 131072: dense is left out: no memory." in printed
    assert "behind 131072, turns of 200: sparse_query is not profiled: no room." in printed
    assert "behind 131072, turns of 200: transformers_flash is left out: mask." in printed
