from __future__ import annotations

import pytest
import torch

from sparda_compile.bench import precompile
from sparda_compile.cli import labs


def words(text):
    return " ".join(text.split())


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(labs, "require_gpu", lambda command: None)
    return []


def test_nothing_is_compiled_without_a_gpu(sparda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = sparda("bench", "compile", "--jobs", 2)
    assert result.exit_code == 2
    assert "`sparda bench compile` measures a CUDA GPU" in words(result.stderr)


def test_several_programs_are_compiled_apart(sparda, asked, monkeypatch):
    def compile_apart(targets, jobs, say):
        asked.append((jobs, [str(target) for target in targets]))
        return [(targets[0], 1.0, "no room"), *((target, 1.0, None) for target in targets[1:])]

    monkeypatch.setattr(precompile, "compile_apart", compile_apart)
    sizes = ("--batch", 1, "--batch", 4, "--variant", "scheduled", "--variant", "body")
    result = sparda("bench", "compile", "--jobs", 3, *sizes)
    assert asked == [
        (3, [f"8b batch {batch} {name}" for batch in (1, 4) for name in ("scheduled", "body")])
    ]
    assert result.exit_code == 1
    assert "8b batch 1 scheduled failed" in words(result.stderr)
    assert "no room" in words(result.stderr)


def test_one_program_is_compiled_here(sparda, asked, monkeypatch):
    monkeypatch.setattr(precompile, "compile_here", lambda *args: asked.append(args[:2]))
    result = sparda("bench", "compile", "--variant", "inline", "--tokens", 10176)
    assert result.exit_code == 0, result.output
    assert asked == [([precompile.Target("8b", 1, "inline", 10176)], "cuda")]
