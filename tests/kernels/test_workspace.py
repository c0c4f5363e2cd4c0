"""What ops for a prompt take beside their results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparda_compile import ops
from sparda_compile.isa.define import implementation
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels.workspace import (
    SCORE_BYTES,
    UNION_BYTES,
    attend_tokens_bytes,
    select_past_bytes,
    select_tokens_bytes,
)

assert ops.OPS  # which fills the table of instructions
BATCH, HEADS, GROUPS, DIM, SIZE = 2, 4, 2, 32, 16


def tensors(tokens):
    query, k, v = (torch.randn(BATCH, n, tokens, DIM) for n in (HEADS, GROUPS, GROUPS))
    # As a model makes them: tokens first.
    query, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, k, v))
    return query, k, v, torch.ones(BATCH, tokens, dtype=torch.bool)


def check(name, args, counted_bytes):
    given = [a for a in args if isinstance(a, torch.Tensor)]
    op = INSTRUCTIONS[name]
    with counted_bytes(given) as counted:
        result = implementation(op.op._opoverload)(*args)
    worked_out = op.workspace(*args) + result.untyped_storage().nbytes()
    assert 0.94 * worked_out <= counted.peak <= 1.06 * worked_out


def test_dense_attention(counted_bytes):
    query, k, v, mask = tensors(2048)
    lengths = torch.zeros(BATCH, dtype=torch.int32)
    pages = torch.zeros(BATCH, GROUPS, 1, 2, SIZE, DIM)
    table = torch.zeros(BATCH, GROUPS, 1, dtype=torch.int32)
    args = (query, k, v, mask, lengths, pages, torch.empty(0), table, 0.2, 0.0, 0, False)
    check("prefill_attention", args, counted_bytes)


@pytest.mark.parametrize("window", [64, 700])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_attention_over_a_window(counted_bytes, window, softcap):
    query, k, v, mask = tensors(2048)
    lengths = torch.zeros(BATCH, dtype=torch.int32)
    rings = [torch.zeros(BATCH, GROUPS, window, DIM) for _ in range(2)]
    args = (query, k, v, mask, lengths, *rings, 0.2, softcap)
    check("window_attention", args, counted_bytes)
    work = INSTRUCTIONS["window_attention"].workspace
    longer, k, v, mask = tensors(4096)
    assert work(longer, k, v, mask, *args[4:]) == work(*args)


def selected(tokens, blocks=16384):
    with torch.device("meta"):
        return SimpleNamespace(
            query=torch.empty(1, 32, tokens, 128, dtype=torch.bfloat16),
            block_ids=torch.empty(1, 2, tokens, 96, dtype=torch.int32),
            slots=torch.empty(1, 2, blocks, dtype=torch.int32),
            summary=[torch.empty(1, 2, 4 * blocks, 128)],
            num_blocks=blocks,
            block_size=64,
            num_past=0,
            selector="infllm2",
            near_ids=None,
        )


@pytest.mark.parametrize(
    ("work", "most"), [(attend_tokens_bytes, UNION_BYTES), (select_tokens_bytes, SCORE_BYTES)]
)
def test_a_scratch_is_bounded_however_long_a_prompt_is(work, most):
    short, long, longer = (work(selected(tokens)) for tokens in (16, 1 << 19, 1 << 20))
    assert short < most // 4
    assert most < long < longer < most + (64 << 20)


def test_quest_splits_the_mean_query():
    prompt = selected(1 << 16)
    before = select_tokens_bytes(prompt)
    prompt.selector = "quest"
    assert select_tokens_bytes(prompt) > before + 2 * (1 << 16) * 128 * 12


def test_what_is_picked_at_two_times_takes_what_each_scores():
    prompt = selected(256, blocks=2048)
    prompt.selector = "forecast"
    assert select_past_bytes(prompt) == 0
    prompt.num_past = 1600 * 64 + 7
    vectors = 2 * 256
    assert select_past_bytes(prompt) == vectors * 1601 * 8
    whole = select_tokens_bytes(prompt)
    prompt.near_ids = prompt.block_ids
    # Of 256 tokens five blocks may be new, behind two others.
    assert whole - select_tokens_bytes(prompt) == vectors * (1605 - 7) * 8
