from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.gpu import attend_hopper, token_blocks
from sparda_compile.kernels.gpu import attend_tokens as kernels
from sparda_compile.kernels.gpu.launch import power_of_two
from sparda_compile.kernels.workspace import HALVES_ROWS, in_halves

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


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
    new = [t.to("cuda") for t in (case.query, case.k, case.v, case.ids, case.lengths)]
    query, k, v, ids, lengths = new
    query[1:, :, 294] = float("nan")  # of no token
    staged, paged = case.staged("cuda")
    prompt = token_blocks.pack_prompt((k, v), case.numbered("cuda"), lengths, staged, paged)

    def attended(rows):
        tokens = (rows or HALVES_ROWS) // power_of_two(repeat)
        tiles = -(-300 // tokens)
        out = torch.full((3, 300, query.shape[1], dim), float("nan"), dtype=dtype, device="cuda")
        out = out.transpose(1, 2)
        for first, end in ((0, tiles // 2), (tiles // 2, tiles)):
            union = token_blocks.unions(prompt, ids, tokens, first, end - first)
            if rows:
                kernels.attend_unions(query, prompt, union, out, first, (0.3, softcap), rows)
            else:
                assert in_halves(query, prompt.staging)
                attend_hopper.attend_unions(query, prompt, union, out, first, (0.3, softcap))
        return out.float()

    want, got = attended(max(64, power_of_two(repeat))), attended(0)
    assert want.isfinite().all()
    # Weights of a pair are rounded by another peak than those of one block.
    assert (got - want).norm() < (4e-3 if dtype == torch.bfloat16 else 5e-4) * want.norm()
    for _ in range(20):
        assert torch.equal(attended(0), got)
