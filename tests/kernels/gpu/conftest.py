"""Where kernels run, and how near they have to come: interpreted on the CPU, or on a CUDA GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import pytest
import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu import stage
from sparda_compile.kernels.gpu.launch import as_written, launch
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.paged import num_new_slots
from sparda_compile.kernels.prefill_attention import token_positions
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime.staging import empty_staging

if TYPE_CHECKING:
    from collections.abc import Iterator

HAS_CUDA = torch.cuda.is_available()
NAN = float("nan")

# Largest error of an element, relative to the RMS of its sequence. A score is fp32 however its
# summary is stored, but tensor cores sum half-precision products with fewer bits. What attention
# returns has the query's precision, and so have its weights.
TOLERANCES = {
    ("score", torch.float32): 1e-4,
    ("score", torch.float16): 1e-4,
    ("score", torch.bfloat16): 1e-4,
    ("score of integers", torch.float16): 5e-2,
    ("score of integers", torch.bfloat16): 5e-2,
    ("attention", torch.float32): 1e-4,
    ("attention", torch.float16): 4e-3,
    ("attention", torch.bfloat16): 3e-2,
}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(scope="session")
def assert_close():
    """Check that values [B, ...] are near the wanted ones, and infinite where those are."""

    def check(got, want, kind, dtype):
        got, want = got.cpu().double(), want.double()
        assert got.shape == want.shape
        exists = want.isfinite()
        assert not got.isnan().any()
        assert torch.equal(got[~exists], want[~exists])
        # Sequence by sequence: the longer one is, the smaller is what attention returns.
        # What is stored rounds by itself, by half of its last bit.
        rounding = want.abs() * (torch.finfo(dtype).eps / 2)
        error = ((got - want).abs() - rounding).where(exists, 0.0).flatten(1).amax(1)
        total = want.where(exists, 0.0).flatten(1).square().sum(1)
        size = (total / exists.flatten(1).sum(1).clamp(min=1)).sqrt()
        assert (error <= TOLERANCES[kind, dtype] * size).all(), f"errors {error} of {size}"

    return check


@pytest.fixture(autouse=True)
def _poison_gpu_memory() -> Iterator[None]:
    """Fill what kernels' launchers allocate; on the CPU the fixture for all tests does that."""
    if not HAS_CUDA:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class PromptCase:
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

    def numbered(self, device):
        """Return positions, columns and totals of the new tokens."""
        return [part.to(device) for part in number_tokens(self.mask, self.lengths)]

    def staged(self, device):
        """Return what kernels make of the past: the buffer, and the slot of each block."""
        ids, lengths = self.ids.to(device), self.lengths.to(device)
        pages, host, table = self.where(device)
        staging, slots = empty_staging(ids, pages, table, int(self.lengths.max()))
        room = staging.shape[2] - num_new_slots(ids.shape[2], self.size)
        if room:
            stage.stage(ids, lengths, (pages, host, table), staging, slots, room)
        return (staging, slots), (pages, table)


@pytest.fixture
def prompt_case(device, monkeypatch) -> type[PromptCase]:
    """What makes a prompt behind a past; a gather has few programs where they are interpreted."""
    if device == "cpu":
        monkeypatch.setattr(stage, "GATHER_PROGRAMS", 3)
    return PromptCase


