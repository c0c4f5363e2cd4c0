from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from sparda_compile.bench.rank_model import build_sharded_model
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.ranks.shards import is_sharded, local_of


@pytest.fixture
def parts():
    """The parts of a tiny model of two ranks, made one after the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for rank in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            cpu = torch.device("cpu")
            found.append(build_sharded_model(SHAPES["tiny"], cpu, torch.bfloat16, 2))
        finally:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()
    return [dict(model.named_parameters()) for model in found]


def test_what_is_sharded_differs_and_the_rest_is_the_same(parts):
    first, second = parts
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert weight.dtype == torch.bfloat16
        mine, its = local_of(weight), local_of(second[name])
        assert torch.equal(mine, its) == (not is_sharded(weight)), name
    assert is_sharded(first["lm_head.weight"])
    assert not is_sharded(first["model.norm.weight"])


def test_parts_have_the_sizes_of_their_heads(parts):
    query = parts[0]["model.layers.0.self_attn.q_proj.weight"]
    assert query.shape == (4 * 16, 64)
    assert local_of(query).shape == (2 * 16, 64)
    assert float(local_of(query).float().std()) == pytest.approx(0.02, rel=0.1)
