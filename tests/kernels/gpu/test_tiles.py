"""Attention that reads stored runs: the bits of attention to pages of the model's dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparda_compile.isa.counters import COUNTERS
from sparda_compile.kernels.gpu import speculation
from sparda_compile.kernels.gpu.attention import attend, merge, partials
from sparda_compile.kernels.gpu.partials import attend_blocks
from sparda_compile.kernels.gpu.tiles import PageForm
from sparda_compile.kernels.paged import Stored
from sparda_compile.kernels.sparse_attention import sparse_attention
from sparda_compile.registry import KV_FORMATS

# A line that is NaN has infinity as its unit in `fp8`, and 0 times that is NaN.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NAMES = ("int8", "fp8", "int4")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


class Pool:
    """The same blocks on both kinds of pages, in any order; some of them are selected.

    The one that is being written has NaN behind its last token, and so have pages of no block.
    Runs of no block, and that of the page which the open block has, are bytes of all kinds.
    """

    def __init__(self, device, name, lengths, selected, sizes, dtype, seed=0):
        self.device, found = device, KV_FORMATS[name]
        groups, repeat, size, dim = sizes
        random = torch.Generator().manual_seed(seed)
        batch, num_blocks = len(lengths), max(lengths) // size + 1
        query = torch.randn(batch, 1, groups * repeat, dim, generator=random)
        self.query, self.lengths = query.to(dtype).transpose(1, 2), torch.tensor(lengths).int()
        shape = (batch, groups, num_blocks + 1)
        self.pages = torch.full((*shape, 2, size, dim), NAN, dtype=dtype)
        run = found.num_bytes(size, dim, dtype)
        self.runs = torch.randint(0, 256, (*shape, run), generator=random, dtype=torch.uint8)
        self.tail = torch.full((batch, groups, 2, 2, size, dim), NAN, dtype=dtype)
        self.table = torch.full((batch, groups, num_blocks), -1, dtype=torch.int32)
        self.ids = torch.full((batch, groups, selected), -1, dtype=torch.int32)
        self.page_ids = self.ids.clone()
        for row, group in torch.cartesian_prod(torch.arange(batch), torch.arange(groups)):
            current = lengths[row] // size
            order = torch.randperm(num_blocks + 1, generator=random)[: current + 1]
            self.table[row, group, : current + 1] = order.int()
            blocks = torch.randn(current + 1, 2, size, dim, generator=random)
            blocks[..., 3] *= 30.0
            blocks = blocks.to(dtype)
            self.runs[row, group, order[:-1]] = found.pack(blocks[:-1])
            self.pages[row, group, order[:-1]] = found.rounded(blocks[:-1])
            seen = lengths[row] % size + 1
            self.tail[row, group, 0, :, :seen] = blocks[-1, :, :seen]
            self.pages[row, group, order[-1]] = self.tail[row, group, 0]
            picked = torch.randperm(current, generator=random)[: selected - 1].sort().values
            picked = torch.cat([picked, torch.tensor([current])])
            self.ids[row, group, : len(picked)] = picked.int()
            self.page_ids[row, group, : len(picked)] = order[picked].int()
        self.stored = Stored(self.tail.to(device), name)

    def both(self, run):
        """Return what a function makes of the pool, given pages and what goes with them."""
        given = [(self.pages.to(self.device), None), (self.runs.to(self.device), self.stored)]
        return [run(pages, stored) for pages, stored in given]

    def on_device(self, *names):
        return [getattr(self, name).to(self.device) for name in names]


def same(one, other):
    """Whether tensors have the same bits."""
    return torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("softcap", "per_split"), [(0.0, 1), (3.0, 4)])
def test_attention_has_the_same_bits(device, assert_close, name, softcap, per_split, dtype):
    pool = Pool(device, name, [16 * 4 + 3, 16 * 9 + 15], 6, (2, 3, 16, 24), dtype)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")
    want, got = pool.both(
        lambda pages, stored: attend(
            query, pages, page_ids, ids, lengths, 0.3, softcap, per_split, stored
        )
    )
    assert same(want, got)
    operands = (pool.page_ids, pool.ids, pool.lengths, 0.3, softcap)
    # The reference reads runs, too, and multiplies in float32.
    plain = sparse_attention(
        pool.query.float(), pool.runs, *operands, tail=pool.tail, kv_format=name
    )
    assert_close(got, plain.float(), "attention", dtype)


@pytest.mark.parametrize(
    ("size", "dim", "per_split"),
    # Tiles of parts of a block, of one and of many, splits of parts of a tile and of many.
    [(16, 8, 2), (16, 16, 7), (16, 16, 20), (32, 60, 2), (64, 96, 5), (128, 256, 2), (48, 16, 3)],
)
@pytest.mark.parametrize("name", NAMES)
def test_head_dims_and_block_sizes(device, name, size, dim, per_split):
    pool = Pool(device, name, [size * 9 + 1, size * 3 - 1], 9, (1, 3, size, dim), torch.float16)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")
    is_miss = ((torch.arange(9) % 4 == 0) & (pool.ids >= 0)).to(device)

    def run(pages, stored):
        operands = (query, pages, page_ids, ids, is_miss, lengths, 0.2, 0.0, per_split, stored)
        early, late = partials(*operands), partials(*operands, missing=True)
        return merge(*early, late, torch.float16)

    assert same(*pool.both(run))


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_sequences(device, name):
    """One token, two, a full block, one token of a new block: most have no run at all."""
    pool = Pool(device, name, [0, 1, 15, 16, 63], 3, (1, 2, 16, 16), torch.bfloat16)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")
    want, got = pool.both(
        lambda pages, stored: attend(query, pages, page_ids, ids, lengths, 0.2, 0.0, 2, stored)
    )
    assert same(want, got)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_line_is_broken_in_both(device, name, dtype):
    """A channel of keys, or a token of values, with NaN: nothing of it is lost, nor added."""
    pool = Pool(device, name, [16 * 5 + 3], 5, (1, 2, 16, 16), dtype)
    found, page = KV_FORMATS[name], int(pool.page_ids[0, 0, 1])
    block = torch.randn(2, 16, 16).to(dtype)
    block[0, 3, 5], block[1, 7, 2] = NAN, float("inf")
    pool.runs[0, 0, page], pool.pages[0, 0, page] = found.pack(block), found.rounded(block)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")
    want, got = pool.both(
        lambda pages, stored: attend(query, pages, page_ids, ids, lengths, 0.2, 0.0, 1, stored)
    )
    assert got.isnan().all()
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_speculation_has_the_same_bits(device, name, union):
    pool = Pool(device, name, [16 * 7 + 3, 16 * 9 + 15], 6, (2, 3, 16, 24), torch.bfloat16)
    query, ids, page_ids, table, lengths = pool.on_device(
        "query", "ids", "page_ids", "table", "lengths"
    )
    # Some of what is selected, the open block, and some that nobody selected.
    predicted = torch.arange(10).expand(2, 2, 10).contiguous().int().to(device)

    def run(pages, stored):
        shape = (*predicted.shape, 3)
        partial = (
            query.new_zeros((*shape, 24), dtype=torch.float32),
            query.new_zeros(shape, dtype=torch.float32),
        )
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        speculation.attend_predicted(
            query, pages, table, predicted[..., ::2].contiguous(), lengths, 0.2, 0.0,
            tuple(part[:, :, :5].contiguous() for part in partial), stored,
        )  # fmt: skip
        speculation.attend_predicted(
            query, pages, table, predicted, lengths, 0.2, 0.0, partial, stored
        )
        chosen, repair = (page_ids, ids, predicted), (lengths, partial, counters, (0.2, 0.0))
        out = speculation.repair_predicted(query, pages, chosen, *repair, stored, union=union)
        return torch.cat([part.flatten() for part in (out.float(), *partial, counters.float())])

    assert same(*pool.both(run))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_alone_have_the_same_bits(device, name):
    pool = Pool(device, name, [64 * 3 + 40], 4, (1, 16, 64, 32), torch.float16)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")

    def run(pages, stored):
        out = query.new_empty((1, 1, 4, 16, 32), dtype=torch.float32)
        lse = query.new_empty((1, 1, 4, 16), dtype=torch.float32)
        results = (out, lse)
        attend_blocks(query, pages, page_ids, ids, lengths, 0.2, 0.0, results, stored, early=False)
        return torch.cat([out.flatten(), lse.flatten()])

    assert same(*pool.both(run))


def test_shared_memory_of_tiles():
    assert PageForm.of(None).tile_bytes(4 * 64 * 128, 2) == (4 * 64 * 128 * 2, 0)
    form = PageForm.of(Stored(torch.zeros(1, 1, 2, 2, 64, 128), "int4"))
    assert form.tile_bytes(64 * 128, 4) == (64 * 128, 64 * 128 * 4)
    assert form.tile_bytes(64 * 128, 4, many=True) == (64 * 128 * 9, 64 * 128 * 4)


def test_sums_have_the_same_order_on_an_h200(tmp_path):
    """A tensor core sums the same products at once, which the interpreter cannot say."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("sums_on_h200.py"))],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    attending = {"_partials 16": 4, "_partials 64": 4}
    attending |= {"_attend_blocks 64": 2, "_repair_predicted 64": 2}
    for name, num_dots in attending.items():
        want = found[name].pop("model")
        assert sum("kWidth" in line for line in want) == num_dots < len(want)
        assert found[name] == dict.fromkeys(NAMES, want), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("name", NAMES)
def test_large_shapes(device, name, size, dtype):
    pool = Pool(device, name, [size * 70 + 5, size * 90 + 3], 65, (2, 4, size, 128), dtype)
    query, ids, page_ids, lengths = pool.on_device("query", "ids", "page_ids", "lengths")
    for per_split in (2, 8, 65):
        assert same(
            *pool.both(
                lambda pages, stored, n=per_split: attend(
                    query, pages, page_ids, ids, lengths, 0.08, 0.0, n, stored
                )
            )
        )
