"""Prompts on a CUDA GPU, dense and sparse: right, however they are cut and whatever is late."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import threading

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.isa.engines import DelayEngine
from sparda_compile.kernels import gpu
from sparda_compile.module import prompt
from sparda_compile.program.program import Program
from sparda_compile.testing import random_forecast, reference_decode, tiny_llama

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


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
@pytest.mark.parametrize("mode", MODES)
def test_low_bit_steps_behind_prompts_by_pooled_keys(lab, on_cpu, mode, selector):
    settings = {"selector": selector, "prefill": "sparse", "prefill_selector": "infllm2"}
    want = on_cpu.run(on_cpu.module(mode, **settings))
    module = lab.module(mode, **settings)
    got = lab.run(module).cpu()
    assert module.sparda.num_compilations["sparse_prefill"]
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    for changes in ({"chunk_tokens": 64}, {"offload": "never"}):
        other = lab.run(lab.module(mode, **settings, **changes)).cpu()
        assert (other - got).abs().max() < TOLERANCE * want.abs().max()


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
@pytest.mark.parametrize("mode", MODES)
def test_prompts_by_low_bit_keys(lab, on_cpu, mode, selector):
    settings = {"selector": selector, "prefill": "sparse"}
    want = on_cpu.run(on_cpu.module(mode, **settings))
    module = lab.module(mode, **settings)
    got = lab.run(module).cpu()
    assert module.sparda.num_compilations["sparse_prefill"]
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    for changes in ({"chunk_tokens": 7}, {"chunk_tokens": 64}, {"offload": "never"}):
        other = lab.run(lab.module(mode, **settings, **changes)).cpu()
        assert (other - got).abs().max() < TOLERANCE * want.abs().max()


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_prompts_by_candidates(lab, on_cpu, selector):
    """Also where they are replayed, and where some tokens have no more blocks than candidates."""
    settings = {"selector": selector, "prefill": "sparse", "prefill_candidates": 1.5}
    want = on_cpu.run(on_cpu.module("query", **settings))
    of_all = on_cpu.run(on_cpu.module("query", selector=selector, prefill="sparse"))
    assert (of_all - want).abs().max() > TOLERANCE * want.abs().max()
    module = lab.module("query", **settings)
    got = lab.run(module).cpu()
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    for turn in range(3):
        assert torch.equal(lab.run(module).cpu(), got), f"turn {turn}"
    for changes in ({"chunk_tokens": 7}, {"chunk_tokens": 64}, {"offload": "never"}):
        other = lab.run(lab.module("query", **settings, **changes)).cpu()
        assert (other - got).abs().max() < TOLERANCE * want.abs().max()


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [7, 64, 300])
def test_chunks(lab, prefill, chunk):
    want = lab.run(lab.module("forecast", prefill=prefill))
    got = lab.run(lab.module("forecast", prefill=prefill, chunk_tokens=chunk))
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert torch.equal(got.argmax(-1), want.argmax(-1))


RULES = {"block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 2}


class TestReference:
    """The tokens of the plain decoder on a CPU, which reads one at a time, over 200 steps."""

    def check(self, model, lengths, mode, rules=RULES, **settings):
        forecast = random_forecast(model, seed=1) if mode == "forecast" else {}
        generator = torch.Generator().manual_seed(sum(lengths))
        ids = torch.randint(2, 250, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        want = [
            reference_decode(
                model, row[-length:], 200, mode=mode, prefill="sparse", forecast=forecast,
                **rules,
            )[0]
            for row, length in zip(ids, lengths, strict=True)
        ]  # fmt: skip
        given = {0 if key == "bootstrap" else key + 1: w for key, w in forecast.items()}
        config = SpardaConfig(mode=mode, prefill="sparse", lowering="eager", **rules, **settings)
        fast = sparda_compile.optimize(
            copy.deepcopy(model).to("cuda"), config, forecast=given or None
        )
        got = fast.generate(
            input_ids=ids.cuda(), attention_mask=mask.long().cuda(), do_sample=False,
            max_new_tokens=200, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert got[:, ids.shape[1] :].tolist() == want

    @pytest.mark.parametrize("mode", ["query", "forecast"])
    @pytest.mark.parametrize("lengths", [(1,), (63,), (64,), (65,), (150, 37, 93)])
    def test_lengths(self, mode, lengths):
        self.check(tiny_llama(), lengths, mode)

    @pytest.mark.parametrize("heads", [1, 4, 8, 16])
    def test_groups(self, heads):
        """Query heads of one KV head."""
        model = tiny_llama(num_attention_heads=2 * heads, num_key_value_heads=2, seed=3)
        self.check(model, (120, 90), "forecast")

    @pytest.mark.parametrize("mode", ["query", "forecast"])
    @pytest.mark.parametrize("chunk", [1, 7, 64, 1000, None])
    def test_chunks(self, mode, chunk):
        self.check(tiny_llama(), (17, 12) if chunk == 1 else (150, 93), mode, chunk_tokens=chunk)

    @pytest.mark.parametrize("chunk", [1000, None])
    def test_a_long_prompt(self, chunk):
        """Of one layer and one KV head, which the plain decoder reads in seconds."""
        model = tiny_llama(
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, seed=3,
            max_position_embeddings=8192,
        )  # fmt: skip
        sizes = {"block_size": 64, "pool_size": 64, "pool_stride": 64}
        self.check(model, (4097,), "query", RULES | sizes, chunk_tokens=chunk)


def test_a_prompt_is_cut_where_memory_is_short(lab, monkeypatch):
    """What is worked out for the chosen chunks is what a run of them takes, or a little more."""
    whole = lab.module("query", prefill="sparse", max_tokens=1 << 16)
    ids = torch.randint(1, 250, (1, 60_000), generator=torch.Generator().manual_seed(1)).cuda()
    want = whole(ids, logits_to_keep=1).logits
    program = whole.programs.get("sparse_prefill", 1, 1 << 16, last_only=True)
    free = program.prompt_memory(60_000, 0, may_hide=False).peak_bytes // 2
    monkeypatch.setattr(prompt, "free_device_bytes", lambda device: free)
    cut = lab.module("query", prefill="sparse", max_tokens=1 << 16)
    cache = cut.new_cache()
    cut(ids[:, :2], past_key_values=cache, logits_to_keep=1)  # makes the cache
    cache.reset()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = cut(ids, past_key_values=cache, logits_to_keep=1).logits
    assert torch.cuda.max_memory_allocated() - before < 1.05 * free
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

        def delayed(self, *args, seed=seed, **rest):
            self._engine = DelayEngine(torch.device("cuda"), seed)
            return run(self, *args, **rest)

        monkeypatch.setattr(Program, "__call__", delayed)
        assert torch.equal(lab.run(lab.module("forecast", **settings)), want), f"seed {seed}"


def forget_kernels():
    """Let each kernel be compiled anew, whatever this process has compiled before."""
    for room in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
        for value in vars(importlib.import_module(room.name)).values():
            if isinstance(value, JITFunction):
                value.device_caches.clear()


def test_kernels_of_prompts_are_compiled_before_they_are_launched(lab):
    """All of them: a launch that was foreseen wrongly would be compiled where it is launched."""
    forget_kernels()
    compiled = []

    def listen(*, src, cache_hit, **_):
        name = getattr(src.fn, "__name__", "")
        compiled.append((threading.current_thread().name.startswith("sparda"), name))

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = listen
        for prefill in ("dense", "sparse"):
            for mode in ("query", "forecast"):
                for selector, chunk in (("infllm2", None), ("infllm2", 300), ("lowbit2", None)):
                    settings = {"prefill": prefill, "chunk_tokens": chunk, "block_size": 32}
                    lab.run(lab.module(mode, lowering="inductor", selector=selector, **settings))
    assert not {name for ahead, name in compiled if not ahead and name.startswith("_")}
    assert {name for ahead, name in compiled if ahead} >= {
        "_number_tokens", "_extend_kv", "_token_blocks", "_pick_tokens", "_attend_tokens",
        "_copy_pages", "_unpack_keys", "_token_masses", "_mass_scores",
    }  # fmt: skip


def prompt_graphs(module):
    """Return the CUDA graphs of a module's programs for prompts."""
    programs = module.programs.compiled()
    return sum(p.num_graphs for p in programs if p.plan.phase != "decode")


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("mode", MODES)
def test_short_prompts_are_replayed_bit_for_bit(lab, mode, prefill, lowering):
    settings = {"prefill": prefill, "lowering": lowering, "page_ratio": 1.0}
    want = lab.run(lab.module(mode, **settings, cuda_graph=False))
    module = lab.module(mode, **settings)
    for turn in range(4):
        assert torch.equal(lab.run(module), want), f"turn {turn}"
        assert prompt_graphs(module) == (turn > 0)


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("seed", range(5))
def test_delays_captured_with_a_prompt_change_nothing(lab, monkeypatch, prefill, seed):
    settings = {"prefill": prefill, "page_ratio": 1.0}
    want = lab.run(lab.module("forecast", **settings))
    module, run = lab.module("forecast", **settings), Program.__call__

    def delayed(self, *args, **rest):
        if self.plan.phase != "decode" and not isinstance(self._engine, DelayEngine):
            self._engine = DelayEngine(torch.device("cuda"), seed)
        return run(self, *args, **rest)

    monkeypatch.setattr(Program, "__call__", delayed)
    for _ in range(4):
        assert torch.equal(lab.run(module), want)
    assert prompt_graphs(module) == 1


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_turns_of_two_caches_are_replayed(lab, prefill):
    """Turns of many lengths behind many pasts: 40 texts, cut in the same places."""
    generator = torch.Generator().manual_seed(11)
    cuts = torch.randint(1, 90, (9,), generator=generator).tolist()

    def logits(module):
        caches, found = [module.new_cache(1024) for _ in range(2)], []
        for text in range(40):
            cache, begin = caches[text % 2], 0
            cache.reset()
            for columns in cuts:
                part = (text_ids[:, begin : begin + columns] + text) % 250 + 1
                found.append(module(part, past_key_values=cache, logits_to_keep=1).logits)
                begin += columns
        return torch.stack(found)

    text_ids = lab.ids[:1]
    want = logits(lab.module("query", prefill=prefill, cuda_graph=False))
    module = lab.module("query", prefill=prefill)
    assert torch.equal(logits(module), want)
    assert prompt_graphs(module) > 4