class PackedCase:
    """Blocks and runs of formats that round, and whether two are the same."""

    @staticmethod
    def blocks(*shape, dtype, seed=0):
        """Return blocks with outliers, constant lines, tiny numbers, zeros, NaN and infinity."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x[..., 3] *= 1000
        x[..., 1, :] = 0.25
        x[..., 5] = -2.5
        x[..., 7] *= 1e-6
        x[..., 2, :] *= 1e-7
        x[..., 9] = 0.0
        x = x.to(dtype)
        x[..., 4, 11], x[..., 6, 12] = NAN, float("-inf")
        return x

    @staticmethod
    def same(got, want):
        """Whether bytes are the same, but for those of NaN, of which there are many."""
        got = got.cpu()
        if got.dtype == torch.uint8:
            return torch.equal(got, want)
        nan = want.isnan()
        return torch.equal(got.isnan(), nan) and torch.equal(
            got[~nan].view(torch.uint8), want[~nan].view(torch.uint8)
        )

    @classmethod
    def same_runs(cls, name, got, want, size, dim, dtype):
        """Whether codes are the same bytes, and scales the same numbers; padding may differ."""
        found = KV_FORMATS[name]
        halves = 2 if found.summary is None else 1  # keys that stay are not in a run
        codes = halves * size * dim * found.code_bits // 8
        of_keys, of_values = found.num_scales
        end = codes + (of_keys * dim + of_values * size) * dtype.itemsize
        scales = [run[..., codes:end].contiguous().view(dtype) for run in (got, want)]
        return cls.same(got[..., :codes], want[..., :codes]) and cls.same(*scales)

    @staticmethod
    def memory(runs, device):
        """Return runs that the device reads and writes by address, and where they begin."""
        held = torch.empty(runs.shape, dtype=runs.dtype, pin_memory=device == "cuda").copy_(runs)
        pair = torch.arange(runs.shape[0] * runs.shape[1]).view(runs.shape[:2])
        return held, (held.data_ptr() + pair * held[0, 0].nbytes).to(device)

    @staticmethod
    def wait(device):
        """Wait for the device."""
        if device == "cuda":
            torch.cuda.synchronize()


@pytest.fixture(scope="session")
def case():
    return PackedCase


@triton.jit
def _codes_of(
    x, codes, values, LAST: tl.constexpr, AXIS: tl.constexpr, ENCODE: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """Encode 8 lines of 256 numbers, along AXIS of a tile, and decode what that gives."""
    if AXIS == 0:
        at = tl.arange(0, 256)[:, None] + tl.arange(0, 8)[None, :] * 256
    else:
        at = tl.arange(0, 8)[:, None] * 256 + tl.arange(0, 256)[None, :]
    numbers = tl.load(x + at)
    made, first, last = ENCODE(numbers, numbers == numbers, AXIS)
    made = made & LAST
    tl.store(codes + at, made)
    read = DECODE(made, tl.expand_dims(first, AXIS), tl.expand_dims(last, AXIS), AXIS)
    tl.store(values + at, read)


@pytest.fixture
def check_codes(device):
    def check(name, functions, axis):
        """Lines of 256 numbers: every code of the format, numbers between them, and ties.

        They are channels of keys with axis 0, and tokens of values with axis 1.
        """
        found = KV_FORMATS[name]
        every = torch.arange(256, dtype=torch.int32)
        bits = 2**found.code_bits
        ends = (448.0,) if found.num_scales[axis] == 1 else (-3.0, 12.0)
        scales = [torch.tensor([[end]]) for end in ends]
        lines = found.decode((every % bits).to(torch.uint8)[None], scales).nan_to_num(0.0)
        between = (lines + lines.sort().values.roll(1)) / 2
        noise = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
        x = torch.cat([lines, between, noise, noise[:1] * 1e-3, torch.zeros(1, 256)])[:8]
        x[3] += 100.0
        x[5, 0] = 1000.0
        x[6] *= 1e-39
        codes, values = torch.empty(8, 256, dtype=torch.int32), torch.empty(8, 256)
        codes, values, there = codes.to(device), values.to(device), x.to(device)
        functions = (functions.encode, functions.decode)
        launch(_codes_of, (1,))(there, codes, values, bits - 1, axis, *functions, **as_written())
        tile = x.T if axis == 0 else x
        own = found.scales(tile, axis - 2)
        want = found.encode(tile, own)
        read = found.decode(want, own)
        if axis == 0:
            want, read = want.T, read.T
        assert torch.equal(codes.cpu().to(torch.uint8), want)
        assert torch.equal(values.cpu(), read)
        assert len(want.unique()) > 0.9 * min(bits, 254)

    return check


@pytest.fixture
def late_stores(monkeypatch):
    """Let what is stored between two barriers come in the other order: the first store stays.

    Warps of a GPU wait for each other at barriers alone.
    """
    if torch.cuda.is_available():
        pytest.skip(
            "brings the stores of Triton's interpreter in another order, and it is on only where "
            "there is no GPU. A GPU orders its own: there `pytest -m gpu tests/e2e/test_cuda.py` "
            "shows what a step makes of these kernels"
        )
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    store, written = InterpreterBuilder.create_masked_store, numpy.empty(0, numpy.uint64)

    def first_store(builder, pointers, value, mask, *rest):
        nonlocal written
        own = mask.data & ~numpy.isin(pointers.data, written)
        written = numpy.union1d(written, pointers.data[own])
        return store(builder, pointers, value, TensorHandle(own, mask.dtype), *rest)

    def begin_anew(builder, *_):
        nonlocal written
        written = written[:0]

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", first_store)
    monkeypatch.setattr(InterpreterBuilder, "create_barrier", begin_anew)
    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda b, *at: (begin_anew(b), place(b, *at))
    )
