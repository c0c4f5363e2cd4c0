from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.pooled_keys import windows_to_blocks
from sparda_compile.training import teacher
from sparda_compile.training.loss import pool_keys
from sparda_compile.training.teacher import (
    aligned_teacher,
    fine_keys,
    num_windows,
    plain_teacher,
    query_teacher,
    query_weights,
    scores,
    visible_windows,
)


def draw(tokens=67, heads=4, groups=2, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, heads, tokens, dim, generator=generator).to(dtype)
    return query, torch.randn(2, groups, tokens, dim, generator=generator).to(dtype)


def test_fine_keys_are_means_of_neighbours():
    _, key = draw()
    torch.testing.assert_close(fine_keys(key), (key[:, :, 1:] + key[:, :, :-1]) / 2)


def test_cells_are_maxima_over_a_stride_and_the_key_before():
    query, key = draw()
    cells = aligned_teacher(query, fine_keys(key), range(67), (8, 4), 0.5)
    logits = query @ fine_keys(key).repeat_interleave(2, 1).transpose(-1, -2) * 0.5
    hidden = torch.arange(66) > torch.arange(67)[:, None]
    mass = logits.masked_fill(hidden, float("-inf")).softmax(-1).unflatten(1, (2, 2)).sum(2)
    assert cells.shape == (2, 2, 67, num_windows(67, 8, 4))
    for c in range(cells.shape[-1]):
        span = mass[..., max(4 * c - 1, 0) : 4 * c + 4]
        torch.testing.assert_close(cells[..., c], span.amax(-1))


def test_each_head_has_mass_one_on_windows_of_one_key():
    query, key = draw()
    cells = aligned_teacher(query, fine_keys(key), range(60, 66), (1, 1), 0.5)
    # With stride 1 a cell is the larger of two neighbours, so the sum exceeds the two heads' two.
    assert (cells.sum(-1) >= 2.0 - 1e-5).all()
    assert (cells <= 2.0 + 1e-5).all()


@pytest.mark.parametrize("queries", [range(67), range(5, 23), range(66, 67)])
def test_ranges_and_tiles_do_not_matter(queries, monkeypatch):
    query, key = draw()
    whole = plain_teacher(query, fine_keys(key), range(67), (8, 4), 0.5, 0.0)
    monkeypatch.setattr(teacher, "_TILE_SCORES", 2 * 4 * 67 * 3)
    part = plain_teacher(query, fine_keys(key), queries, (8, 4), 0.5, 0.0)
    width = visible_windows(67, queries, (8, 4))
    assert part.shape[-1] == width
    rows = whole[:, :, queries.start : queries.stop]
    torch.testing.assert_close(part, rows[..., :width], rtol=1e-5, atol=1e-7)
    assert not rows[..., width:].any()


def test_soft_cap_bounds_the_scores():
    query, key = draw()
    sharp = aligned_teacher(20 * query, fine_keys(key), range(60, 67), (8, 4), 1.0)
    capped = aligned_teacher(20 * query, fine_keys(key), range(60, 67), (8, 4), 1.0, 0.5)
    # Capped scores are within one of each other, so no window has e times the average's mass.
    assert capped.max() < 2 * 2.72 / 60
    assert sharp.max() > 0.9


def test_half_precision_is_summed_in_float32():
    query, key = draw(dtype=torch.bfloat16)
    got = scores(query[:, :2], key)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, query[:, :2].float() @ key.float().transpose(-1, -2))


def test_unknown_backend_is_refused():
    query, key = draw()
    with pytest.raises(ConfigError, match=r"backend='cuda'.*auto, plain, triton"):
        aligned_teacher(query, fine_keys(key), range(3), (8, 4), 0.5, backend="cuda")


@pytest.fixture
def pooled():
    """True queries, and pooled keys of 8 tokens, 4 apart, of 67."""
    query, key = draw()
    return query, pool_keys(key, SpardaConfig(block_size=16, pool_size=8, pool_stride=4))


def test_query_teacher_gives_windows_what_the_selector_gives_their_blocks(pooled):
    query, pooled_k = pooled
    geometry = Geometry(5, 16, 8, 4)
    cells = query_teacher(query, pooled_k, range(67), (8, 4), 0.5)
    for p in (20, 39, 40, 66):
        lengths = torch.tensor([p, p], dtype=torch.int32)
        query_BH1D = query[:, :, p : p + 1]
        want = SELECTORS["infllm2"].score(query_BH1D, [pooled_k], lengths, 0.5, geometry)
        got = windows_to_blocks(cells[:, :, p : p + 1], geometry)[:, :, 0]
        torch.testing.assert_close(got[:, :, : p // 16], want[:, :, : p // 16])


def test_query_teacher_has_the_mass_of_the_heads_or_none(pooled):
    sums = query_teacher(*pooled, range(67), (8, 4), 0.5).sum(-1)
    assert not sums[:, :, :8].any()
    torch.testing.assert_close(sums[:, :, 8:], torch.full_like(sums[:, :, 8:], 2.0))


@pytest.mark.parametrize("queries", [range(67), range(5, 23), range(66, 67)])
def test_ranges_and_tiles_of_the_query_teacher_do_not_matter(pooled, queries, monkeypatch):
    query, pooled_k = pooled
    whole = query_weights(query, pooled_k, torch.arange(67), (8, 4), 0.5)
    monkeypatch.setattr(teacher, "_TILE_SCORES", 2 * 4 * 15 * 3)
    part = query_teacher(query, pooled_k, queries, (8, 4), 0.5)
    width = visible_windows(67, queries, (8, 4))
    assert part.shape[-1] == width
    rows = whole[:, :, queries.start : queries.stop]
    torch.testing.assert_close(part, rows[..., :width], rtol=1e-5, atol=1e-7)
    assert not rows[..., width:].any()
