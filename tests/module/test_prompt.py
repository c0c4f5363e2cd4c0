"""Prompts are cut into chunks, each read by the program that fits it; e2e has what comes out."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.module.prompt import chunks_of
from sparda_compile.program.program import Program

SMALL = {
    "mode": "query", "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 1,
    "local_blocks": 1, "lowering": "eager",
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_columns", "chunk", "want"),
    [
        (10, None, [(0, 10)]),
        (10, 10, [(0, 10)]),
        (10, 11, [(0, 10)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_chunks(num_columns, chunk, want):
    assert chunks_of(num_columns, chunk) == want


@pytest.fixture
def calls(traced_llama, monkeypatch):
    """Return a function that says which programs read a prompt, and how many columns each."""
    seen = []
    run = Program.__call__

    def noted(self, ids, positions, mask, kv):
        hidden = None if mask is None else mask[0].logical_not().tolist()
        seen.append((self.plan.phase, ids.shape[1], hidden))
        return run(self, ids, positions, mask, kv)

    def of(num_tokens, **settings):
        fast = optimize(traced_llama, SpardaConfig(**SMALL, **settings))
        seen.clear()
        monkeypatch.setattr(Program, "__call__", noted)
        logits = fast(torch.arange(2, 2 + num_tokens)[None]).logits
        assert logits.shape[1] == num_tokens
        return [entry[:2] for entry in seen]

    of.seen = seen
    return of


def test_a_sparse_prompt_is_dense_while_it_reads_everything(calls):
    """Four blocks of 16 are read: from token 64 on a token leaves one out."""
    assert calls(64, prefill="sparse") == [("prefill", 64)]
    assert calls(65, prefill="sparse") == [("sparse_prefill", 65)]
    assert calls(100, prefill="sparse", chunk_tokens=40) == [
        ("prefill", 40), ("sparse_prefill", 40), ("sparse_prefill", 20),
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"prefill": "dense"}, {"prefill": "auto"}])
def test_other_prompts_are_dense(calls, settings):
    assert calls(100, **settings) == [("prefill", 100)]


def test_a_chunk_of_one_column_has_a_hidden_one_beside_it(calls):
    assert calls(5, chunk_tokens=2) == [("prefill", 2)] * 3
    assert [hidden for *_, hidden in calls.seen] == [None, None, [True, False]]


def test_kernels_of_all_chunks_begin_before_the_first_is_read(calls, monkeypatch):
    """Later ones have a past, and programs of their own."""
    begun = []

    def noted(self, *sizes):
        if sizes:  # else of a decode
            begun.append((len(calls.seen), self.plan.phase, *sizes))

    monkeypatch.setattr(Program, "compile_kernels", noted)
    calls(100, prefill="sparse", chunk_tokens=40)
    assert begun == [
        (0, "prefill", 40, 0), (0, "sparse_prefill", 40, 40), (0, "sparse_prefill", 20, 80),
        (1, "prefill", 40, 0), (2, "sparse_prefill", 40, 40), (3, "sparse_prefill", 20, 80),
    ]  # fmt: skip
    begun.clear()
    calls(39, chunk_tokens=40)
    assert begun == [(1, "prefill", 39, 0)]


def test_explain_and_graphs_show_the_sparse_prompt(traced_llama):
    fast = optimize(traced_llama, SpardaConfig(**SMALL, prefill="sparse"))
    names = {node.name for node in fast.sparda.graph("sparse_prefill").graph.nodes}
    assert {"block_ids_0", "attend_tokens_0"} <= names
    assert fast.sparda.schedule("sparse_prefill").phase == "sparse_prefill"
