from __future__ import annotations

import pytest

from sparda_compile.cli.wording import in_options, option_of

OPTIONS = {"tokens", "local_blocks", "top_k", "batch", "budget", "short_list", "selector", "rank"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("short_list=23 for selector='nosa'", "--short-list 23 for --selector nosa"),
        ("lower local_blocks, or use 0.53.", "lower --local-blocks, or use 0.53."),
        ("raise max_tokens, or use top_k=62", "raise --tokens, or use --top-k 62"),
        ("lower length or batch.", "lower --tokens or --batch."),
        ("forecast_rank=0 is too small", "--rank 0 is too small"),
        ("selector='' is not known", "--selector '' is not known"),
        ("selector=('a', 'b') names 'b'", "--selector a --selector b names 'b'"),
        ("top_k=(3,) is one, use top_k=(4, 5).", "--top-k 3 is one, use --top-k 4 --top-k 5."),
        ("pool_size=('a', 'b') is two", "pool_size=('a', 'b') is two"),
        ("pool_size=3 is odd", "pool_size=3 is odd"),
        ("a lower batch of tokens/local_blocks", "a lower batch of tokens/local_blocks"),
    ],
)  # fmt: skip
def test_names_of_the_library_become_options_where_there_is_one(said, expected):
    assert in_options(said, OPTIONS) == expected


def test_the_best_of_several_options_is_taken():
    assert option_of("length", {"length", "tokens"}) == "--length"
    assert option_of("length", {"tokens"}) == "--tokens"
    assert option_of("length", {"steps"}) is None
