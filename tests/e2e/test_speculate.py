"""Mode `speculate`: `query` but for rounding, whatever was predicted, and the union where asked."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.isa.engines import DeferredEngine
from sparda_compile.kernels import speculation
from sparda_compile.kernels.sparse_attention import sparse_attention
from sparda_compile.testing import build, tiny_llama, tiny_nosa

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 3,
    "machine": "h200", "lowering": "eager", "max_tokens": 512, "prefill": "dense",
    "offload": "never", "speculate_where": "always",
}  # fmt: skip
# Of each of two turns; a block fills in the fewer, too. The plainest case goes on for long, and the
# one whose levels move most.
STEPS, FEW = 72, 16
LONG = ("infllm2", "trend")
# Largest difference of a logit to mode `query`, in units of the largest logit: blocks are merged in
# another order.
TOLERANCE = 1e-4
CASES = {
    "infllm2": {},
    "quest": {"selector": "quest"},
    "lowbit2": {"selector": "lowbit2"},
    "trend": {"ema_damping": 1.0, "ema_level": 0.2},
    "sparse prompt": {"prefill": "sparse"},
    "short turns": {"chunk_tokens": 16},
    "calibrated": {"ema_calibrate": True},
    "no budget": {"speculation_budget": 0.0},
    "large budget": {"speculation_budget": 4.0},
    "not fused": {"disable_passes": ("fuse_selection",)},
    "unscheduled": {"disable_passes": ("schedule_transfers", "insert_prefetch")},
    "in memory while it fits": {"offload": "auto", "device_bytes": 1 << 24},
}
FAMILIES = {
    "one head a group": lambda: tiny_llama(num_key_value_heads=4),
    "sixteen heads a group": lambda: tiny_llama(
        num_attention_heads=16, num_key_value_heads=1, hidden_size=64, head_dim=8
    ),
    "windows beside": lambda: build("gemma3"),
}


class Made:
    """Models, each traced once, and what mode `query` gives on the same memory."""

    def __init__(self, two_turns):
        self.two_turns = two_turns
        self.traced = {}
        self.known = {}

    def module(self, model="llama", **settings):
        if model not in self.traced:
            makers = {**FAMILIES, "nosa": tiny_nosa}
            make = makers.get(model, lambda: tiny_llama(num_hidden_layers=3))
            self.traced[model] = optimize(make(), SpardaConfig(mode="dense", lowering="eager"))
        config = SpardaConfig(**{"mode": "speculate", **SMALL, **settings})
        return optimize(self.traced[model], config)

    def by_query(self, steps, model="llama", **settings):
        names = ("selector", "prefill", "chunk_tokens", "lowering", "short_list")
        mine = {name: settings[name] for name in names if name in settings}
        key = (model, steps, *sorted(mine.items()))
        if key not in self.known:
            self.known[key] = self.two_turns(self.module(model, mode="query", **mine), steps)
        return self.known[key]


@pytest.fixture(scope="module")
def made(two_turns):
    return Made(two_turns)


def agree(got, wanted):
    """Same greedy tokens, and the same logits but for rounding."""
    assert torch.equal(got[0], wanted[0])
    assert torch.isfinite(got[1]).all()
    assert (got[1] - wanted[1]).abs().max() <= TOLERANCE * wanted[1].abs().max()


@pytest.mark.parametrize("name", CASES)
def test_speculation_is_query_over_two_turns(made, name):
    settings, steps = CASES[name], STEPS if name in LONG else FEW
    fast = made.module(**settings)
    agree(made.two_turns(fast, steps), made.by_query(steps, **settings))
    stats = fast.sparda.stats()
    assert all(0.0 < layer.coverage < 1.0 for layer in stats.layers.values())
    assert (stats.total.h2d_bytes, stats.total.d2h_bytes, stats.total.misses) == (0, 0, 0)


@pytest.mark.parametrize("model", FAMILIES)
def test_families(made, model):
    agree(made.two_turns(made.module(model), FEW), made.by_query(FEW, model))


def test_nosa(made):
    settings = {"selector": "nosa", "short_list": 2}
    fast = made.module("nosa", **settings)
    agree(made.two_turns(fast, FEW), made.by_query(FEW, "nosa", **settings))


@pytest.mark.parametrize("name", ["infllm2", "quest", "not fused"])
def test_late_streams_change_nothing(made, name):
    want = made.two_turns(made.module(**CASES[name]), FEW)[1]
    for seed in (None, 0, 1):
        engine = DeferredEngine(seed)
        got = made.two_turns(made.module(**CASES[name]), FEW, engine)[1]
        assert torch.equal(got, want), f"seed {seed}"
        assert engine.num_pending == 0


def decode(fast, steps, before_step=lambda kv: None, budgets=None):
    """Return the logits of some steps behind a ragged prompt."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 250, (2, 150 + steps), generator=generator)
    mask = torch.ones(2, 150 + steps, dtype=torch.int64)
    mask[1, :61] = 0
    cache = fast.new_cache()
    if budgets is not None:
        cache.set_budgets(budgets)
    ends = [0, *range(150, 151 + steps)]
    found = []
    for begin, end in itertools.pairwise(ends):
        if begin:
            before_step(cache.kv)
        out = fast(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        found.append(out.logits[:, -1])
    return torch.stack(found)


def garbage(seed):
    """Return a function that predicts random blocks, ascending, some of which do not exist."""
    generator = torch.Generator().manual_seed(seed)

    def write(kv):
        for name, tensor in kv.state.items():
            if not name.startswith("sparda_predicted"):
                continue
            width, num_blocks = tensor.shape[-1], kv.layout.num_blocks
            for row in tensor.flatten(0, 1):
                count = int(torch.randint(0, width + 1, (), generator=generator))
                ids = torch.randperm(num_blocks, generator=generator)[:count].sort().values
                row.fill_(-1)
                row[:count] = ids.int()

    return write


def test_what_was_predicted_changes_no_bit(made):
    fast = made.module(speculation_budget=2.0)
    wanted = decode(fast, 40)
    for seed in range(2):
        assert torch.equal(decode(fast, 40, garbage(seed)), wanted)
    for budget in (0.0, 1.0, 4.0):
        assert torch.equal(decode(made.module(speculation_budget=budget), 40), wanted)
    assert torch.equal(decode(fast, 40, budgets={0: 0, 2: 4}), wanted)


def test_budgets_change_between_steps(made):
    fast = made.module(speculation_budget=2.0)
    widths = []

    def narrower(kv):
        widths.append((kv.state["sparda_predicted_1"] >= 0).sum(-1).max().item())
        kv.set_budgets({1: max(9 - len(widths), 0)})

    wanted = decode(fast, 12)
    assert torch.equal(decode(fast, 12, narrower), wanted)
    assert widths == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]


