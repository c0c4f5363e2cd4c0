from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.ranks.agreement import Ranks, ranks_of
from sparda_compile.ranks.shards import (
    check_heads,
    is_sharded,
    local_names,
    local_of,
    mesh_of,
    meshes_in,
    shard_range,
    splits_heads,
)


def sharded(mesh, rows=6, placement=None):
    weight = torch.arange(rows * 2.0).view(rows, 2)
    return distribute_tensor(weight, mesh, [placement or Shard(0)], src_data_rank=None)


class Keys(nn.Module):
    def __init__(self, weight, heads=4, kv=2, queries=None, style="colwise"):
        super().__init__()
        self.tp_plan = {"k_proj": style, "q_proj": "colwise"}
        if queries is not None:
            self.q_proj = nn.Linear(2, 6, bias=False)
            self.q_proj.weight = nn.Parameter(queries)
        self.k_proj = nn.Linear(2, 6, bias=False)
        self.k_proj.weight = nn.Parameter(weight)
        config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv)
        self.config = SimpleNamespace(get_text_config=lambda: config)


def test_local_part_is_that_of_this_rank(mesh):
    weight = sharded(mesh)
    assert is_sharded(weight)
    assert local_of(weight)[:, 0].tolist() == [6.0, 8.0, 10.0]
    plain = torch.ones(2)
    assert not is_sharded(plain)
    assert local_of(plain) is plain


@pytest.mark.parametrize(("rows", "wanted"), [(6, (3, 3)), (5, (3, 2)), (1, (1, 0))])
def test_range_is_as_dtensor_shards_also_what_ranks_cannot_divide(mesh, rows, wanted):
    weight = sharded(mesh, rows)
    assert shard_range(weight, 0) == wanted
    assert local_of(weight)[:, 0].tolist() == [2.0 * i for i in range(rows)][wanted[0] :]


def test_names_are_those_of_parameters_that_are_sharded(mesh):
    model = Keys(sharded(mesh))
    model.bias = nn.Parameter(torch.ones(1))
    assert local_names(model) == {id(local_of(model.k_proj.weight)): "k_proj.weight"}


def test_mesh_of_a_model_gives_its_ranks(mesh):
    model = Keys(sharded(mesh))
    assert mesh_of(model) is not None
    assert ranks_of(model) == Ranks(2, 1, mesh.get_group().group_name)
    assert mesh_of(nn.Linear(2, 2)) is None


def test_meshes_of_modules_are_found(mesh):
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].mesh = mesh
    assert meshes_in(model) == [mesh]


def test_more_than_one_dimension_is_refused(mesh):
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "tp"))
    weight = DTensor.from_local(torch.ones(3, 2), grid, [Shard(0), Replicate()], run_check=False)
    with pytest.raises(UnsupportedInputError, match=r"Keys is distributed by more than tensor"):
        mesh_of(Keys(weight))
    model = Keys(sharded(mesh))
    model._device_mesh = grid
    with pytest.raises(UnsupportedInputError, match=r"\(fsdp=2\)"):
        mesh_of(model)


@pytest.mark.parametrize(("heads", "kv", "allowed"), [(6, 3, "1, 3"), (5, 2, "1"), (3, 3, "1, 3")])
def test_heads_that_ranks_cannot_share_are_refused_with_numbers(mesh, heads, kv, allowed):
    words = f"has {heads} query heads and {kv} KV heads, .* 2 ranks .* use {allowed} ranks"
    with pytest.raises(UnsupportedInputError, match=words):
        check_heads(Keys(sharded(mesh), heads, kv), 2)


def test_the_reason_why_heads_are_not_replicated_is_said(mesh):
    with pytest.raises(UnsupportedInputError, match=r"k_proj and v_proj into 2 parts, 1.5 heads"):
        check_heads(Keys(sharded(mesh), 6, 3), 2)


@pytest.mark.parametrize("style", ["colwise_gather_output", "colwise_rep"])
def test_heads_that_a_plan_gathers_are_on_every_rank(mesh, style):
    gathered = Keys(sharded(mesh), 3, 3, style=style)
    assert splits_heads(Keys(sharded(mesh)))
    assert not splits_heads(gathered)
    check_heads(gathered, 2)


@pytest.mark.parametrize("placement", [Replicate(), None])
def test_queries_that_are_split_beside_whole_keys_are_refused(mesh, placement):
    style = "colwise" if placement else "colwise_gather_output"
    model = Keys(sharded(mesh, placement=placement), 4, 2, sharded(mesh), style)
    with pytest.raises(UnsupportedInputError, match=r"leaves every rank all .* tp_plan='auto'"):
        check_heads(model, 2)


def test_heads_that_ranks_share_or_all_have_pass(mesh):
    check_heads(Keys(sharded(mesh)), 2)
    check_heads(Keys(sharded(mesh, placement=Replicate()), 3, 3), 2)
    check_heads(Keys(torch.ones(6, 2), 3, 3), 1)
