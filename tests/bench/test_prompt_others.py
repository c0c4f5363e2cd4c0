"""What others offer, on a CPU: FlexAttention runs uncompiled there, the rest stands for itself."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from sparda_compile.bench.timing import Spread

prompt_case = pytest.importorskip("sparda_compile.bench.prompt_case")
prompt_others = pytest.importorskip("sparda_compile.bench.prompt_others")
Case = prompt_case.Case

CPU = torch.device("cpu")
SMALL = prompt_case.Shape(
    tokens=40, past=256, heads=8, block=8, dim=16, sink=1, local=2, scored=4
)  # fmt: skip
ALONE = dataclasses.replace(SMALL, past=0)
TILES = [(16, 16), (16, 8), (128, 128)]


@pytest.fixture
def timed(monkeypatch):
    """A clock that says 100 us for each call, which still has to run."""
    calls = []

    def fake(each, rounds):
        calls.append(each)
        each[0]()
        return Spread(100.0, 90.0, 110.0, rounds)

    monkeypatch.setattr(prompt_others, "graph_us", fake)
    return calls


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as it is; without a compiler it looks at each pair of a query and a key."""

    def of(scale):
        return lambda *operands: flex_attention(
            *operands[:3], scale=scale, block_mask=operands[3], enable_gqa=True
        )

    monkeypatch.setattr(prompt_others, "compiled_flex", of)


def pairs(case):
    """Which token reads which key, [G, T, S], from the ids one by one."""
    shape = case.shape
    reads = torch.zeros(case.groups, shape.tokens, shape.past + shape.tokens, dtype=torch.bool)
    for group in range(case.groups):
        for token in range(shape.tokens):
            for block in case.ids[0, group, token].tolist():
                if block >= 0:
                    reads[group, token, block * shape.block : (block + 1) * shape.block] = True
            reads[group, token, shape.past + token + 1 :] = False
    return reads


