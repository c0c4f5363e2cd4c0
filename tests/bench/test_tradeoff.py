from __future__ import annotations

import pytest

from sparda_compile.bench.tradeoff import draw_tradeoff, join, read_result
from sparda_compile.errors import ConfigError


def decoded(kv_format, rate, top_k=None, selector=None):
    """Return a file of 128K tokens: 96 of 2,048 blocks are read, or top_k and 34."""
    own = {} if kv_format == "model" else {"kv_format": kv_format}
    own |= {} if selector is None else {"selector": selector}
    own |= {} if top_k is None else {"top_k": top_k}
    by_overlap = {"0.7": {"tokens_per_s": rate}, "0.9": {"tokens_per_s": 2 * rate}}
    results = [{"batch_size": 16, "by_overlap": by_overlap}]
    return {"name": "decode", "max_tokens": 131_072, **own, "results": results}


def row(kv_format, budget, perplexity, selector="infllm2", **changes):
    found = {
        "task": "perplexity", "mode": "query", "kv_format": kv_format, "selector": selector,
        "budget": budget, "perplexity": {"value": perplexity}, "ratio": {"value": 1.1},
        "kl": {"value": 0.01},
    }  # fmt: skip
    return found | changes


TEXT = {
    "rows": [
        row("model", 0.1, 10.0),
        row("int4", 0.1, 10.2),
        row("int4", 0.25, 9.8),
        row("model", 0.1, 9.9, selector="lowbit4"),
        row("model", 1.0, 9.0, mode="dense"),
        row("model", 0.1, 1.0, task="needle"),
    ]
}


def test_points_are_what_both_have():
    speeds = [decoded("model", 100.0, 171), decoded("int4", 300.0, 171), decoded("int4", 200.0)]
    speeds.append(decoded("model", 90.0, 171, "lowbit4"))
    points = join(speeds, TEXT, 16, 0.7)
    found = [(p.selector, p.kv_format, p.read, p.tokens_per_s, p.perplexity) for p in points]
    assert found == [
        ("infllm2", "int4", 0.1, 300.0, 10.2),
        ("infllm2", "model", 0.1, 100.0, 10.0),
        ("lowbit4", "model", 0.1, 90.0, 9.9),
    ]
    assert [p.tokens_per_s for p in join(speeds, TEXT, 16, 0.9)] == [600.0, 200.0, 180.0]


@pytest.mark.parametrize(("batch_size", "overlap"), [(16, 0.7), (1, 0.7), (16, 0.5)])
def test_nothing_in_common_is_said(batch_size, overlap):
    there = "model by infllm2, 5%" if (batch_size, overlap) == (16, 0.7) else "nothing"
    with pytest.raises(ConfigError, match=rf"speeds are there of {there}; .*int4 by infllm2, 25%"):
        join([decoded("model", 100.0)], TEXT, batch_size, overlap)


def test_a_line_for_each_budget_and_a_name_for_each_format(tmp_path):
    speeds = [
        decoded(name, rate, k)
        for name, rate in (("model", 100.0), ("int4", 300.0))
        for k in (171, 478)
    ]
    speeds.append(decoded("model", 90.0, 171, "lowbit4"))
    path = draw_tradeoff(join(speeds, TEXT, 16, 0.7), tmp_path / "formats.svg", "16 sequences")
    drawn = path.read_text()
    for words in ("16 sequences", "infllm2, 10% of the blocks", "infllm2, 25%", "lowbit4, 10%"):
        assert f"<!-- {words}" in drawn
    assert drawn.count("<!-- int4 -->") == 2


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.json"
    for content in ("{", '{"name": "kernels"}', "[]"):
        path.write_text(content)
        with pytest.raises(ConfigError, match="no result of the kind decode"):
            read_result(path, "decode")
    with pytest.raises(ConfigError, match="no result"):
        read_result(tmp_path / "none.json", "decode")
