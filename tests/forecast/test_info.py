from __future__ import annotations

import dataclasses
import json

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.forecast.info import ForecastInfo

INFO = ForecastInfo(
    model="LlamaForCausalLM", layers=(0, 1), groups=(2, 2), head_dim=(4, 4), hidden=(6, 6),
    ranks=(None, 3), block_size=64, pool_size=32, pool_stride=16, top_k=62,
    steps=2000, num_tokens=65536, versions={"torch": "2"}, selector="lowbit2",
)  # fmt: skip


def test_json_and_back():
    assert ForecastInfo.from_json(INFO.to_json()) == INFO
    assert INFO.sizes == {"block_size": 64, "pool_size": 32, "pool_stride": 16}


def test_a_description_from_before_low_bit_keys_scores_pooled_keys():
    fields = dataclasses.asdict(INFO) | {"format_version": 2}
    del fields["selector"]
    assert ForecastInfo.from_json(json.dumps(fields)) == dataclasses.replace(
        INFO, selector="infllm2"
    )


def test_only_several_heads_need_a_later_format():
    several = dataclasses.replace(INFO, heads=3)
    assert ForecastInfo.from_json(several.to_json()) == several
    assert json.loads(several.to_json())["format_version"] == 4
    assert several.settings == INFO.sizes | {"forecast_heads": 3}
    assert INFO.settings == INFO.sizes
    fields = json.loads(INFO.to_json())
    assert fields["format_version"] == 3
    assert "heads" not in fields


@pytest.mark.parametrize("heads", [0, 1.0, None])
def test_heads_are_counted(heads):
    fields = dataclasses.asdict(INFO) | {"heads": heads}
    with pytest.raises(ConfigError, match=f"heads={heads}"):
        ForecastInfo.from_json(json.dumps(fields))


def test_a_selector_is_a_name():
    fields = dataclasses.asdict(INFO) | {"selector": 3}
    with pytest.raises(ConfigError, match="selector=3"):
        ForecastInfo.from_json(json.dumps(fields))
