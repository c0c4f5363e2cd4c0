from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from sparda_compile.module.description import (
    ABSENT,
    Copied,
    Held,
    Shared,
    describe,
    frozen,
    hooks_of,
    is_container,
    is_plain_object,
)
from sparda_compile.module.read_names import ReadNames


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("table", torch.arange(4.0))
        self.scale, self.unread = 2.0, 5

    def forward(self, x):
        return self.inner(x) * self.scale + self.table.sum()


@pytest.fixture
def model():
    return Model()


def described(model, keep=False):
    code = ReadNames(dict.fromkeys(map(type, model.modules())))
    return describe(model, code, {id(p) for p in model.parameters()}, keep=keep)


CHANGES = {
    "scale": lambda m: setattr(m, "scale", 3.0),
    "buffer": lambda m: m.table.add_(1),
    "buffer by data": lambda m: m.table.data.add_(1),
    "weight": lambda m: setattr(m.inner, "weight", nn.Parameter(m.inner.weight.detach().clone())),
    "weight's memory": lambda m: setattr(m.inner.weight, "data", m.inner.weight.data.clone()),
    "hook": lambda m: m.inner.register_forward_hook(lambda *_: None),
    "submodule": lambda m: setattr(m, "inner", nn.Linear(2, 3)),
    "training": lambda m: m.inner.eval(),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_forward_can_tell_differs(model, change):
    before = described(model, keep=True)
    assert described(model) == before
    change(model)
    assert described(model) != before


SAME = {
    "unread": lambda m: setattr(m, "unread", 6),
    "values of a weight": lambda m: m.inner.weight.data.mul_(2),
    "gradient": lambda m: setattr(m.inner.weight, "grad", torch.ones(3, 2)),
    "put back": lambda m: (m.table.add_(1), m.table.sub_(1)),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_it_cannot_tell_does_not(model, change):
    before = described(model, keep=True)
    change(model)
    assert described(model) == before


def test_values_are_frozen_as_they_are_now():
    code = ReadNames([Model])
    value = {"scale": [1, {"a": {2}}]}
    kept = frozen(value, code, {})
    value["scale"][1]["a"].add(3)
    assert kept == {"scale": [1, {"a": frozenset({2})}]}
    loop = []
    loop.append(loop)
    with pytest.raises(RecursionError):
        frozen(loop, code, {})
    again = {}
    again["again"] = again
    assert frozen(again, code, {})["again"] is not again


def test_kinds_of_sameness():
    tensor = torch.ones(3)
    assert Held(tensor) == Held(tensor) != Held(tensor.clone())
    assert Shared(tensor) == Shared(tensor) != Shared(tensor[:2])
    assert Copied(tensor, keep=True) == Copied(tensor.clone(), keep=False)
    assert Copied(tensor, keep=True) != Copied(tensor.double(), keep=False)
    assert repr(ABSENT) == "absent"


def test_plain_objects_and_containers():
    @dataclasses.dataclass
    class Config:
        a: int = 1

    assert is_plain_object(Config())
    assert not any(map(is_plain_object, (Model(), torch.ones(1), len, 3, object())))
    assert is_container(nn.ModuleList())
    assert not is_container(nn.Linear(1, 1))


def test_hooks_that_only_look_are_no_hooks():
    def make_inputs_require_grads(*args):
        return None

    def changes(*args):
        return None

    assert hooks_of({1: make_inputs_require_grads}) == []
    assert hooks_of({1: changes}) == [Held(changes)]
