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


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "run.checkpoint"
    make().save(path)
    good = path.read_bytes()
    for place in [*range(0, len(good), len(good) // 200), *range(len(good) - 100, len(good))]:
        flipped = bytearray(good)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ConfigError, match=r"run.checkpoint.*checksum"):
            Checkpoint.load(path)
    for damaged in (good[:-1], good[: len(good) // 2], good + b"x", b""):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"run.checkpoint.*checksum"):
            Checkpoint.load(path)
    path.write_bytes(good)
    assert Checkpoint.load(path).step == 3


def test_what_torch_wrote_without_a_checksum_is_refused(tmp_path):
    path = tmp_path / "run.checkpoint"
    make().save(path)
    loaded = torch.load(path, weights_only=True)
    torch.save(loaded, path)
    with pytest.raises(ConfigError, match="no checksum"):
        Checkpoint.load(path)


def broken(name, value):
    checkpoint = make()
    object.__setattr__(checkpoint, name, value)
    return checkpoint


LOOP = {}
LOOP["state"] = LOOP


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("step", -5, "step is -5, less than 0"),
        ("step", "3", "step is str, not a whole number"),
        ("num_batches", 1, "num_batches is 1, less than 3"),
        ("weights", {"0": torch.full((3, 2), float("nan"))}, "NaN"),
        ("weights", {"0": torch.ones(1)}, r"exp_avg has shape \(3, 2\), not \(1,\)"),
        ("weights", LOOP, "weights.*is dict"),
        ("optimizer", LOOP, "optimizer has"),
        ("optimizer", {"state": LOOP, "param_groups": []}, "param_groups"),
        ("rng", {"cpu": torch.zeros(3)}, "rng.cpu"),
    ],
)
def test_damaged_fields_are_named_though_the_checksum_is_right(tmp_path, name, value, words):
    path = tmp_path / "run.checkpoint"
    broken(name, value).save(path)
    with pytest.raises(ConfigError, match=rf"run.checkpoint.*{words}"):
        Checkpoint.load(path)


def test_fields_missing_or_unknown_are_named(tmp_path, monkeypatch):
    from sparda_compile.training import checkpoint

    path = tmp_path / "run.checkpoint"
    monkeypatch.setattr(checkpoint, "_FIELDS", checkpoint._FIELDS[:-1])
    make().save(path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"fields \['rng'\] are missing"):
        Checkpoint.load(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.checkpoint"
    make().save(path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make().save(path)
    monkeypatch.undo()
    assert Checkpoint.load(path).step == 3
    assert list(tmp_path.iterdir()) == [path]
