from __future__ import annotations

import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sparda_compile.module.read_names import ReadNames
from sparda_compile.module.watch import Watch, plain_objects


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.register_buffer("table", torch.arange(4.0))
        self.settings = types.SimpleNamespace(scale=2.0, unread=1, inside={"scale": [1]})
        self.scale = 1.0

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.inner(x) * self.scale * self.settings.scale + self.settings.inside["scale"][0]


def watched():
    model = Model()
    code = ReadNames(dict.fromkeys(map(type, model.modules())))
    return model, Watch(model, code, {id(p) for p in model.parameters()})


CHANGES = {
    "scale": lambda m: setattr(m, "scale", 3.0),
    "setting": lambda m: setattr(m.settings, "scale", 3.0),
    "inside a setting": lambda m: m.settings.inside["scale"].append(2),
    "buffer": lambda m: m.table.add_(1),
    "weight": lambda m: setattr(m.inner, "weight", nn.Parameter(torch.ones(3, 2))),
    "weight's memory": lambda m: setattr(m.inner.weight, "data", torch.ones(3, 2)),
    "bias gone": lambda m: setattr(m.inner, "bias", None),
    "hook": lambda m: m.inner.register_forward_pre_hook(lambda *_: None),
    "layer": lambda m: m.layers.append(nn.Linear(2, 2)),
    "class": lambda m: setattr(m.inner, "__class__", nn.Bilinear),
    "training": lambda m: m.inner.eval(),
    "forward": lambda m: setattr(m.inner, "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    model, watch = watched()
    assert watch.is_same()
    change(model)
    assert not watch.is_same()


def test_what_the_forward_does_not_read_is_not():
    model, watch = watched()
    model.settings.unread = 2
    with torch.no_grad():
        model.inner.weight.mul_(2)
    model(torch.ones(1, 2))
    assert watch.is_same()
    assert watch.is_in_place()


def test_hooks_alone():
    model, watch = watched()
    model.scale = 3.0
    assert watch.has_same_hooks()
    handle = model.inner.register_forward_hook(lambda *_: None)
    assert not watch.has_same_hooks()
    handle.remove()
    assert watch.has_same_hooks()


def test_a_table_in_the_place_of_another():
    model, watch = watched()
    hooks = OrderedDict({0: lambda *_: None})
    object.__setattr__(model.inner, "_forward_hooks", hooks)
    assert not watch.is_in_place()


def test_plain_objects_are_found_once():
    model = Model()
    model.scale = model.settings
    code = ReadNames([Model])
    assert list(plain_objects(model, code)) == [model.settings]
