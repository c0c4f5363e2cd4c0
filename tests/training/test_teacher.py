from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.training import teacher
from sparda_compile.training.teacher import (
    aligned_teacher,
    fine_keys,
    num_windows,
    plain_teacher,
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
