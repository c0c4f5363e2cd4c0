from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.forecast.weights import ForecastInfo
from sparda_compile.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    random_states,
    restore_random_states,
)

INFO = ForecastInfo(
    model="M", layers=(0,), groups=(2,), head_dim=(8,), hidden=(4,), ranks=(None,),
    block_size=16, pool_size=8, pool_stride=4, top_k=2, steps=3, num_tokens=64,
    versions={"torch": "2"},
)  # fmt: skip


def make():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    rng = random_states(torch.device("cpu"))
    return Checkpoint(3, 12, {"0": weight.detach()}, optimizer.state_dict(), rng, INFO)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "deep" / "run.checkpoint"
    checkpoint = make()
    checkpoint.save(path)
    loaded = Checkpoint.load(path)
    assert (loaded.step, loaded.num_batches, loaded.info) == (3, 12, INFO)
    assert torch.equal(loaded.weights["0"], checkpoint.weights["0"])
    moments = [c.optimizer["state"][0]["exp_avg"] for c in (loaded, checkpoint)]
    assert torch.equal(*moments)
    assert [p.name for p in path.parent.iterdir()] == ["run.checkpoint"]


def test_random_numbers_go_on_where_they_were():
    states = random_states(torch.device("cpu"))
    first = torch.rand(4)
    restore_random_states(states, torch.device("cpu"))
    assert torch.equal(torch.rand(4), first)


def test_it_is_kept_beside_the_output(tmp_path):
    assert checkpoint_path(tmp_path / "a.safetensors") == tmp_path / "a.safetensors.checkpoint"


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"none.checkpoint.*no file.*leave resume out"):
        Checkpoint.load(tmp_path / "none.checkpoint")
    noise = tmp_path / "noise.checkpoint"
    noise.write_bytes(b"noise")
    other = tmp_path / "other.checkpoint"
    torch.save({"kind": "cake"}, other)
    for path in (noise, other):
        with pytest.raises(ConfigError, match=rf"{path.name}.*cannot be read as a training"):
            Checkpoint.load(path)
