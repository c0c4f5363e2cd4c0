"""Mode `speculate` on a CUDA GPU: the same however it runs, and `query` but for rounding."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LogitsProcessor

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.isa.engines import CudaEngine, DelayEngine
from sparda_compile.isa.streams import ATTEND
from sparda_compile.testing import tiny_llama

pytestmark = pytest.mark.gpu

PROMPT_LENGTHS = (200, 121, 90, 37)
MAX_TOKENS = 2304
STEPS = 2048
SMALL = {
    "block_size": 16, "top_k": 3, "local_blocks": 1, "max_tokens": MAX_TOKENS, "offload": "never",
    "speculate_where": "always", "lowering": "eager",
}  # fmt: skip
CHANGES = {
    "graph off": {"cuda_graph": False},
    "schedule off": {"disable_passes": ("insert_prefetch", "schedule_transfers")},
    "fusion off": {"disable_passes": ("fuse_selection",)},
    "no budget": {"speculation_budget": 0.0},
    "large budget": {"speculation_budget": 4.0},
    "trend": {"ema_damping": 1.0},
}
# Largest difference of a logit to mode `query`, in units of the largest logit.
TOLERANCE = 2e-5


class Forced(LogitsProcessor):
    """Lets each step choose the token that is given."""

    def __init__(self, tokens, num_before):
        self.tokens, self.num_before = tokens, num_before

    def __call__(self, input_ids, scores):
        chosen = self.tokens[:, input_ids.shape[1] - self.num_before, None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class Lab:
    """One model, traced once; modules of it and what they generate."""

    def __init__(self, device="cuda", layers=2):
        self.traced = tiny_llama(num_hidden_layers=layers).to(device)
        self.known = {}
        generator = torch.Generator().manual_seed(3)
        longest = max(PROMPT_LENGTHS)
        ids = torch.randint(1, 250, (len(PROMPT_LENGTHS), longest), generator=generator)
        mask = torch.arange(longest) >= longest - torch.tensor(PROMPT_LENGTHS)[:, None]
        self.ids, self.mask = ids.to(device), mask.long().to(device)

    def module(self, **changes):
        config = SpardaConfig(**{"mode": "speculate", **SMALL, **changes})
        module = sparda_compile.optimize(self.traced, config)
        self.traced = module
        return module

    def run(self, module, steps=STEPS, forced=None):
        """Return tokens and logits of a greedy generation, or of one of which tokens are given."""
        out = module.generate(
            input_ids=self.ids, attention_mask=self.mask, max_new_tokens=steps, do_sample=False,
            pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            logits_processor=None if forced is None else [Forced(forced, self.ids.shape[1])],
        )  # fmt: skip
        return out.sequences[:, self.ids.shape[1] :], torch.stack(out.logits)

    def truth(self, **changes):
        """Return the run that others must equal."""
        key = tuple(sorted(changes.items()))
        if key not in self.known:
            self.known[key] = self.run(self.module(**changes))
        return self.known[key]


@pytest.fixture(scope="module")
def labs():
    return functools.cache(lambda layers: Lab(layers=layers))


@pytest.fixture
def lab(labs):
    return labs(2)


def decode_of(module):
    return module.programs.get("decode", len(PROMPT_LENGTHS), MAX_TOKENS, last_only=True)


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("layers", [1, 2])
def test_speculation_is_query_but_for_rounding(labs, selector, lowering, layers):
    """Over 2,048 steps of the same tokens.

    The first layer's queries are the same bits, so all that differs is how sums round. A second
    layer's differ by that: where the best block that is not selected is as good as the last one
    that is, it may select the other.
    """
    lab, settings = labs(layers), {"selector": selector, "lowering": lowering}
    wanted_tokens, wanted = lab.truth(mode="query", **settings)
    tokens, logits = lab.run(lab.module(**settings), forced=wanted_tokens)
    assert torch.equal(tokens, wanted_tokens)
    assert torch.isfinite(logits).all()
    error = (logits - wanted).abs().amax(-1) / wanted.abs().max()
    others = error > TOLERANCE
    assert others.sum() <= (STEPS * len(PROMPT_LENGTHS) // 1000 if layers > 1 else 0)
    lost = wanted.amax(-1) - wanted.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    assert lost[~others].max() <= 2 * TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("change", CHANGES)
def test_logits_do_not_depend_on_how_a_step_runs(lab, change):
    module = lab.module(**CHANGES[change])
    tokens, logits = lab.run(module)
    wanted_tokens, wanted = lab.truth()
    assert torch.equal(logits, wanted), (logits != wanted).any(-1).nonzero()[:3].tolist()
    assert torch.equal(tokens, wanted_tokens)
    assert decode_of(module).num_graphs == (0 if change == "graph off" else 1)
    layers = module.sparda.stats().layers.values()
    assert all(0.0 < layer.coverage < 1.0 for layer in layers)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_random_delays_change_nothing(lab, lowering):
    """On every stream, between all pieces of work."""
    steps = 100
    module = lab.module(cuda_graph=False, lowering=lowering)
    wanted = lab.truth(lowering=lowering)[1][:steps]
    for seed in range(20):
        decode_of(module)._engine = DelayEngine(torch.device("cuda"), seed)
        assert torch.equal(lab.run(module, steps)[1], wanted), f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_delays_captured_in_the_graph_change_nothing(lab, lowering, seed):
    steps = 200
    module = lab.module(lowering=lowering)
    decode_of(module)._engine = DelayEngine(torch.device("cuda"), seed)
    assert torch.equal(lab.run(module, steps)[1], lab.truth(lowering=lowering)[1][:steps])
    assert decode_of(module).num_graphs == 1


class LateAttention(CudaEngine):
    """Its attend stream is late with everything."""

    def submit(self, stream, work):
        if stream == ATTEND:
            super().submit(stream, lambda: torch.cuda._sleep(1_000_000))
        super().submit(stream, work)


def test_attention_that_is_always_late_changes_nothing(lab):
    steps = 30
    module = lab.module(cuda_graph=False)
    decode_of(module)._engine = LateAttention(torch.device("cuda"))
    assert torch.equal(lab.run(module, steps)[1], lab.truth()[1][:steps])


def test_budgets_and_predictions_change_no_bit_and_no_graph(lab):
    module = lab.module(speculation_budget=2.0)
    cache = module.new_cache()
    mask, (tokens, wanted) = lab.mask, lab.truth()
    # As `generate` counts: by columns, rotary embeddings round otherwise.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    module(lab.ids, attention_mask=mask, past_key_values=cache, position_ids=positions)
    generator = torch.Generator().manual_seed(11)
    for step in range(60):
        cache.set_budgets(dict.fromkeys(range(2), step % 10))
        for layer in range(2):
            predicted = cache.kv.state[f"sparda_predicted_{layer}"]
            if step % 3 == 0:
                ids = torch.randperm(cache.kv.layout.num_blocks, generator=generator)
                ids = ids[: predicted.shape[-1]].sort().values.int()
                predicted.copy_(ids.to(predicted.device).expand_as(predicted))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        token, positions = tokens[:, step : step + 1], positions[:, -1:] + 1
        out = module(token, attention_mask=mask, past_key_values=cache, position_ids=positions)
        assert torch.equal(out.logits[:, -1], wanted[step + 1]), step
    assert decode_of(module).num_graphs == 1


def test_union_reads_more(lab):
    tokens, logits = lab.run(lab.module(repair="union"), 40)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[0], lab.truth()[1][0])
    assert not torch.allclose(logits[1:], lab.truth()[1][1:40], atol=1e-3)
    assert tokens.shape == (len(PROMPT_LENGTHS), 40)


@pytest.mark.parametrize("repair", ["exact", "union"])
def test_gpu_equals_the_cpu_reference(repair):
    logits = {}
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 250, (4, 40), generator=generator)
    for device in ("cpu", "cuda"):
        lab = Lab(device)
        module = lab.module(repair=repair)
        cache = module.new_cache()
        mask, found = lab.mask, []
        module(lab.ids, attention_mask=mask, past_key_values=cache)
        for token in tokens.to(device).split(1, dim=1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = module(token, attention_mask=mask, past_key_values=cache)
            found.append(out.logits[:, -1].cpu())
        logits[device] = torch.stack(found)
    error = (logits["cuda"] - logits["cpu"]).abs().max() / logits["cpu"].abs().max()
    assert error < TOLERANCE
