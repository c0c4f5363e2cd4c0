"""Prompts are cut into chunks, each read by the program that fits it; e2e has what comes out."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module import prompt
from sparda_compile.module.prompt import chunks_of
from sparda_compile.program import program
from sparda_compile.program.chunks import RESERVE
from sparda_compile.program.memory import prompt_memory
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

    def noted(self, ids, positions, mask, kv, **rest):
        hidden = None if mask is None else mask[0].logical_not().tolist()
        seen.append((self.plan.phase, ids.shape[1], hidden))
        return run(self, ids, positions, mask, kv, **rest)

    def of(num_tokens, **settings):
        fast = optimize(traced_llama, SpardaConfig(**SMALL, **settings))
        seen.clear()
        monkeypatch.setattr(Program, "__call__", noted)
        logits = fast(2 + torch.arange(num_tokens)[None] % 250).logits
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


class TestChosenChunks:
    """Without `chunk_tokens` a prompt is read in the largest chunks for which there is memory."""

    @pytest.fixture
    def read(self, calls, monkeypatch):
        """Return a function that reads a prompt where so many bytes are free on the device."""

        def of(num_tokens, free, **settings):
            monkeypatch.setattr(prompt, "free_device_bytes", lambda device: free)
            return calls(num_tokens, **settings)

        return of

    def peak(self, num_tokens, num_past, traced_llama):
        fast = optimize(traced_llama, SpardaConfig(**SMALL))
        plan = fast.programs.get("prefill", 1, 512, last_only=False).plan
        return prompt_memory(plan, num_tokens, num_past).peak_bytes

    def test_one_where_it_fits(self, read, traced_llama):
        assert read(300, None) == [("prefill", 300)]
        assert read(300, 1 << 40) == [("prefill", 300)]
        enough = int(self.peak(300, 0, traced_llama) * RESERVE) + 1
        assert read(300, enough) == [("prefill", 300)]

    @pytest.mark.parametrize(
        ("tokens", "past", "want"), [(64, 192, [64] * 4 + [44]), (32, 256, [32] * 9 + [12])]
    )
    def test_else_the_largest_that_fit(self, read, traced_llama, caplog, tokens, past, want):
        """The last one of that size has the longest past, and the rest is behind it.

        The logits of earlier ones are there too, and in the end all of them twice.
        """
        logits, rest = 256 * 4, past + tokens
        sizes = ((tokens, past), (300 - rest, rest))
        last = max(self.peak(n, before, traced_llama) + before * logits for n, before in sizes)
        free = int(max(last, 2 * 300 * logits) * RESERVE) + 1
        with caplog.at_level("INFO", logger="sparda_compile.module.prompt"):
            assert [columns for _, columns in read(300, free)] == want
        assert f"a prompt is read {tokens} at once" in caplog.text

    def test_chunks_change_no_logits(self, traced_llama, monkeypatch):
        fast = optimize(traced_llama, SpardaConfig(**SMALL))
        ids = torch.randint(2, 250, (2, 300))
        mask = torch.arange(300) >= torch.tensor([[0], [133]])
        whole = fast(ids, attention_mask=mask.long()).logits
        monkeypatch.setattr(prompt, "free_device_bytes", lambda device: 1_500_000)
        chunked = fast(ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(chunked[mask], whole[mask], rtol=0, atol=1e-4)

    def test_a_number_that_is_given_is_taken(self, read):
        assert read(100, 0, chunk_tokens=60) == [("prefill", 60), ("prefill", 40)]

    def test_nothing_fits(self, traced_llama, monkeypatch):
        fast = optimize(traced_llama, SpardaConfig(**SMALL))
        cache = fast.new_cache(512)
        monkeypatch.setattr(prompt, "free_device_bytes", lambda device: 5000)
        said = (
            r"1 x 300 tokens behind 0 takes \d.* KiB .* 16 are read at once, and 4.9 KiB are free"
        )
        with pytest.raises(UnsupportedInputError, match=said):
            fast(torch.ones(1, 300, dtype=torch.int64), past_key_values=cache)
        monkeypatch.undo()
        fast(torch.ones(1, 300, dtype=torch.int64), past_key_values=cache)  # it is not broken

    def test_what_fits_at_the_largest_is_worked_out_once(self, traced_llama, monkeypatch):
        asked = []

        def counted(plan, *sizes, **given):
            asked.append(sizes)
            return prompt_memory(plan, *sizes, **given)

        monkeypatch.setattr(program, "prompt_memory", counted)
        monkeypatch.setattr(prompt, "free_device_bytes", lambda device: 1 << 40)
        fast = optimize(traced_llama, SpardaConfig(**SMALL))
        cache = fast.new_cache(512)
        for num_tokens in (40, 50, 60):
            fast(torch.ones(1, num_tokens, dtype=torch.int64), past_key_values=cache)
        assert asked == [(512, 512)]
