from __future__ import annotations

import warnings

import pytest

from sparda_compile.demo.run import MODES, demo_text, run_demo
from sparda_compile.errors import ConfigError


@pytest.fixture(scope="module")
def result():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return run_demo(num_tokens=1500, new_tokens=4)


def test_every_mode_runs_twice_from_one_tracing(result):
    names = [(row.mode, row.must_agree) for row in result.rows]
    small = [(mode, False) for mode in MODES if mode != "dense"]
    assert set(names) == {("original", True), *((mode, True) for mode in MODES), *small}
    assert len(names) == len(set(names))
    assert result.num_captures == 2


def test_all_blocks_give_the_tokens_of_the_original(result):
    assert result.mismatches == ()
    assert all(row.agreement == 1.0 for row in result.rows if row.must_agree)


def test_small_budget_reads_and_keeps_less(result):
    for row in result.rows:
        if not row.must_agree:
            assert row.blocks < row.num_blocks
            if row.mode == "speculate":  # all blocks are on the device
                assert (row.misses, row.h2d_bytes) == (0, 0)
                assert row.device_bytes > row.full_bytes
                continue
            assert row.misses > 0
            assert row.h2d_bytes > 0
            assert 0.0 < row.hit_rate < 1.0
            assert row.device_bytes < row.full_bytes


def test_report_and_json(result):
    assert result.report.mode == "speculate"
    assert not result.report.error
    plain = result.to_dict()
    assert plain["used_fresh_forecast"]
    assert len(plain["rows"]) == len(result.rows)


def test_progress_names_each_run():
    said = []
    run_demo(modes=["dense"], num_tokens=64, new_tokens=2, progress=said.append)
    assert said == ["original model", "mode dense, all blocks"]


def test_text_is_as_long_as_asked():
    assert len(demo_text(8192)) == 8192
    assert len(demo_text(100_000)) == 100_000  # goes on into the package's source
    with pytest.raises(ConfigError, match="bytes of text"):
        demo_text(1 << 30)
