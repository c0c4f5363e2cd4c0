from __future__ import annotations

import json

from sparda_compile.runtime.stats import CacheStats, LayerStats


def test_hit_rate_is_the_share_of_selected_blocks():
    assert LayerStats(3, 1, 0, 0).hit_rate == 0.75
    assert LayerStats(0, 5, 0, 0).hit_rate == 0.0
    assert LayerStats(0, 0, 0, 0).hit_rate == 1.0


def test_total_is_the_sum_over_layers():
    stats = CacheStats({0: LayerStats(1, 2, 3, 4), 7: LayerStats(10, 20, 30, 40)})
    assert stats.total == LayerStats(11, 22, 33, 44)
    assert CacheStats({}).total == LayerStats(0, 0, 0, 0)


def test_plain_values_and_text():
    stats = CacheStats({7: LayerStats(3, 1, 30, 40)})
    layer = {
        "hits": 3, "misses": 1, "h2d_bytes": 30, "d2h_bytes": 40, "repaired": 0, "wasted": 0,
    }  # fmt: skip
    assert json.loads(json.dumps(stats.to_dict())) == {
        "layers": {"7": layer},
        "total": layer,
        "selection": "",
        "kv_format": {},
        "host_memory": "",
        "page_format": "model",
    }
    assert str(stats) == "3 hits, 1 misses (75.0% hits), 30 bytes H2D, 40 bytes D2H"


def test_selection_is_a_second_line():
    stats = CacheStats({7: LayerStats(3, 1, 30, 40)}, "Nothing is selected.")
    assert str(stats).split("\n")[1:] == ["Nothing is selected."]
    assert stats.to_dict()["selection"] == "Nothing is selected."


def test_formats_are_named_where_any_rounds():
    layers = {layer: LayerStats(3, 1, 30, 40) for layer in (0, 1)}
    stats = CacheStats(layers, "Nothing is selected.", formats={0: "model", 1: "int8"})
    assert str(stats).split("\n")[2:] == ["Full blocks are written in model, int8."]
    assert stats.to_dict()["kv_format"] == {"0": "model", "1": "int8"}
    assert "written in model, int8." in stats._repr_html_()
    small = CacheStats(layers, formats={0: "model", 1: "int8"}, page_format="stored")
    assert str(small).endswith("Full blocks are written in model, int8, in pages too.")
    assert small.to_dict()["page_format"] == "stored"
    plain = CacheStats(layers, formats={0: "model", 1: "model"}, page_format="stored")
    assert "written" not in str(plain)


def test_shown_at_a_prompt_it_is_short_however_deep_the_model():
    layers = {layer: LayerStats(1000 + layer, 1, 1 << 30, 40) for layer in range(200)}
    stats = CacheStats(layers, "Selection <begins>.")
    assert repr(stats) == f"<CacheStats of 200 layers: {stats}>"
    assert len(repr(stats)) < 300
    page = stats._repr_html_()
    assert page.count("<tr>") == 1 + 1 + 16
    assert "<td>200.0 GiB</td>" in page
    assert "Selection &lt;begins&gt;." in page


def test_coverage_is_of_what_was_selected_and_precision_of_what_was_predicted():
    layer = LayerStats(100, 0, 0, 0, repaired=10, wasted=30)
    assert layer.coverage == 0.9
    assert layer.precision == 0.75
    assert LayerStats(8, 0, 0, 0, repaired=8).coverage == 0.0
    assert LayerStats(8, 0, 0, 0, repaired=8).precision is None
    left = LayerStats(100, 0, 0, 0)
    assert left.coverage is left.precision is None


def test_predictions_are_shown_where_the_mode_makes_them():
    layers = {0: LayerStats(100, 0, 0, 0, repaired=10, wasted=30), 1: LayerStats(100, 0, 0, 0)}
    stats = CacheStats(layers, speculates=True)
    assert stats.predicted == layers[0]
    assert str(stats).endswith(
        ", 10 blocks repaired (90.0% predicted), 30 predicted in vain (75.0% of predictions read)"
    )
    page = stats._repr_html_()
    assert "<th>coverage</th><th>precision</th>" in page
    assert "<td>10</td><td>30</td><td>90.0%</td><td>75.0%</td>" in page
    assert page.count("<td>-</td><td>-</td><td>-</td><td>-</td>") == 1
    assert str(CacheStats({1: layers[1]}, speculates=True)).endswith(", nothing predicted")
    others = CacheStats(layers)
    assert "repaired" not in str(others) + others._repr_html_()


def test_where_cpu_memory_is_stands_below_the_counts():
    stats = CacheStats({}, "Selected.", host_memory="near cuda:1: on NUMA node 1")
    assert str(stats).splitlines()[1:] == [
        "Selected.", "CPU memory is near cuda:1: on NUMA node 1."
    ]  # fmt: skip
    assert stats.to_dict()["host_memory"] == "near cuda:1: on NUMA node 1"
    assert "CPU memory" not in str(CacheStats({}))
