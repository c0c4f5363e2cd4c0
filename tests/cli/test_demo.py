from __future__ import annotations

import json

import pytest
import torch

from sparda_compile.demo import run as demo


def test_demo_prints_a_table(sparda, tmp_path):
    result = sparda(
        "demo", "--model", "random", "--tokens", 640, "--new-tokens", 3, "--mode", "forecast"
    )
    assert result.exit_code == 0, result.stderr
    assert "original" in result.stdout
    assert result.stdout.count("Forecast weights are not trained") == 1
    assert "not trained" not in result.stderr
    assert "Wrote sparda-demo.html" in result.stdout
    assert (tmp_path / "sparda-demo.html").exists()


def test_demo_that_finds_a_difference_fails(sparda, monkeypatch):
    def generate(model, ids, new_tokens):
        return torch.full((new_tokens,), float(hasattr(model, "sparda"))), (1.0, 1.0)

    monkeypatch.setattr(demo, "_generate", generate)
    monkeypatch.setattr(demo, "_row", lambda *a: wrong_row())
    result = sparda(
        "demo", "--model", "random", "--tokens", 128, "--new-tokens", 2, "--mode", "dense", "--json"
    )
    assert result.exit_code == 1
    assert "mode dense reads all blocks, but only 0%" in result.stderr
    assert json.loads(result.stdout)["mismatches"]


def wrong_row():
    return demo.DemoRow(
        mode="dense", blocks=2, num_blocks=2, agreement=0.0, must_agree=True, prefill_ms=1.0,
        token_ms=1.0, device_bytes=1, full_bytes=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--model", "random", "--mode", "fast"], "is not one of 'dense'"),
        (["demo", "--model", "random", "--tokens", "100000000"], "bytes of text that the demo has"),
        (["demo", "--model", "large"], "not one of 'small', 'random'"),
    ],
)
def test_wrong_usage(sparda, arguments, words):
    result = sparda(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())
    assert "Traceback" not in result.stderr
