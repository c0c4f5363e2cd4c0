"""`sparda bench prr`, with a tiny model on a CPU from end to end."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.cli import labs
from sparda_compile.cli import main as cli
from sparda_compile.cli.prr import prr_part

prr = pytest.importorskip("sparda_compile.bench.prr")

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "prr", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


@pytest.fixture
def asked(monkeypatch):
    """Settings that were asked for; only the part of attention runs, and says nothing."""
    asked = []
    result = {"tokens": 1, "cells": [], "ratios": {}}

    class OnePart(prr.PrrBench):
        def parts(self):
            asked.append(self.setting)
            return [self._part("attention", 1.0, lambda: result)]

    monkeypatch.setattr(prr, "PrrBench", OnePart)
    monkeypatch.setattr(labs, "require_gpu", lambda command: None)
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")
    return asked


def test_defaults(asked, tmp_path):
    result = run("--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert asked == [prr.PrrSetting()]
    found = json.loads((tmp_path / "prr.json").read_text())
    assert [each["part"] for each in found["results"]] == ["attention"]
    assert "attention done" in words(result.stdout)
    assert "prr.json" in result.stdout


def test_what_is_asked_for_as_json(asked, tmp_path):
    result = run(
        "--shape", "8b-8kv", "--tokens", 65536, "--tokens", 16384, "--batch", 2, "--coverage", 0.8,
        "--coverage", 1, "--out", tmp_path, "--commit", "1a2b", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (setting,) = asked
    assert (setting.shapes, setting.tokens, setting.batches) == (("8b-8kv",), (65536, 16384), (2,))
    assert setting.layer == dataclasses.replace(prr.LayerSetting(), coverages=(0.8, 1.0))
    found = json.loads(result.stdout)
    assert found["coverages"] == [0.8, 1.0]
    written = json.loads((tmp_path / "prr.json").read_text())
    assert written["environment"]["commit"] == "1a2b"


def test_what_has_no_time_is_left_out(asked, tmp_path):
    result = run("--minutes", 0, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "attention left out" in words(result.stdout)


def test_a_failure_is_the_exit_code(asked, monkeypatch, tmp_path):
    def fails(self, name, minutes, measure):
        raise RuntimeError("CUDA error")

    part = prr.Part("attention", 1.0, lambda: False, lambda: fails(None, "", 0, None))
    monkeypatch.setattr(prr.PrrBench, "parts", lambda self: [part])
    result = run("--out", tmp_path)
    assert result.exit_code == 1
    assert "attention failed; see above" in words(result.stderr)
    with pytest.raises(RuntimeError, match="attention failed"):
        prr_part(tmp_path, None, print).run()


def test_part_of_all_is_done_when_everything_is_there(asked, tmp_path):
    part = prr_part(tmp_path, "1a2b", print)
    assert (part.name, part.is_done()) == ("prr", False)
    part.run()
    assert part.is_done()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["--tokens", 10000], "multiple of 64 from 10240 on"),
        (["--tokens", 6400], "multiple of 64 from 10240 on"),
        (["--batch", 0], "--batch"),
        (["--coverage", 1.5], "--coverage"),
    ],
)
def test_wrong_usage(asked, arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in words(result.stderr)
    assert asked == []


def test_least_tokens_have_a_trace():
    from sparda_compile.bench.prr_case import PrrCase
    from sparda_compile.cli.prr import _LEAST_TOKENS

    setting = prr.PrrSetting()
    shape = setting.shape("tiny", _LEAST_TOKENS)
    small = dataclasses.replace(shape, attends=False, steps=2)
    case = PrrCase(torch.device("cpu"), small)
    reads = case.layers[0].reads[0]
    assert int(reads[0, 0].sum()) == 96
    ids = case.predict(case.layers[0], 0, 192, 0.7)
    assert int((ids[0, 0] >= 0).sum()) <= 192


@needs_no_gpu
def test_no_gpu(tmp_path):
    result = run("--out", tmp_path)
    assert result.exit_code == 2
    assert "`sparda bench prr` measures a CUDA GPU" in words(result.stderr)
    assert not list(tmp_path.iterdir())
