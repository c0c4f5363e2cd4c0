from __future__ import annotations

import pytest
import torch

from sparda_compile.config import SpardaConfig
from sparda_compile.selectors import SELECTORS, Geometry, summary_named
from sparda_compile.selectors.base import valid_tokens


@pytest.mark.parametrize(
    ("geometry", "num_windows"),
    [
        (Geometry(10, 64, 32, 16), 39),
        (Geometry(2, 16, 8, 4), 7),
        (Geometry(1, 16, 16, 16), 1),
        (Geometry(1, 16, 64, 16), 1),  # no window ever completes, but its tensor must exist
        (Geometry(2, 16, 32, 16), 1),
    ],
)
def test_num_windows(geometry, num_windows):
    assert geometry.num_windows == num_windows


@pytest.mark.parametrize(
    ("sizes", "num_open"),
    [((64, 32, 16), 1), ((16, 16, 16), 1), ((16, 20, 4), 1), ((16, 24, 4), 2), ((8, 64, 8), 7)],
)
def test_windows_that_reach_into_tokens_to_come_are_of_the_open_blocks(sizes, num_open):
    size, pool, stride = sizes
    geometry = Geometry(40, *sizes)
    assert geometry.num_open_blocks == num_open
    for length in range(20 * size, 22 * size):
        first = length // size
        settled = (first - num_open) * size  # where the open blocks begin
        starts = [s for s in range(0, length, stride) if s + pool > length and s < first * size]
        assert all(start >= settled for start in starts)


def test_valid_tokens_are_the_masked_in_order():
    k_GTD = torch.arange(12.0).view(2, 3, 2)
    assert valid_tokens(k_GTD, None) is k_GTD
    mask = torch.tensor([True, False, True])
    assert torch.equal(valid_tokens(k_GTD, mask), k_GTD[:, [0, 2]])
    assert valid_tokens(k_GTD, torch.zeros(3, dtype=torch.bool)).shape == (2, 0, 2)


def test_every_selector_is_registered_under_its_name_with_its_summary():
    # Others may have been added from outside.
    package = "sparda_compile.selectors."
    own = {n for n in SELECTORS.names() if type(SELECTORS[n]).__module__.startswith(package)}
    chosen = own.intersection(SELECTORS.choices())
    assert chosen == own - {SELECTORS[name].forecast_selector for name in chosen}
    assert chosen >= {"infllm2", "quest", "nosa", "lowbit2", "lowbit4"}
    for name, selector in zip(SELECTORS.names(), SELECTORS, strict=True):
        assert selector.name == name
        assert summary_named(selector.summary.name).name == selector.summary.name
    with pytest.raises(KeyError):
        summary_named("of no selector")


def test_geometry_of_a_configuration_has_a_short_list_for_nosa_alone():
    config = SpardaConfig(sink_blocks=2, local_blocks=3, short_list=4)
    assert Geometry.of(config, 10) == Geometry(10, 64, 32, 16)
    assert Geometry.of(config.replace(selector="nosa"), 10) == Geometry(10, 64, 32, 16, 4, 2, 3)
