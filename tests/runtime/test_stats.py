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
    layer = {"hits": 3, "misses": 1, "h2d_bytes": 30, "d2h_bytes": 40}
    assert json.loads(json.dumps(stats.to_dict())) == {"layers": {"7": layer}, "total": layer}
    assert str(stats) == "3 hits, 1 misses (75.0% hits), 30 bytes H2D, 40 bytes D2H"
