"""The past in order: the same from both kinds of pages."""

import pytest
import torch
from stored_pools import BLOCKS, DIM, GROUPS, LENGTHS, SIZE, Pools

from sparda_compile.kernels.past import past_keys_values

NAMES = ("int8", "fp8", "int4")


@pytest.mark.parametrize("has_host", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_past_in_order(name, has_host):
    pools = Pools(name)
    table, host = pools.table, pools.host if has_host else torch.empty(0)
    given = (host, table, LENGTHS, name, ())
    want = past_keys_values(pools.pages, *given)
    got = past_keys_values(pools.runs, *given, pools.tail)
    known = (table[0, 0] >= 0).repeat_interleave(SIZE) if not has_host else slice(None)
    for mine, its in zip(got, want, strict=True):
        assert mine.shape == (2, GROUPS, BLOCKS * SIZE, DIM)
        assert torch.equal(mine[0][:, known], its[0][:, known])
        assert torch.equal(mine[1][:, :SIZE], its[1][:, :SIZE])
