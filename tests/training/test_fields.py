from __future__ import annotations

import copy

import pytest
import torch

from sparda_compile.errors import SpardaError
from sparda_compile.forecast.weights import ForecastInfo
from sparda_compile.training.checkpoint import Checkpoint, random_states
from sparda_compile.training.fields import check_fields, check_fits
from sparda_compile.training.trainer import ForecastTrainer

NAN = float("nan")
LOOP = {}
LOOP["self"] = LOOP
WRONG = [None, "3", 2.0, True, -5, 1 << 70, [], {}, LOOP, torch.tensor(3)]
NO_TENSORS = [None, 1.0, "x", [], {}, LOOP]


@pytest.fixture(scope="module")
def good(gym):
    from sparda_compile.training import trainer

    patch = pytest.MonkeyPatch()
    patch.setattr(trainer, "captures_of", lambda model: gym.captures)
    made = ForecastTrainer(gym.model, gym.config, 3e-3)
    for ids in gym.batches(2):
        made.step([ids])
    patch.undo()
    return made.checkpoint(2)


def paths(value, path=()):
    """Yield the path of each part of nested dictionaries and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list | tuple) else items
    for key, part in items:
        yield from paths(part, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def damages(value):
    """Yield damaged values that have to be told from a right one."""
    if isinstance(value, torch.Tensor):
        yield from NO_TENSORS
        yield from (value.double(), value.to(torch.int64), value.bool(), value.to_sparse())
        yield from (value[None], value.expand(2, *value.shape), torch.ones(0, dtype=value.dtype))
        if value.dim():
            yield from (value.flatten()[:1], value[:1] if len(value) > 1 else value[:0])
        if value.is_floating_point():
            for bad in (NAN, float("inf")):
                damaged = value.clone()
                damaged.view(-1)[-1] = bad
                yield damaged
    elif isinstance(value, bool):
        yield from ("no", [], {}, not value)
    elif isinstance(value, int | float):
        yield from (each for each in WRONG if each is not True or value != 1)
        yield from (NAN, float("inf"))
    elif isinstance(value, dict):
        yield from (None, [], 3, {**value, "more": 1}, LOOP)
        for key in value:
            yield {name: part for name, part in value.items() if name != key}
    else:
        yield from (None, 3, "x", [*value, 1] if isinstance(value, list | tuple) else [])


def replaced(fields, path, value):
    """Return a copy of fields with another value at a path."""
    if not path:
        return value
    made = copy.copy(fields) if isinstance(fields, dict) else list(fields)
    made[path[0]] = replaced(fields[path[0]], path[1:], value)
    return tuple(made) if isinstance(fields, tuple) else made


# What a group cannot do without; the other names differ between versions of torch.
NEEDED = {"params", "lr", "betas", "eps", "weight_decay"}
# Settings of AdamW that choose how it computes, not what; a run takes its own.
FREE = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "lr"}


def test_a_good_one_passes(good, gym):
    fields = {name: getattr(good, name) for name in FIELDS}
    check_fields(info=good.info, **fields)
    check_fits(good, good.info, good.weights, good.optimizer)


FIELDS = ("step", "num_batches", "weights", "optimizer", "rng")


@pytest.mark.parametrize("field", FIELDS)
def test_every_damage_to_every_part_is_refused(good, field):
    """Each part of each field, at any depth, in each way; the file's checksum is right."""
    fields = {name: getattr(good, name) for name in FIELDS}
    tried = 0
    for path in paths(fields[field]):
        if FREE & {key for key in path if isinstance(key, str)}:
            continue
        for value in damages(at(fields[field], path)):
            if path == ("param_groups", 0) and isinstance(value, dict) and set(value) >= NEEDED:
                continue
            damaged = {**fields, field: replaced(fields[field], path, value)}
            with pytest.raises(ValueError, match=r"\w+ \w+"):  # noqa: PT012 - two checks in a row
                check_fields(info=good.info, **damaged)
                made = Checkpoint(info=good.info, **damaged)
                check_fits(made, good.info, good.weights, good.optimizer)
            tried += 1
    assert tried > 5


INFO_FIELDS = [name for name in ForecastInfo.__dataclass_fields__ if name != "format_version"]


@pytest.mark.parametrize("name", INFO_FIELDS)
@pytest.mark.parametrize("value", [None, -5, 2.5, True, [], {"a": 1}, [-1, "x"], NAN])
def test_every_damage_to_info_is_refused(good, name, value, tmp_path):
    import json

    plain = json.loads(good.info.to_json())
    with pytest.raises(ValueError):  # noqa: PT011 - any sentence of a ValueError
        ForecastInfo.from_json(json.dumps({**plain, name: value}))
    assert ForecastInfo.from_json(json.dumps(plain)) == good.info


def test_a_trainer_refuses_what_does_not_fit_it(good, gym, shared_capture):
    trainer = ForecastTrainer(gym.model, gym.config, 3e-3)
    before = {name: weight.detach().clone() for name, weight in trainer.parameters.items()}
    name = next(iter(good.weights))
    one = {**good.weights, name: torch.ones(1)}
    swapped = dict(reversed(good.weights.items()))
    for weights in (one, swapped, {}):
        made = Checkpoint(good.step, good.num_batches, weights, good.optimizer, good.rng, good.info)
        with pytest.raises(SpardaError, match="damaged"):
            trainer.restore(made)
    for key, weight in trainer.parameters.items():
        assert torch.equal(weight, before[key])
    assert trainer.steps_done == 0
    assert random_states(torch.device("cpu"))["cpu"].dtype == torch.uint8
