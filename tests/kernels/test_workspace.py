"""What ops for a prompt take beside their results."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from sparda_compile import ops
from sparda_compile.isa.define import implementation
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels import workspace
from sparda_compile.kernels.workspace import (
    SCORE_BYTES,
    UNION_BYTES,
    all_blocks_bytes,
    attend_tokens_bytes,
    score_room,
    score_widths,
    select_past_bytes,
    select_tokens_bytes,
)
from sparda_compile.selectors import Geometry

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
            staging=torch.empty(1, 2, 1, 2, 64, 128, dtype=torch.bfloat16),
            summary=[torch.empty(1, 2, 4 * blocks, 128)],
            num_blocks=blocks,
            block_size=64,
            num_past=0,
            num_selected=96,
            selector="infllm2",
            near_ids=None,
            shared=1,
        )


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


def test_quest_splits_the_mean_query():
    prompt = selected(1 << 17)
    prompt.selector = "quest"
    assert select_tokens_bytes(prompt) > 0.97 * SCORE_BYTES + 2 * (1 << 17) * 128 * 12


@pytest.mark.parametrize(("past", "room", "runs"), [(1600, 1792, 0), (3000, 3072, 376)])
def test_what_is_picked_at_two_times_takes_what_each_scores(past, room, runs):
    """Rows have whole strips. Of many blocks every eight are a run, which is scored as well."""
    prompt = selected(256, blocks=4096)
    prompt.selector = "forecast"
    assert select_past_bytes(prompt) == 0
    prompt.num_past = past * 64 + 7
    vectors = 2 * 256
    assert select_past_bytes(prompt) == vectors * (room + runs) * 4 + 8  # no sums
    whole = select_tokens_bytes(prompt)
    prompt.near_ids = prompt.block_ids
    # Of 256 tokens five blocks may be new, behind another one.
    assert whole - select_tokens_bytes(prompt) == vectors * (room + runs - 256) * 4


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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "selector", ["forecast", "infllm2", "quest", "nosa", "lowbit2", "lowbit4_forecast"]
    )
    @pytest.mark.parametrize(
        ("heads", "tokens", "past"), [(2, 16, 0), (6, 700, 100), (32, 41, 640)]
    )
    @pytest.mark.parametrize("limit", [1 << 15, SCORE_BYTES])
    def test_selection(
        self, counted_bytes, monkeypatch, heads, tokens, past, selector, dtype, limit
    ):
        from sparda_compile.kernels.gpu import select_tokens

        monkeypatch.setattr(workspace, "SCORE_BYTES", limit)
        by_forecast = selector.endswith("forecast")
        given = prompt_of(GROUPS if by_forecast else heads, tokens, dtype, num_past=past)
        given.selector, given.summary = (
            selector,
            [given.bounds if selector == "quest" else given.pooled],
        )
        if selector == "nosa":
            given.summary = [torch.cat([given.pooled, given.pooled[..., :1]], -1)]
        if selector.startswith("lowbit"):
            given.summary = low_bit_keys(given, int(selector[6]))
        geometry = Geometry(given.num_blocks, SIZE, 8, 4, int(selector == "nosa"), 1, 1)
        positions = torch.zeros(BATCH, tokens, dtype=torch.int32)
        ids = torch.zeros(BATCH, GROUPS, tokens, 4, dtype=torch.int32)
        asked = select_tokens.Asked(
            given.query, given.summary, positions, given.lengths, past, selector, 0.2, geometry
        )
        with counted_bytes(all_tensors(given, [positions, ids, *given.summary])) as counted:
            select_tokens.select_tokens(asked, select_tokens.Choice(4, SIZE, 1, 1), ids)
        assert counted.peak == select_tokens_bytes(given)
        if past and (by_forecast or selector == "quest"):
            choice, known = select_tokens.Choice(4, SIZE, 1, 1), ids.float()
            held = all_tensors(given, [positions, ids, known, *given.summary])
            with counted_bytes(held) as counted:
                select_tokens.select_past(asked, choice, ids, known)
            assert counted.peak == select_past_bytes(given)
            given.near_ids = ids
            with counted_bytes(held) as counted:
                select_tokens.select_near(asked, choice, (ids, known), ids)
            assert counted.peak == select_tokens_bytes(given)


def prompt_of(heads, tokens, dtype, num_past=0, blocks=64):
    """Return new tokens and a cache of so many blocks, as ops are given them."""
    query, k, v = (
        torch.zeros(BATCH, tokens, n, DIM, dtype=dtype).transpose(1, 2)
        for n in (heads, GROUPS, GROUPS)
    )
    numbers = torch.zeros(BATCH, GROUPS, blocks, dtype=torch.int32)
    return SimpleNamespace(
        query=query, k=k, v=v, lengths=torch.zeros(BATCH, dtype=torch.int32), slots=numbers,
        block_table=numbers.clone(), pages=torch.zeros(BATCH, GROUPS, 9, 2, SIZE, DIM, dtype=dtype),
        block_ids=torch.zeros(BATCH, GROUPS, tokens, 4, dtype=torch.int32), num_past=num_past,
        staging=torch.zeros(BATCH, GROUPS, 99, 2, SIZE, DIM, dtype=dtype), num_blocks=blocks,
        pooled=torch.zeros(BATCH, GROUPS, 4 * blocks, DIM, dtype=dtype), block_size=SIZE,
        bounds=torch.zeros(BATCH, GROUPS, blocks, 2, DIM, dtype=dtype), near_ids=None, shared=1,
        num_selected=4, tail=None,
    )  # fmt: skip


def low_bit_keys(given, bits):
    """Return the tensors of a summary of low-bit keys."""
    scales = given.bounds[:, :, :, 0].contiguous(), given.bounds[:, :, :, 1].contiguous()
    codes = torch.zeros(BATCH, GROUPS, given.num_blocks, bits * SIZE // 16, DIM).short()
    return [codes, *scales, given.k.new_zeros(BATCH, GROUPS, SIZE, DIM)]


def all_tensors(given, others):
    return [t for t in (*vars(given).values(), *others) if isinstance(t, torch.Tensor)]