def test_union_is_attention_over_both_sets(made, monkeypatch):
    """And so another result than the exact repair, which reads less."""
    wanted, seen = decode(made.module(), 12), []

    def noted(*operands):
        """Repair, and attend to the selected and the predicted blocks as one selection."""
        query, pages, page_ids, block_ids, predicted, lengths = operands[:6]
        scale, softcap, union = operands[-3:]
        out = repair(*operands)
        assert union
        table = torch.full((*predicted.shape[:2], 64), -1, dtype=torch.int32)
        table = table.scatter(-1, block_ids.clamp(min=0).long(), page_ids)
        current = (lengths // pages.shape[4])[:, None, None]
        early = predicted.masked_fill(predicted >= current, -1)
        both = [sorted({*a, *b} - {-1}) for a, b in zip(
            block_ids.flatten(0, 1).tolist(), early.flatten(0, 1).tolist(), strict=True
        )]  # fmt: skip
        width = max(map(len, both))
        ids = torch.tensor([row + [-1] * (width - len(row)) for row in both], dtype=torch.int32)
        ids = ids.view(*predicted.shape[:2], width)
        at = made_table[pages.data_ptr()].gather(-1, ids.clamp(min=0).long())
        seen.append(torch.allclose(
            out, sparse_attention(query, pages, at, ids, lengths, scale, softcap), atol=1e-5
        ))  # fmt: skip
        return out

    made_table = {}
    repair = speculation.repair_predicted._init_fn
    attend = speculation.attend_predicted._init_fn

    def noting_tables(query, pages, block_table, *rest, **named):
        made_table[pages.data_ptr()] = block_table
        return attend(query, pages, block_table, *rest, **named)

    monkeypatch.setattr(speculation.repair_predicted, "_init_fn", noted)
    monkeypatch.setattr(speculation.attend_predicted, "_init_fn", noting_tables)
    got = decode(made.module(repair="union"), 12)
    assert len(seen) == 36
    assert all(seen)
    assert torch.equal(got[0], wanted[0])  # the prompt
    assert not torch.allclose(got[1:], wanted[1:], atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"selector": "quest"}], ids=["infllm2", "quest"])
def test_compiled(made, settings):
    compiled = {**settings, "lowering": "inductor"}
    by_query = made.module(mode="query", **compiled)
    agree(made.two_turns(made.module(**compiled), 12), made.two_turns(by_query, 12))


def test_a_cache_that_the_model_filled_and_one_that_grows(made):
    model = tiny_llama(num_hidden_layers=3)
    ids = torch.randint(2, 250, (2, 505), generator=torch.Generator().manual_seed(9))
    past = model(ids[:, :500], use_cache=True).past_key_values
    found = {}
    for mode in ("query", "speculate"):
        fast = optimize(made.traced["llama"], SpardaConfig(
            **{**SMALL, "mode": mode, "max_tokens": None}
        ))  # fmt: skip
        cache = fast.new_cache(501, past=past)
        steps = [
            fast((ids[:, -1:] + i) % 250, past_key_values=cache).logits[:, -1] for i in range(30)
        ]  # fmt: skip
        assert cache.kv.layout.max_tokens == 1024
        found[mode] = torch.stack(steps)
    agree((ids, found["speculate"]), (ids, found["query"]))


def test_a_reset_cache_begins_anew(made):
    fast = made.module()
    cache = fast.new_cache()
    ids = torch.randint(2, 250, (1, 90), generator=torch.Generator().manual_seed(3))

    def run():
        fast(ids, past_key_values=cache)
        return [fast(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)]

    one = run()
    cache.reset()
    assert (cache.kv.state["sparda_predicted_0"] == -1).all()
    assert all(torch.equal(a, b) for a, b in zip(one, run(), strict=True))
