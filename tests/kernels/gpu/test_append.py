from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu.append import SUMMARY_KERNELS, append_kv
from sparda_compile.runtime.append import append_kv as append_kv_reference
from sparda_compile.selectors import Geometry, summary_named

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def new_token(layout, batch, groups, dim, dtype):
    """Return one token's keys or values, [B, G, 1, D], as a model lays them out."""
    if layout == "transposed":
        return torch.randn(batch, 1, groups, dim).to(dtype).transpose(1, 2)
    if layout == "sliced":
        return (
            torch.randn(batch, 1, 3 * groups, dim).to(dtype)[:, :, groups:-groups].transpose(1, 2)
        )
    if layout == "gaps":
        return torch.randn(batch, groups, 1, 2 * dim).to(dtype)[..., ::2]
    return torch.randn(batch, groups, 1, dim).to(dtype)


LAYOUTS = ["plain", "transposed", "sliced", "gaps"]


def check_append(device, lengths, groups, size, dim, dtype, layout):
    batch, num_pages = len(lengths), 5
    k, v = (new_token(layout, batch, groups, dim, dtype) for _ in range(2))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    tail_page = torch.randint(0, num_pages, (batch, groups), dtype=torch.int32)
    want = torch.full((batch, groups, num_pages, 2, size, dim), float("nan"), dtype=dtype)
    got = want.clone().to(device)
    append_kv_reference(k, v, tail_page, lengths, want)
    append_kv(*(t.to(device) for t in (k, v, tail_page, lengths)), got)
    # As bytes, so that NaN equals NaN: nothing but the token may be written.
    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    assert got.isfinite().sum() == 2 * k.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_goes_to_its_slot_of_the_tail_page(device, layout, dtype):
    check_append(device, [0, 1, 16 * 7 + 15], 3, 16, 24, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_goes_to_the_first_page_of_a_tail(device, dtype):
    """Beside pages of stored runs; the page that its block has says only that there is one."""
    k, v = (new_token("transposed", 3, 2, 24, dtype) for _ in range(2))
    lengths = torch.tensor([0, 5, 16 * 7 + 15], dtype=torch.int32)
    tail_page = torch.tensor([[4, 0], [1, 3], [2, 2]], dtype=torch.int32)
    want = torch.full((3, 2, 2, 2, 16, 24), float("nan"), dtype=dtype)
    got = want.clone().to(device)
    append_kv_reference(k, v, tail_page, lengths, want, True)
    tail_page[1, 1] = -1  # a plan that does not name the current block
    append_kv(*(t.to(device) for t in (k, v, tail_page, lengths)), got, is_tail=True)
    assert want[1, 1].isfinite().any()
    want[1, 1] = float("nan")
    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    assert want[:, :, 1].isnan().all()


def test_nothing_is_written_without_a_tail_page(device):
    """A plan that does not name the current block has no page for it."""
    k = torch.randn(3, 1, 1, 8, device=device)
    tail_page = torch.tensor([[0], [-1], [1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([3, 3, 3], dtype=torch.int32, device=device)
    pages = torch.full((3, 1, 2, 2, 16, 8), 7.0, device=device)
    append_kv(k, k, tail_page, lengths, pages)
    assert torch.equal(pages[0, 0, 0, :, 3], k[0, 0].expand(2, -1))
    assert torch.equal(pages[2, 0, 1, :, 3], k[2, 0].expand(2, -1))
    assert pages.ne(7).sum() == 4 * 8


def check_summary(device, name, lengths, num_tokens, geometry, sizes, dtype, layout="plain"):
    """Take tokens in one by one, by the kernel and by the summary itself, and compare all bytes."""
    groups, dim = sizes
    batch = len(lengths)
    want = [
        torch.full((batch, groups, *shape), float("nan"), dtype=dtype)
        for shape in summary_named(name).shapes(geometry, dim).values()
    ]
    summary_named(name).reset(want)
    for tensor in want if name == "pooled_keys" else []:
        # Where no window is complete the tensors' content is nobody's; it must stay.
        tensor.normal_()
    got = [tensor.clone().to(device) for tensor in want]
    length = torch.tensor(lengths, dtype=torch.int32)
    for _ in range(num_tokens):
        k = new_token(layout, batch, groups, dim, dtype)
        summary_named(name).extend(want, k, length, None, geometry)
        SUMMARY_KERNELS[name](k.to(device), length.to(device), got, geometry)
        length += 1
    return got, want


def assert_same_pooled(got, want, dtype):
    (pooled, recent), (want_pooled, want_recent) = got, want
    assert torch.equal(recent.cpu(), want_recent)
    # Means are summed in another order, which may round one half-precision value differently.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pooled.cpu(), want_pooled, rtol=4 * eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pool_size", "pool_stride", "lengths"),
    [(8, 4, [0, 1, 7]), (6, 3, [0, 5, 13]), (4, 4, [3, 0, 60])],
)
def test_pooled_keys_equal_the_summary_token_by_token(
    device, pool_size, pool_stride, lengths, dtype
):
    geometry = Geometry(7, 12, pool_size, pool_stride)
    got, want = check_summary(
        device, "pooled_keys", lengths, 17, geometry, (2, 12), dtype, "transposed"
    )
    assert_same_pooled(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["transposed", "gaps"])
def test_key_bounds_equal_the_summary_token_by_token(device, layout, dtype):
    geometry = Geometry(5, 12, 6, 3)
    got, want = check_summary(
        device, "key_bounds", [0, 1, 11, 40], 14, geometry, (2, 20), dtype, layout
    )
    assert torch.equal(got[0].cpu(), want[0])
    assert want[0].isinf().any()
    assert want[0].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "dim"), [(16, 64), (32, 256), (64, 96), (64, 128), (128, 256)])
def test_large_shapes(device, size, dim, dtype):
    lengths = [0, 1, size - 1, size, 200 * size + 5, 2048 * size - 1]
    check_append(device, lengths, 8, size, dim, dtype, "transposed")
    geometry = Geometry(64, size, 32, 16)
    lengths = [0, 1, 31, 50 * size - 7, 64 * size - 35]
    got, want = check_summary(
        device, "pooled_keys", lengths, 35, geometry, (3, dim), dtype, "sliced"
    )
    assert_same_pooled(got, want, dtype)
    got, want = check_summary(
        device, "key_bounds", lengths, 35, geometry, (3, dim), dtype, "sliced"
    )
    assert torch.equal(got[0].cpu(), want[0])


@pytest.mark.gpu
def test_addresses_do_not_overflow():
    size, dim, num_pages = 128, 256, 33000
    assert num_pages * 2 * size * dim > 2**31
    pages = torch.zeros(2, 1, num_pages, 2, size, dim, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 2, 1, 1, dim, device="cuda").to(torch.bfloat16)
    tail_page = torch.full((2, 1), num_pages - 1, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([5, 200], dtype=torch.int32, device="cuda")
    append_kv(k, v, tail_page, lengths, pages)
    for row, slot in ((0, 5), (1, 72)):
        assert torch.equal(pages[row, 0, -1, 0, slot], k[row, 0, 0])
        assert torch.equal(pages[row, 0, -1, 1, slot], v[row, 0, 0])
    assert pages.count_nonzero() == 4 * dim
