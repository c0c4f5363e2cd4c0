"""The largest chunks of a prompt for which there is memory."""

from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.program.chunks import chunk_sizes, largest_chunk

CONFIG = SpardaConfig(block_size=64)


def test_sizes_are_multiples_of_8192_and_below_that_powers_of_two():
    sizes = chunk_sizes(CONFIG, 40_000)
    assert sizes == [32768, 24576, 16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64]


@pytest.mark.parametrize(("block_size", "shared"), [(48, 1), (64, 4), (128, 128)])
@pytest.mark.parametrize("num_tokens", [2, 50, 8192, 100_000])
def test_sizes_are_whole_blocks_and_whole_runs_of_tokens_that_select_together(
    block_size, shared, num_tokens
):
    config = SpardaConfig(block_size=block_size, shared_tokens=shared, prefill="sparse")
    sizes = chunk_sizes(config, num_tokens)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(size % block_size == size % shared == 0 for size in sizes)
    assert sizes[-1] == block_size
    assert all(size < num_tokens for size in sizes[:-1])


@pytest.mark.parametrize("most", [64, 100, 127, 128, 5000, 8191, 8192, 16384, 20_000, 39_999])
def test_the_largest_that_fits_is_found_with_few_questions(most):
    asked = []

    def fits(size):
        asked.append(size)
        return size <= most

    sizes = chunk_sizes(CONFIG, 40_000)
    assert largest_chunk(CONFIG, 40_000, fits) == max(size for size in sizes if size <= most)
    assert len(asked) <= 4


def test_none_fits():
    assert largest_chunk(CONFIG, 40_000, lambda size: False) is None