@pytest.mark.parametrize("shape", [SMALL, ALONE])
@pytest.mark.parametrize("tile", TILES)
def test_the_mask_lets_each_token_read_its_own_blocks(shape, tile):
    case = Case(CPU, shape, 2)
    mask = prompt_others.flex_mask(case, tile)
    want = pairs(case)
    tokens, keys = torch.arange(shape.tokens), torch.arange(shape.past + shape.tokens)
    for head in range(shape.heads):
        batch, number = torch.tensor(0), torch.tensor(head)
        found = mask.mask_mod(batch, number, tokens[:, None], keys[None, :])
        assert torch.equal(found, want[head // 4])


def tiles_of(counts, columns, shape):
    listed = torch.zeros(shape, dtype=torch.bool)
    for index in range(counts.numel()):
        head, row = divmod(index, shape[1])
        own = columns[0, head, row, : int(counts[0, head, row])].long()
        listed[head, row, own] = True
    return listed


@pytest.mark.parametrize("shape", [SMALL, ALONE])
@pytest.mark.parametrize("tile", TILES)
def test_tiles_that_nobody_reads_are_passed_by_and_full_ones_ask_nothing(shape, tile):
    case = Case(CPU, shape, 2)
    mask = prompt_others.flex_mask(case, tile)
    want = pairs(case).repeat_interleave(4, 0)
    rows, columns = -(-want.shape[1] // tile[0]), -(-want.shape[2] // tile[1])
    size = (shape.heads, rows, columns)
    part = tiles_of(mask.kv_num_blocks, mask.kv_indices, size)
    full = tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices, size)
    room = (0, columns * tile[1] - want.shape[2], 0, rows * tile[0] - want.shape[1])
    padded = torch.nn.functional.pad(want, room)
    padded = padded.view(shape.heads, rows, tile[0], columns, tile[1]).transpose(2, 3)
    assert torch.equal(full, padded.all(-1).all(-1))
    assert torch.equal(part | full, padded.any(-1).any(-1))
    assert not (part & full).any()
    if tile == (16, 8) and shape.past:
        assert full.any()
        assert not (part | full).all()


def test_flex_attention_equals_ours_and_the_reference(timed, uncompiled):
    case = Case(CPU, SMALL, 2)
    call, more = prompt_others._flex(case, (16, 16))
    out = call()
    assert case.error(out) < prompt_case.MOST_ERROR
    case.stage()
    ours = case.attend()
    assert (out - ours).norm() / ours.norm() < prompt_case.MOST_ERROR
    assert more["mask_us"] > 0
    assert 0 < more["sparsity"] < 100


def test_offers_are_compared_timed_or_skipped_with_a_reason(timed, uncompiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    said = []
    rows = prompt_others.bench_others(Case(CPU, SMALL, 2), 50.0, said.append)
    names = ("flex_128x128", "flex_128x64", "dense_flash", "dense_cudnn", "nsa")
    assert list(rows) == [f"{name}_g2" for name in names]
    assert said == [f"{name} with 2 KV heads" for name in names]
    for name in names[:2]:
        row = rows[f"{name}_g2"]
        assert (row["median"], row["ours_us"], row["over_ours"]) == (100.0, 50.0, 2.0)
        assert row["error"] < prompt_case.MOST_ERROR
        assert row["tflops"] == 0.0
    assert list(rows["dense_cudnn_g2"]) == ["skipped"]
    assert "cudnn" in rows["dense_cudnn_g2"]["skipped"]
    assert "fla" in rows["nsa_g2"]["skipped"]


def test_an_offer_that_is_wrong_is_not_timed(timed):
    case = Case(CPU, SMALL, 2)
    case.stage()
    right = case.attend()
    found = prompt_others._row(lambda _: (lambda: right, {}), lambda: case, 10.0)
    assert found["over_ours"] == 10.0
    assert len(timed) == 1
    row = prompt_others._row(lambda _: (lambda: 1.1 * right, {}), lambda: case, 10.0)
    assert list(row) == ["skipped"]
    assert row["skipped"].startswith("its output is off by 0.")
    # Right for the blocks of each token, which is not dense.
    row = prompt_others._row(lambda _: (lambda: right, {}), lambda: case, 10.0, dense=True)
    assert row["skipped"].startswith("its output is off by")
    assert len(timed) == 1

    def refuses(case):
        raise RuntimeError("\nno such kernel\nat all")

    def has_no_room():
        raise torch.OutOfMemoryError("no room")

    assert "no room" in prompt_others._row(refuses, has_no_room, None)["skipped"]
    assert prompt_others._row(refuses, lambda: case, 1.0) == {
        "skipped": "RuntimeError: no such kernel"
    }


def plain_part(query, keys, values, *, is_causal):
    """Attention and its logarithms of sums, in fp64."""
    query, keys, values = (each.double() for each in (query, keys, values))
    scores = query @ keys.transpose(2, 3) * SMALL.dim**-0.5
    if is_causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ values, scores.logsumexp(-1).float()


def test_attention_in_two_parts_is_attention_over_all():
    case = Case(CPU, SMALL, 2)
    keys, values = (each.repeat_interleave(4, 1) for each in case.gathered)
    old, new = [keys[:, :, :256], values[:, :, :256]], [keys[:, :, 256:], values[:, :, 256:]]
    out = prompt_others.attend_in_parts(plain_part, case.query, old, new)
    assert out.dtype == torch.bfloat16
    assert case.error(out, dense=True) < 5e-3
    swapped = prompt_others.attend_in_parts(plain_part, case.query, [old[0], old[1].flip(2)], new)
    assert case.error(swapped, dense=True) > 0.1


def naive_nsa(q, k, v, block_indices, block_counts, block_size, scale):
    """What `parallel_nsa` says that it does, for each token by itself; gates are not given."""
    out = torch.zeros_like(q)
    heads = q.shape[2] // k.shape[2]
    assert block_indices.shape == (*q.shape[:2], k.shape[2], block_counts)
    for token in range(q.shape[1]):
        for head in range(q.shape[2]):
            blocks = block_indices[0, token, head // heads].tolist()
            places = [p for p in range(token + 1) if p // block_size in blocks]
            scores = k[0, places, head // heads].float() @ q[0, token, head].float() * scale
            weights = scores.softmax(0)
            out[0, token, head] = (weights @ v[0, places, head // heads].float()).to(q.dtype)
    return out


def test_nsa_gets_the_same_blocks_and_ours_is_timed_on_its_case(timed, monkeypatch):
    module = types.ModuleType("fla.ops.nsa")
    module.parallel_nsa = naive_nsa
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", module)
    case = Case(CPU, ALONE, 2)
    row = prompt_others._row(prompt_others._nsa, lambda: case, None)
    assert row["error"] < prompt_case.MOST_ERROR
    assert (row["ours_us"], row["over_ours"]) == (100.0, 1.0)
    assert [each[0] for each in timed][1] == case.attend

    def refuses(*args, **named):
        raise AssertionError("Group size (HQ/H) must be a power of 2 and >= 16 in NSA")

    module.parallel_nsa = refuses
    found = prompt_others._row(prompt_others._nsa, lambda: case, None)
    assert found["skipped"].startswith("AssertionError: Group size")


def test_ours_has_to_be_right_too(timed, monkeypatch):
    case = Case(CPU, ALONE, 2)
    monkeypatch.setattr(case, "attend", lambda: 1.1 * case.query)
    with pytest.raises(AssertionError, match="without a past is off by"):
        prompt_others._ours(case)
    assert not timed


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [2, 8])
def test_offers_on_a_gpu(groups):
    shape = prompt_case.Shape(tokens=1024, past=4096, local=4, scored=8)
    case = Case(torch.device("cuda"), shape, groups)
    case.stage()
    assert case.error(case.attend()) < prompt_case.MOST_ERROR
    rows = prompt_others.bench_others(case, 100.0, lambda text: None)
    for name in ("flex_128x128", "flex_128x64", "dense_flash", "dense_cudnn"):
        row = rows[f"{name}_g{groups}"]
        assert "skipped" not in row, (name, row)
        assert row["median"] > 0
    nsa = rows[f"nsa_g{groups}"]
    if "skipped" in nsa:  # not installed, or a group of 4
        assert nsa["skipped"].startswith(("ModuleNotFoundError", "AssertionError: Group size"))
