"""What ops for a prompt take beside their results."""

from __future__ import annotations

import importlib

import pytest
import torch
from prompt_tensors import BATCH, DIM, GROUPS, SIZE, all_tensors, prompt_of, selected

from sparda_compile import ops
from sparda_compile.isa.define import implementation
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels import workspace
from sparda_compile.kernels.selection_bytes import select_tokens_bytes
from sparda_compile.kernels.workspace import (
    SCORE_BYTES,
    UNION_BYTES,
    all_blocks_bytes,
    attend_tokens_bytes,
    score_room,
    score_widths,
)

assert ops.OPS  # which fills the table of instructions
HEADS = 4


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


@pytest.mark.parametrize(
    ("work", "most"), [(attend_tokens_bytes, UNION_BYTES), (select_tokens_bytes, SCORE_BYTES)]
)
def test_a_scratch_is_bounded_however_long_a_prompt_is(work, most):
    short, long, longer = (work(selected(tokens)) for tokens in (16, 1 << 19, 1 << 20))
    assert short < most // 4
    assert 0.97 * most < long < 1.12 * most
    assert longer == pytest.approx(long, rel=0.001)


def test_tokens_with_few_blocks_before_them_are_scored_many_at_once():
    tokens = 1 << 20

    def blocks(end):
        return -(-end // 64)

    taken = score_room(blocks, (2, 128, 1), tokens, in_runs=True)
    begins, ends = zip(*taken.chunks, strict=True)
    assert begins == (0, *ends[:-1])
    assert ends[-1] == tokens

    def numbers(begin, end):
        return (end - begin) * 2 * sum(score_widths(blocks(end), in_runs=True))

    assert taken.scores == max(numbers(*chunk) for chunk in taken.chunks) <= SCORE_BYTES // 4
    borders = [1 << exponent for exponent in range(15, 20)]  # of 512, 1024, ... blocks
    for begin, end in taken.chunks[:-1]:
        # Another tile would not fit, or its tokens would pick of twice as many blocks.
        assert numbers(begin, end + 128) > SCORE_BYTES // 4 or end in borders
        assert not any(begin < border < end for border in borders)
    fewest = SCORE_BYTES // 4 // numbers(tokens - 1, tokens) // 128 * 128
    assert ends[0] == borders[0]
    # Were there as few at once for all of them, there were twice as many turns.
    assert len(taken.chunks) < 0.53 * tokens / fewest


def test_a_border_between_two_tiles_makes_no_turn_of_its_own():
    taken = score_room(lambda end: -(-(1000 + end) // 64), (2, 128, 16), 1 << 17, in_runs=True)
    assert all((end - begin) % 128 == 0 for begin, end in taken.chunks)
    assert len(taken.chunks) <= 9


def test_what_halves_attend_for(monkeypatch):
    monkeypatch.setattr(workspace, "_is_hopper", lambda device: device.type == "meta")

    def covers(heads, groups, size, dim, dtype=torch.bfloat16, device="meta"):
        query = torch.empty(1, heads, 1, dim, dtype=dtype, device=device)
        return workspace.in_halves(query, torch.empty(1, groups, 1, 2, size, dim, device="meta"))

    assert covers(32, 2, 64, 128)
    assert covers(9, 3, 64, 64, torch.float16)  # a group of 3 takes the room of 4
    assert covers(128, 1, 64, 128)
    assert not covers(129, 1, 64, 128)
    assert not covers(4, 2, 64, 128)  # 32 tokens of a half are more than a word has bits
    assert not covers(32, 2, 32, 128)
    assert not covers(32, 2, 64, 96)
    assert not covers(32, 2, 64, 128, torch.float32)
    assert not covers(32, 2, 64, 128, device="cpu")


class TestKernels:
    """What launchers allocate is what is worked out, to the byte; nothing is launched here."""

    @pytest.fixture(autouse=True)
    def _without_launches(self, monkeypatch):
        pytest.importorskip("triton")
        names = "extend", "pick_tokens", "stage", "token_blocks", "token_masses", "token_scores"
        for name in ("attend_tokens", "attend_hopper", "hopper_blocks", *names):
            module = importlib.import_module(f"sparda_compile.kernels.gpu.{name}")
            monkeypatch.setattr(module, "launch", lambda kernel, grid: lambda *_, **__: None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("heads", "tokens"), [(2, 1), (2, 100), (6, 2001), (32, 333)])
    @pytest.mark.parametrize("limit", [1 << 14, UNION_BYTES])
    def test_attention(self, counted_bytes, monkeypatch, heads, tokens, dtype, limit):
        from sparda_compile.kernels.gpu import attend_tokens

        monkeypatch.setattr(workspace, "UNION_BYTES", limit)
        given = prompt_of(heads, tokens, dtype)
        numbered = [torch.zeros(BATCH, tokens, dtype=torch.int32)] * 2 + [given.lengths]
        with counted_bytes(all_tensors(given, numbered)) as counted:
            out = attend_tokens.attend_tokens(
                given.query, (given.k, given.v), given.block_ids, numbered, given.lengths,
                (given.staging, given.slots), (given.pages, given.block_table), (0.2, 0.0),
            )  # fmt: skip
        assert counted.peak - out.untyped_storage().nbytes() == attend_tokens_bytes(given)

    @pytest.mark.parametrize(("blocks", "limit"), [(64, UNION_BYTES), (64, 1), (6000, UNION_BYTES)])
    def test_attention_in_halves(self, counted_bytes, monkeypatch, blocks, limit):
        """Their lists are larger than the marks of a union of few blocks."""
        from sparda_compile.kernels.gpu import attend_tokens

        monkeypatch.setattr(workspace, "UNION_BYTES", limit)
        monkeypatch.setattr(workspace, "_is_hopper", lambda device: True)
        given = prompt_of(32, 333, torch.bfloat16, blocks=blocks)
        given.staging = torch.zeros(BATCH, GROUPS, 9, 2, 64, 64, dtype=torch.bfloat16)
        given.pages, given.query = given.staging, torch.zeros(BATCH, 32, 333, 64).bfloat16()
        numbered = [torch.zeros(BATCH, 333, dtype=torch.int32)] * 2 + [given.lengths]
        with counted_bytes(all_tensors(given, numbered)) as counted:
            out = attend_tokens.attend_tokens(
                given.query, (given.query[:, :GROUPS],) * 2, given.block_ids, numbered,
                given.lengths, (given.staging, given.slots), (given.pages, given.block_table),
                (0.2, 0.0),
            )  # fmt: skip
        assert counted.peak - out.untyped_storage().nbytes() == attend_tokens_bytes(given)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("heads", "tokens", "past"), [(2, 16, 0), (6, 300, 100), (2, 77, 640)])
    def test_attention_to_all_blocks(self, counted_bytes, heads, tokens, past, dtype):
        from sparda_compile.kernels.gpu import attend_tokens

        given = prompt_of(heads, tokens, dtype, num_past=past)
        mask = torch.ones(BATCH, tokens, dtype=torch.bool)
        with counted_bytes(all_tensors(given, [mask])) as counted:
            out = attend_tokens.attend_all(
                given.query, (given.k, given.v), mask, given.lengths,
                (given.pages, torch.empty(0), given.block_table), past, (0.2, 20.0),
            )  # fmt: skip
        assert counted.peak - out.untyped_storage().nbytes() == all_blocks_bytes(given)
