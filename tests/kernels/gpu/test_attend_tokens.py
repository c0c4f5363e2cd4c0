from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu import attend_tokens as kernels
from sparda_compile.kernels.gpu import token_blocks
from sparda_compile.kernels.prefill_attention import attend_tokens, token_positions

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _few_programs(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(token_blocks, "GATHER_PROGRAMS", 3)


class Case:
    """New tokens behind a past in pages and CPU memory; NaN where nothing is, or nobody reads."""

    def __init__(
        self, lengths, mask, sizes, *, selected=4, dtype=torch.float32, offload=True, seed=0
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, (groups, repeat, self.size, dim) = dtype, sizes
        self.mask = torch.tensor(mask)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        batch, num_tokens = self.mask.shape
        self.position = token_positions(self.lengths, self.mask, num_tokens)
        self.query = self.randn(batch, num_tokens, groups * repeat, dim).transpose(1, 2)
        self.k = self.randn(batch, num_tokens, groups, dim).transpose(1, 2)
        self.v = self.randn(batch, groups, num_tokens, dim)
        for row in range(batch):
            self.k[row, :, ~self.mask[row]] = self.v[row, :, ~self.mask[row]] = NAN
        self.num_blocks = int(self.position.max().clamp(min=max(lengths))) // self.size + 2
        self.ids = torch.full((batch, groups, num_tokens, selected), -1, dtype=torch.int32)
        self.choose_ids(selected)
        self.fill_blocks(groups, dim, offload=offload)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def choose_ids(self, selected):
        """Give each token its own block and some others before it, the last ones more often."""
        for row, group, token in torch.cartesian_prod(*map(torch.arange, self.ids.shape[:3])):
            current = int(self.position[row, token]) // self.size
            if self.position[row, token] >= 0:
                order = torch.rand(current, generator=self.generator)
                order[-2:] += 0.5
                ids = order.argsort(descending=True)[: selected - 1].sort().values
                ids = torch.cat([ids, torch.tensor([current])])
                self.ids[row, group, token, : len(ids)] = ids.int()

    def fill_blocks(self, groups, dim, *, offload):
        batch, size = len(self.lengths), self.size
        num_pages = max(self.num_blocks // 2, 2) if offload else self.num_blocks
        self.pages = torch.full((batch, groups, num_pages, 2, size, dim), NAN, dtype=self.dtype)
        shape = (batch, groups, self.num_blocks, 2, size, dim)
        self.host = torch.full(shape, NAN, dtype=self.dtype) if offload else torch.empty(0)
        self.table = torch.full(shape[:3], -1, dtype=torch.int32)
        self.read = torch.zeros(shape[:3], dtype=torch.bool)
        for row, length in enumerate(self.lengths.tolist()):
            for group in range(groups):
                ids = self.ids[row, group]
                self.read[row, group, ids[ids >= 0].long()] = True
                pages = torch.randperm(num_pages, generator=self.generator).tolist()
                for block in reversed(range(-(-length // size))):
                    seen = min(size, length - block * size)
                    kv = self.randn(2, seen, dim)
                    if not offload or seen < size or (block % 2 and pages):
                        page = pages.pop()
                        self.table[row, group, block] = page
                        self.pages[row, group, page, :, :seen] = kv
                    else:
                        self.host[row, group, block] = kv

    def want(self, scale, softcap):
        """Return what the reference makes of the same numbers in fp32."""
        plain = [t.float().nan_to_num() for t in (self.query, self.k, self.v)]
        past = [self.pages.float().nan_to_num(), self.host.float().nan_to_num(), self.table]
        ids = self.ids
        return attend_tokens(*plain, ids, self.mask, self.lengths, *past, scale, softcap)

    def where(self, device):
        """Return the past as it is on a GPU, with NaN in CPU memory where nobody reads."""
        host = self.host
        if host.numel():
            absent = (self.table < 0) & ~self.read
            host = host.masked_fill(absent[..., None, None, None], NAN)
            self.pinned = torch.empty(
                host.shape, dtype=self.dtype, pin_memory=device == "cuda"
            ).copy_(host)
            step = host[0, 0].numel() * host.element_size()
            pair = torch.arange(host.shape[0] * host.shape[1]).view(host.shape[:2])
            host = self.pinned.data_ptr() + pair * step
        return self.pages.to(device), host.to(device), self.table.to(device)

    def got(self, device, scale=0.3, softcap=0.0, rows=0):
        new = [t.to(device) for t in (self.query, self.k, self.v, self.ids, self.mask)]
        query, k, v, ids, mask = new
        out = kernels.attend_tokens(
            query, (k, v), ids, mask, self.lengths.to(device), self.where(device),
            (scale, softcap), rows,
        )  # fmt: skip
        assert out.is_contiguous()
        assert out.dtype == self.dtype
        return out.cpu()

    def check(self, device, assert_close, softcap=0.0, rows=0):
        got, want = self.got(device, 0.3, softcap, rows), self.want(0.3, softcap)
        assert want.isfinite().all()
        for row, mask in enumerate(self.mask):
            if mask.any():
                mine, wanted = got[row][None, :, mask], want[row][None, :, mask]
                assert_close(mine, wanted, "attention", self.dtype)
        hidden = ~self.mask[:, None, :, None].expand(got.shape)
        assert got[hidden].eq(0).all()


def first(count, width):
    return [i < count for i in range(width)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offload", [True, False])
def test_kernels_equal_the_reference(device, assert_close, offload, dtype):
    """Holes behind a past, left padding behind one that ends in a block, no past, and no token."""
    mask = [
        [i % 5 != 1 for i in range(21)],
        [i > 9 for i in range(21)],
        first(21, 21),
        [False] * 21,
    ]
    case = Case([83, 64, 0, 17], mask, (1, 3, 16, 24), dtype=dtype, offload=offload)
    assert offload == bool(((case.table < 0) & case.read).any() and case.host.numel())
    case.check(device, assert_close)


@pytest.mark.parametrize("repeat", [1, 3, 4, 7, 8, 16, 71])
def test_groups_of_every_size(device, assert_close, repeat):
    num_tokens = 2 if repeat > 64 else 7
    case = Case([61], [first(num_tokens, num_tokens)], (2, repeat, 16, 16))
    case.check(device, assert_close, rows=128 if repeat > 64 else 64)


@pytest.mark.parametrize(
    ("size", "dim"), [(4, 12), (8, 16), (48, 96), (64, 64), (64, 128), (128, 128), (128, 256)]
)
def test_head_dims_and_block_sizes(device, assert_close, size, dim):
    case = Case([3 * size + 5], [first(6, 6)], (1, 4, size, dim), selected=3)
    case.check(device, assert_close, rows=16)


@pytest.mark.parametrize(
    ("length", "num_tokens"), [(0, 1), (0, 4), (1, 2), (1, 3), (4, 1), (4, 5), (7, 1), (7, 9)]
)
def test_turns_begin_and_end_anywhere_in_a_block(device, assert_close, num_tokens, length):
    case = Case([length], [first(num_tokens, num_tokens)], (1, 2, 4, 8), selected=2)
    case.check(device, assert_close, rows=16)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(device, assert_close, softcap):
    case = Case([40], [first(9, 9)], (1, 2, 16, 16))
    case.check(device, assert_close, softcap)


def test_tiles_and_launches_change_nothing(device, assert_close, monkeypatch):
    """128 tokens are a tile of a group of 1, and 32 of them a word; or one launch a tile."""
    case = Case([37], [first(40, 40)], (1, 1, 8, 16), selected=5)
    want = case.want(0.3, 0.0)
    for rows in (128, 16):
        assert_close(case.got(device, rows=rows), want, "attention", torch.float32)
    monkeypatch.setattr(kernels, "_SCRATCH_BYTES", 1)
    assert_close(case.got(device, rows=32), want, "attention", torch.float32)


def test_a_prompt_in_turns_gives_the_same(device, assert_close):
    """The second turn reads as past what the first one read as new."""
    whole = Case([0], [first(29, 29)], (2, 2, 8, 16), selected=3, offload=False)
    turn = Case([19], [first(10, 10)], (2, 2, 8, 16), selected=3, offload=False)
    for name in ("query", "k", "v", "ids"):
        setattr(turn, name, getattr(whole, name)[:, :, 19:])
    kv = torch.stack([whole.k, whole.v], dim=2)[:, :, :, :19]
    for block in range(3):
        tokens = kv[:, :, :, 8 * block : 8 * block + 8]
        for group in range(2):
            page = turn.table[0, group, block]
            turn.pages[0, group, page, :, : tokens.shape[3]] = tokens[0, group]
    got = whole.got(device)
    assert_close(turn.got(device), got[:, :, 19:], "attention", torch.float32)


def test_extreme_scores_do_not_overflow(device):
    case = Case([40], [first(9, 9)], (1, 2, 16, 16))
    for scale, softcap in ((100.0, 0.0), (1000.0, 5.0)):
        error = case.got(device, scale, softcap) - case.want(scale, softcap)
        assert error.abs().max() < 1e-2


def test_gaps_between_elements(device, assert_close):
    case = Case([21], [first(9, 9)], (2, 2, 8, 16))
    for name in ("query", "k", "v"):
        tensor = getattr(case, name).repeat_interleave(2, -1)[..., ::2]
        assert tensor.stride(-1) == 2
        setattr(case, name, tensor)
    case.check(device, assert_close)


@pytest.mark.parametrize("tokens", [8, 64])
def test_unions_are_what_tiles_of_neighbours_read(device, tokens):
    mask = [[i % 3 > 0 for i in range(36)], first(36, 36)]
    case = Case([50, 3], mask, (2, 1, 4, 8), selected=3)
    ids, past = case.ids.to(device), case.where(device)
    case.pinned.nan_to_num_()
    kv = (case.k.to(device), case.v.to(device))
    lengths = case.lengths.to(device)
    prompt = token_blocks.place_blocks(kv, ids, case.mask.to(device), lengths, past)
    assert prompt.counts.tolist() == [24, 36]
    # Nothing else crosses the link, and the buffer is NaN where nothing has been written.
    block = torch.arange(case.num_blocks)
    missed = (case.table < 0) & case.read & (block < (case.lengths // 4)[:, None, None])
    fetched = prompt.staging[:, :, 36 // 4 + 1 :].isfinite().all(-1).all(-1).all(-1)
    assert torch.equal(fetched.sum(-1).cpu(), missed.sum(-1))
    assert missed.any()
    tiles = -(-36 // tokens)
    union = token_blocks.unions(prompt, ids, tokens, 0, tiles)
    for row, group, tile in torch.cartesian_prod(*map(torch.arange, (2, 2, tiles))).tolist():
        columns = torch.where(case.mask[row])[0][tile * tokens : (tile + 1) * tokens]
        assert torch.equal(
            prompt.columns[row, tile * tokens :][: len(columns)].cpu(), columns.int()
        )
        own = case.ids[row, group, columns]
        blocks = [block for block in own.unique().tolist() if block >= 0]
        pair = 2 * row + group
        count = int(union.counts[pair, tile])
        assert union.block_ids[pair, tile, :count].tolist() == blocks
        for entry, block in enumerate(blocks):
            words = union.readers[pair, tile].flatten(0)[entry * union.readers.shape[3] :]
            bits = [int(words[t // 32]) >> (t % 32) & 1 for t in range(len(columns))]
            assert bits == (own == block).any(-1).int().tolist()
            check_block(case, prompt, (row, group, block), int(union.addresses[pair, tile, entry]))


def check_block(case, prompt, which, address):
    """An address is that of a page, or of a block in the staging buffer with the right content."""
    row, group, block = which
    page = int(case.table[row, group, block])
    if block < case.lengths[row] // case.size and page >= 0:
        assert address >= 0
        return
    staging = prompt.staging
    number = (address - staging.data_ptr()) // (staging[0, 0, 0].numel() * staging.element_size())
    assert number // staging.shape[2] == row * staging.shape[1] + group
    got = staging[row, group, number % staging.shape[2]].cpu()
    start = block * case.size
    for offset in range(case.size):
        position = start + offset
        if position < case.lengths[row]:
            source = case.pages[row, group, page] if page >= 0 else case.host[row, group, block]
            want = source[:, offset]
        else:
            column = torch.where(case.position[row] == position)[0]
            if len(column) == 0:
                want = torch.zeros(2, got.shape[-1])
            else:
                want = torch.stack([t[row, group, column[0]] for t in (case.k, case.v)])
        assert torch.equal(got[:, offset], want)


def test_rows_of_a_tile():
    """A group of 16 heads of 128 numbers takes 8 tokens; long vectors and large groups fewer."""
    assert kernels.tile_rows(16, 128, torch.bfloat16) == 128
    assert kernels.tile_rows(4, 512, torch.float16) == 64
    assert kernels.tile_rows(71, 512, torch.float16) == 128
    assert kernels.tile_rows(4, 128, torch.float32) == 32


def test_what_is_not_covered():
    pages, table = torch.empty(1, 2, 1, 2, 4, 256), torch.empty(1, 2, 1)
    assert kernels.covers(torch.empty(1, 128, 1, 256), pages, table)
    assert not kernels.covers(torch.empty(1, 142, 1, 256), pages, table)
    assert not kernels.covers(torch.empty(1, 2, 1, 256, dtype=torch.float16), pages, table)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("repeat", "size", "dim", "softcap"),
    [
        (1, 64, 64, 0.0), (4, 64, 96, 30.0), (7, 16, 128, 0.0), (8, 128, 64, 0.0),
        (16, 64, 128, 0.0), (16, 64, 256, 0.0), (4, 64, 128, 0.0),
    ],
)  # fmt: skip
def test_large_shapes(device, assert_close, repeat, size, dim, softcap, dtype):
    """Some hundred tokens of sequences of a hundred blocks, and of none."""
    mask = [first(300, 300), [i % 7 > 0 for i in range(300)], [i > 200 for i in range(300)]]
    lengths = [100 * size + 5, 30 * size, 0]
    case = Case(lengths, mask, (2, repeat, size, dim), selected=24, dtype=dtype)
    case.check(device, assert_close, softcap)
    case.check(device, assert_close, softcap, rows=max(64, 1 << (repeat - 1).bit_length()))
