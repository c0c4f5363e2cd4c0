"""What tests of a prompt's selection have in common."""

from __future__ import annotations

import torch


def first(count, width):
    """Return a row of a mask: the first `count` of `width` columns are tokens."""
    return [i < count for i in range(width)]


def check_picks(got, want, mask, least_equal):
    """Compare ids [B, G, T, K] with those of the reference; hidden columns have none.

    At least so many of all ids are the same; with 1.0 so is their order.
    """
    assert torch.equal(got, want) or least_equal < 1
    assert (got[..., None] == want[..., None, :]).any(-1).float().mean() >= least_equal
    assert torch.equal(got >= 0, want >= 0)
    assert got[~mask[:, None].expand(got.shape[:3])].eq(-1).all()
