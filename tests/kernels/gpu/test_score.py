from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.kernels.gpu import score
from sparda_compile.kernels.gpu.low_bit_integers import fits_integers
from sparda_compile.kernels.gpu.score import SCORE_KERNELS
from sparda_compile.selectors import SELECTORS, Geometry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3


def filled_summary(name, lengths, groups, geometry, dim, dtype):
    """Return a selector's summary; what no token has completed is NaN, or empty bounds."""
    summary = SELECTORS[name].summary
    shapes = summary.shapes(geometry, dim)
    if summary.name.startswith("lowbit"):
        return filled_codes(shapes, lengths, groups, geometry, dtype)
    tensors = [torch.randn(len(lengths), groups, *shape).to(dtype) for shape in shapes.values()]
    for row, length in enumerate(lengths):
        if summary.name == "pooled_keys":
            num_windows = max((length - geometry.pool_size) // geometry.pool_stride + 1, 0)
            tensors[0][row, :, num_windows:] = float("nan")
            tensors[1][row] = float("nan")
        else:
            num_filled = -(-length // geometry.block_size)
            tensors[0][row] = tensors[0][row].sort(-2).values
            tensors[0][row, :, num_filled:, 0] = float("inf")
            tensors[0][row, :, num_filled:, 1] = float("-inf")
    return tensors


def filled_codes(shapes, lengths, groups, geometry, dtype):
    """Return random codes; spans and bases of blocks that are not full are NaN."""
    size = (len(lengths), groups)
    of_codes, of_spans, of_bases, of_open = shapes.values()
    codes = torch.randint(256, (*size, *of_codes), dtype=torch.uint8)
    span = torch.rand(*size, *of_spans).to(dtype)
    base = torch.randn(*size, *of_bases).to(dtype)
    for row, length in enumerate(lengths):
        span[row, :, length // geometry.block_size :] = float("nan")
        base[row, :, length // geometry.block_size :] = float("nan")
    opened = torch.full((*size, *of_open), float("nan"), dtype=dtype)
    return [codes, span, base, opened]


def check_scores(device, assert_close, name, lengths, sizes, geometry, dtype=torch.float32):
    """Score with the kernel, and with the selector in fp32 of the same values."""
    groups, repeat, dim = sizes
    tensors = filled_summary(name, lengths, groups, geometry, dim, dtype)
    heads = groups * (1 if name.endswith("forecast") else repeat)
    query = torch.randn(len(lengths), 1, heads, dim).to(dtype).transpose(1, 2)
    length = torch.tensor(lengths, dtype=torch.int32)
    # What stands for a key has the keys' dtype, but in the interpreter, which rounds otherwise.
    is_exact = "lowbit" in name and device == "cuda"
    exact = [t.float() if t.is_floating_point() and not is_exact else t for t in tensors]
    want = SELECTORS[name].score(query.float(), exact, length, SCALE, geometry)
    got = torch.full(want.shape, float("nan"), device=device)
    on_device = [tensor.to(device) for tensor in tensors]
    SCORE_KERNELS[name](query.to(device), on_device, length.to(device), SCALE, geometry, got)
    is_whole = "lowbit" in name and fits_integers(query.to(device), on_device[0])
    assert_close(got, want, "score of integers" if is_whole else "score", dtype)
    return got.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_kernel_equals_the_selector(device, assert_close, name, dtype):
    """40 blocks are two tiles, and the last sequence has more windows than one part holds."""
    geometry = Geometry(40, 16, 8, 4)
    check_scores(device, assert_close, name, [100, 333, 639], (2, 6, 24), geometry, dtype)


@pytest.mark.parametrize(("programs", "windows"), [(1, 16), (4, 16), (1, 64)])
def test_a_program_of_several_tiles(device, assert_close, monkeypatch, programs, windows):
    """Sequences that end inside a tile, at its end, and before the second program's first one."""
    monkeypatch.setattr(score, "_PROGRAMS", programs)
    monkeypatch.setattr(score, "_WINDOWS", windows)
    lengths = [639, 4 * windows + 4, 8 * windows, 0]
    check_scores(device, assert_close, "infllm2", lengths, (2, 3, 24), Geometry(40, 16, 8, 4))


@pytest.mark.parametrize(
    ("name", "repeat"),
    [
        ("forecast", 1),
        ("lowbit2_forecast", 1),
        *((name, n) for name in ("infllm2", "quest", "lowbit2", "lowbit4") for n in (1, 3, 7, 16)),
    ],
)
def test_groups_of_every_size(device, assert_close, name, repeat):
    check_scores(device, assert_close, name, [37, 75], (2, repeat, 20), Geometry(5, 16, 8, 4))


@pytest.mark.parametrize(
    "geometry",
    [Geometry(1, 16, 8, 4), Geometry(33, 16, 16, 16), Geometry(7, 12, 6, 3), Geometry(3, 8, 16, 4)],
)
@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_geometries(device, assert_close, name, geometry):
    """One block, windows without overlap, sizes that are no power of two, and long windows."""
    if "lowbit" in name:  # a block is a multiple of 16 tokens
        geometry = dataclasses.replace(
            geometry, block_size={12: 48, 8: 128}.get(geometry.block_size, 16)
        )
    full = geometry.num_blocks * geometry.block_size - (geometry.num_blocks > 1)
    check_scores(device, assert_close, name, [full, full // 2], (1, 3, 16), geometry)


@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_blocks_without_a_summary_score_minus_infinity(device, assert_close, name):
    """Nothing, one token, one too few for a window, one window, a full block, one more window."""
    geometry = Geometry(35, 16, 8, 4)
    got = check_scores(device, assert_close, name, [0, 1, 7, 8, 16, 20], (1, 2, 16), geometry)
    scored = got.isfinite().sum(-1).flatten().tolist()
    wanted = {"quest": [0, 1, 1, 1, 1, 2]} | {
        low: [0, 0, 0, 0, 1, 1] for low in SCORE_KERNELS if "lowbit" in low
    }
    assert scored == wanted.get(name, [0, 0, 0, 1, 1, 2])
    assert got[~got.isfinite()].eq(float("-inf")).all()


@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_gaps_between_a_query_s_elements(device, name):
    geometry, lengths = Geometry(5, 16, 8, 4), torch.tensor([70], dtype=torch.int32, device=device)
    tensors = filled_summary(name, [70], 2, geometry, 16, torch.float32)
    tensors = [tensor.to(device) for tensor in tensors]
    query = torch.randn(1, 2, 1, 32, device=device)[..., ::2]
    got, want = torch.full((2, 1, 2, 5), float("nan"), device=device)
    SCORE_KERNELS[name](query.contiguous(), tensors, lengths, SCALE, geometry, want)
    SCORE_KERNELS[name](query, tensors, lengths, SCALE, geometry, got)
    assert torch.equal(got, want)
    assert got.isfinite().any()


def test_extreme_logits_do_not_overflow(device, assert_close):
    """The softmax is taken over parts; one part may hold all of the weight."""
    geometry = Geometry(80, 16, 8, 4)
    lengths = torch.tensor([1270], dtype=torch.int32)
    pooled = torch.randn(1, 1, geometry.num_windows, 16)
    pooled[0, 0, 200] *= 40
    recent, query = torch.empty(1, 1, 8, 16), 30 * torch.randn(1, 3, 1, 16)
    want = SELECTORS["infllm2"].score(
        query.double(), [pooled.double(), recent], lengths, 1.0, geometry
    )
    got = torch.full(want.shape, float("nan"), device=device)
    tensors = [pooled.to(device), recent.to(device)]
    SCORE_KERNELS["infllm2"](query.to(device), tensors, lengths.to(device), 1.0, geometry, got)
    assert got.isfinite().any()
    # Logits of several thousand are known to a few hundredths in fp32; the weights are 0 and 1.
    assert (got.cpu().clamp(min=-1) - want.clamp(min=-1)).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "dim"), [(1, 64), (3, 96), (7, 128), (8, 64), (16, 256)])
@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_large_shapes(device, assert_close, name, repeat, dim, dtype):
    geometry = Geometry(300, 64, 32, 16)
    lengths = [0, 31, 32, 64 * 137 + 5, 64 * 300 - 1]
    check_scores(device, assert_close, name, lengths, (2, repeat, dim), geometry, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(16, torch.float32), (32, torch.float16), (64, torch.bfloat16), (128, torch.bfloat16)],
)
@pytest.mark.parametrize("name", SCORE_KERNELS)
def test_2048_blocks(device, assert_close, name, size, dtype):
    pool = 32 if size > 16 else 16
    geometry = Geometry(2048, size, pool, pool // 2)
    lengths = [2048 * size - 1, 700 * size + 3, pool]
    check_scores(device, assert_close, name, lengths, (2, 7, 128), geometry, dtype)
