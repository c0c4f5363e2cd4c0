"""Programs compiled ahead are those that a benchmark finds in Inductor's cache."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch

from sparda_compile.bench import decode, precompile
from sparda_compile.bench.decode import DecodeSetting
from sparda_compile.bench.precompile import (
    Target,
    build_hollow_model,
    compile_apart,
    compile_here,
)
from sparda_compile.bench.programs import build_program
from sparda_compile.bench.shapes import SHAPES, build_model
from sparda_compile.errors import ConfigError
from sparda_compile.program.captures import Captures

CPU = torch.device("cpu")
TINY = Target("tiny", 2, "scheduled", 16384)


def test_unknown_variant_is_refused():
    with pytest.raises(ConfigError, match="variant fast is not known; use one of scheduled"):
        Target("tiny", 1, "fast", 16384)


def test_hollow_model_has_the_shapes_and_next_to_no_weights():
    real, hollow = (
        f(SHAPES["tiny"], CPU, torch.bfloat16) for f in (build_model, build_hollow_model)
    )
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (real, hollow)]
    assert shapes[0] == shapes[1]
    assert len({p.untyped_storage().data_ptr() for p in hollow.parameters()}) == 1
    for name, buffer in real.named_buffers():
        assert torch.equal(buffer, hollow.get_buffer(name))
    ids = torch.zeros((1, 3), dtype=torch.long)
    assert hollow(ids).logits.isfinite().all()


def test_real_program_has_the_same_place_in_the_cache(monkeypatch):
    """Inductor is stopped where it knows the place; the rest is a C++ compiler's work."""
    from torch._inductor import codecache

    places = []
    find = codecache.compiled_fx_graph_hash

    def stop(*args, **kwargs):
        places.append(find(*args, **kwargs)[0])
        raise RuntimeError("far enough")

    monkeypatch.setattr(codecache, "compiled_fx_graph_hash", stop)
    monkeypatch.setitem(SHAPES, "tiny", dataclasses.replace(SHAPES["tiny"], num_layers=1))
    said = []
    with pytest.raises(Exception, match="far enough"):
        compile_here([TINY], "cpu", said.append)
    assert said == ["building and tracing tiny", "compiling tiny batch 2 scheduled"]
    captures = Captures(build_model(SHAPES["tiny"], CPU, torch.bfloat16), {})
    for batch_size in (2, 3):
        program = build_program(captures, "scheduled", batch_size, TINY.max_tokens, 96)
        with pytest.raises(Exception, match="far enough"):
            program.compile()
    # Batch sizes above one share it.
    assert len(places) == 3
    assert len(set(places)) == 1


def test_programs_are_those_of_a_benchmark(monkeypatch):
    made = []

    class Made:
        def compile(self):
            made.append("compiled")

    def build(captures, *given):
        made.append(given)
        return Made()

    monkeypatch.setattr(decode, "build_program", build)
    compile_here([TINY], "cpu", lambda text: None)
    setting = DecodeSetting(2, TINY.max_tokens)
    assert made == [("scheduled", 2, TINY.max_tokens, setting.trace_steps), "compiled"]


def test_each_is_compiled_by_a_process_of_its_own(monkeypatch):
    commands = []

    def run(command, env, **_):
        commands.append(command)
        failed = "inline" in command
        assert int(env["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1
        return subprocess.CompletedProcess(command, int(failed), "", "no room" if failed else "")

    monkeypatch.setattr(precompile.subprocess, "run", run)
    said = []
    targets = [TINY, Target("tiny", 2, "inline", 16384)]
    found = compile_apart(targets, 2, said.append)
    assert [(target, failure) for target, _, failure in found] == [
        (targets[0], None), (targets[1], "no room"),
    ]  # fmt: skip
    assert sorted(text.split()[3:5] for text in said) == [
        ["inline", "failed"],
        ["scheduled", "took"],
    ]
    wanted = "bench compile --jobs 1 --shape tiny --batch 2 --variant scheduled --tokens 16384"
    assert any(" ".join(command).endswith(wanted) for command in commands)
