"""Prompts on a CUDA GPU, dense and sparse: right, however they are cut and whatever is late."""

from __future__ import annotations

import threading

import pytest
import torch
import triton

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.isa.engines import DelayEngine
from sparda_compile.program.program import Program
from sparda_compile.testing import random_forecast, tiny_llama

pytestmark = pytest.mark.gpu

LENGTHS = (700, 421, 90, 37)
NEW_TOKENS = 40
SMALL = {"block_size": 16, "top_k": 3, "local_blocks": 1, "max_tokens": 1024}
MODES = ("query", "forecast", "exact")
TOLERANCE = 2e-5  # of the largest logit, beside the CPU


class Lab:
    """One model on a device; modules of it and what they generate."""

    def __init__(self, device):
        model = tiny_llama()
        weights = random_forecast(model, seed=1)
        self.forecast = {0 if key == "bootstrap" else key + 1: w for key, w in weights.items()}
        self.model, self.device, self.traced = model.to(device), device, None
        generator = torch.Generator().manual_seed(3)
        width = max(LENGTHS)
        self.ids = torch.randint(1, 250, (len(LENGTHS), width), generator=generator).to(device)
        mask = torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]
        self.mask = mask.long().to(device)

    def module(self, mode, **changes):
        config = SpardaConfig(
            mode=mode, hint="previous_step", **{**SMALL, "lowering": "eager", **changes}
        )
        forecast = self.forecast if config.needs_forecast else None
        module = sparda_compile.optimize(self.traced or self.model, config, forecast=forecast)
        self.traced = self.traced or module
        return module

    def run(self, module):
        """Return the logits of a greedy generation."""
        out = module.generate(
            input_ids=self.ids, attention_mask=self.mask, max_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)


@pytest.fixture(scope="module")
def lab():
    return Lab("cuda")


@pytest.fixture(scope="module")
def on_cpu():
    return Lab("cpu")


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_cpu(lab, on_cpu, mode, prefill):
    want = on_cpu.run(on_cpu.module(mode, prefill=prefill))
    got = lab.run(lab.module(mode, prefill=prefill)).cpu()
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [7, 64, 300])
def test_chunks(lab, prefill, chunk):
    want = lab.run(lab.module("forecast", prefill=prefill))
    got = lab.run(lab.module("forecast", prefill=prefill, chunk_tokens=chunk))
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert torch.equal(got.argmax(-1), want.argmax(-1))


CHANGES = {
    "offload off": {"offload": "never"},
    "few pages": {"page_ratio": 1.0},
    "first in, first out": {"eviction": "fifo"},
    "graph off": {"cuda_graph": False},
}


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [None, 64])
def test_what_moves_bytes_changes_no_bit(lab, prefill, chunk, lowering):
    settings = {"prefill": prefill, "chunk_tokens": chunk, "lowering": lowering}
    want = lab.run(lab.module("forecast", **settings))
    for name, change in CHANGES.items():
        assert torch.equal(lab.run(lab.module("forecast", **settings, **change)), want), name


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [None, 64])
def test_random_delays_change_nothing(lab, monkeypatch, prefill, chunk):
    settings = {"prefill": prefill, "chunk_tokens": chunk, "cuda_graph": False, "page_ratio": 1.0}
    want = lab.run(lab.module("forecast", **settings))
    run = Program.__call__
    for seed in range(10):

        def delayed(self, *args, seed=seed):
            self._engine = DelayEngine(torch.device("cuda"), seed)
            return run(self, *args)

        monkeypatch.setattr(Program, "__call__", delayed)
        assert torch.equal(lab.run(lab.module("forecast", **settings)), want), f"seed {seed}"


def test_kernels_of_prompts_are_compiled_before_they_are_launched(lab):
    """All of them: a launch that was foreseen wrongly would be compiled where it is launched."""
    compiled = []

    def listen(*, src, cache_hit, **_):
        name = getattr(src.fn, "__name__", "")
        compiled.append((threading.current_thread().name.startswith("sparda"), name))

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        for prefill in ("dense", "sparse"):
            for mode in ("query", "forecast"):
                for chunk in (None, 300):
                    settings = {"prefill": prefill, "chunk_tokens": chunk, "block_size": 32}
                    lab.run(lab.module(mode, lowering="inductor", **settings))
    assert not {name for ahead, name in compiled if not ahead and name.startswith("_")}
    assert {name for ahead, name in compiled if ahead} >= {
        "_number_tokens", "_extend_kv", "_token_blocks", "_pick_tokens", "_attend_tokens",
        "_copy_pages",
    }  # fmt: skip
