from __future__ import annotations

import itertools

import pytest
import torch

from sparda_compile.kernels.gpu import attend_hopper, token_blocks
from sparda_compile.kernels.gpu import attend_tokens as kernels
from sparda_compile.kernels.gpu.launch import power_of_two

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("room", [16, 128])
def test_each_half_lists_what_it_reads_and_leaves_out_no_long_run(device, room, share):
    """Else a half and its copies could wait for each other."""
    tokens, most = 128 // room, 300
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([[0, 1, 2], [7, 171, most]], dtype=torch.int32)
    bits = torch.rand(2, 3, most, tokens, generator=generator) < share
    words = (bits.long() << torch.arange(tokens)).sum(-1).int()[..., None].contiguous()
    entries = torch.full((2, 3, 2, most), -1, dtype=torch.int32, device=device)
    own = torch.empty(2, 3, 2, dtype=torch.int32, device=device)
    attend_hopper.list_entries(words.to(device), counts.to(device), entries, own, room)
    for pair, tile, half in itertools.product(range(2), range(3), range(2)):
        count = int(counts[pair, tile])
        listed = entries[pair, tile, half, : int(own[pair, tile, half])].tolist()
        mine = slice(half * 64 // room, (half + 1) * 64 // room) if room <= 64 else slice(None)
        read = torch.where(bits[pair, tile, :count, mine].any(-1))[0].tolist()
        assert set(read) <= set(listed)
        assert listed == sorted(set(listed))
        steps = [after - before for before, after in itertools.pairwise([-1, *listed, count])]
        assert max(steps) <= 5


def test_what_is_covered():
    def covers(heads, groups, size, dim, dtype=torch.bfloat16):
        query = torch.empty(1, heads, 1, dim, dtype=dtype)
        return attend_hopper.covers(query, torch.empty(1, groups, 1, 2, size, dim, dtype=dtype))

    assert covers(32, 2, 64, 128)
    assert covers(9, 3, 64, 64, torch.float16)  # a group of 3 takes the room of 4
    assert covers(128, 1, 64, 128)
    assert not covers(129, 1, 64, 128)
    assert not covers(4, 2, 64, 128)  # 64 tokens of a tile are more than a word has bits
    assert not covers(32, 2, 32, 128)
    assert not covers(32, 2, 64, 96)
    assert not covers(32, 2, 64, 128, torch.float32)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("repeat", "dim", "softcap", "selected"),
    [
        (3, 128, 0.0, 24), (4, 64, 30.0, 24), (7, 128, 0.0, 5), (8, 128, 0.0, 90),
        (16, 128, 0.0, 24), (16, 64, 0.0, 96), (33, 128, 0.0, 24), (128, 64, 20.0, 24),
    ],
)  # fmt: skip
def test_equals_the_other_kernel(prompt_case, repeat, dim, softcap, selected, dtype):
    """Sets that have little in common, holes, a sequence without a past and one of no token."""
    mask = [[i < 300 for i in range(300)], [i % 7 > 0 for i in range(300)], [False] * 300]
    case = prompt_case([6405, 1920, 0], mask, (2, repeat, 64, dim), selected=selected, dtype=dtype)
    new = [t.to("cuda") for t in (case.query, case.k, case.v, case.ids)]
    query, k, v, ids = new
    lengths = case.lengths.to("cuda")
    staged, paged = case.staged("cuda")

    def attended(rows):
        prompt = token_blocks.pack_prompt((k, v), case.numbered("cuda"), lengths, staged, paged)
        tokens = (rows or attend_hopper.ROWS) // power_of_two(repeat)
        tiles = -(-300 // tokens)
        union = token_blocks.unions(prompt, ids, tokens, 0, tiles)
        out = torch.full((3, 300, query.shape[1], dim), float("nan"), dtype=dtype, device="cuda")
        out = out.transpose(1, 2)
        if rows:
            kernels.attend_unions(query, prompt, union, out, 0, (0.3, softcap), rows)
        else:
            assert attend_hopper.covers(query, prompt.staging)
            attend_hopper.attend_unions(query, prompt, union, out, 0, (0.3, softcap))
        return out.float()

    want, got = attended(max(64, power_of_two(repeat))), attended(0)
    assert want.isfinite().all()
    assert (got - want).norm() < 2e-3 * want.norm()
    for _ in range(20):
        assert torch.equal(attended(0), got)
