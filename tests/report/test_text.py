"""Sizes, tables, and the sentence that says from which length on blocks are left out."""

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.report.text import (
    columns,
    format_bytes,
    html_table,
    selection_sentence,
    speculation_sentence,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_columns_are_as_wide_as_their_cells():
    text = columns(("n", "name"), [("12345", "[red]x"), ("1", "")], text=1)
    assert text.split("\n") == ["    n  name", "12345  [red]x", "    1"]


def test_html_table_escapes():
    text = html_table("<a>", ("<b>",), [("<c>",)])
    assert text == (
        "<p>&lt;a&gt;</p><table><thead><tr><th>&lt;b&gt;</th></tr></thead>"
        "<tbody><tr><td>&lt;c&gt;</td></tr></tbody></table>"
    )


def test_default_configuration_selects_from_6145_tokens_on():
    assert selection_sentence(SpardaConfig()) == (
        "Selection begins at 6,145 tokens: a step reads all blocks of a sequence up to 6,144 "
        "(1 + 32 + 1 + 62 blocks of 64)."
    )


@pytest.mark.parametrize(("max_tokens", "is_short"), [(6144, True), (6208, False)])
def test_cache_that_ends_before_selection_begins_says_so(max_tokens, is_short):
    text = selection_sentence(SpardaConfig(), max_tokens)
    assert text.endswith("so nothing is selected.") == is_short
    assert (f"At most {max_tokens:,} are held here" in text) == is_short


def test_who_selects_for_prompts_is_named_where_it_is_another():
    def last(**settings):
        return selection_sentence(SpardaConfig(**settings)).split(". ")[-1]

    named = "Tokens of a sparse prompt select by infllm2, whose summary is kept beside."
    other = {"selector": "lowbit2", "prefill_selector": "infllm2"}
    assert last(**other) == named
    by_query = {"mode": "query", "selector": "lowbit2", "prefill_candidates": 2.0}
    assert last(**by_query).startswith("They score the keys of 34 + 124 blocks, which a look")
    assert last(**by_query, prefill="dense").startswith("Selection begins")
    for settings in ({**other, "prefill": "dense"}, {"prefill_selector": "infllm2"}):
        assert last(**settings).startswith("Selection begins")


@pytest.mark.parametrize(
    ("config", "why"),
    [(SpardaConfig(mode="dense"), "mode dense"), (SpardaConfig(top_k=None), "top_k=None")],
)
def test_what_never_selects_says_so(config, why):
    assert config.selection_starts_at is None
    assert selection_sentence(config) == f"Nothing is selected: {why} reads all blocks."


@pytest.mark.parametrize(
    ("speculated", "left", "text"),
    [
        (3, 0, "Layers that attend to up to 127 predicted blocks while they select: 3."),
        (
            1,
            2,
            "Layers that attend to up to 127 predicted blocks while they select: 1. "
            "2 would gain nothing on h200, and do not.",
        ),
        (0, 3, "Nothing is predicted: on h200 no layer is expected to gain by it."),
    ],
)
def test_which_layers_speculate(speculated, left, text):
    assert speculation_sentence(speculated, left, 127, "h200") == text
