"""State that a forward changes on its modules is put back and named."""

from __future__ import annotations

import collections
import types

import pytest
import torch
from torch import nn

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.module_state import ModuleState
from sparda_compile.errors import CaptureError
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)

CHANGES = {
    "a number": (0, lambda m: setattr(m, "held", m.held + 1)),
    "a flag": (False, lambda m: setattr(m, "held", True)),
    "a tuple": ((), lambda m: setattr(m, "held", (*m.held, 1))),
    "a list": ([], lambda m: m.held.append(1)),
    "a list that stays as long": ([0], lambda m: m.held.__setitem__(0, 1)),
    "a dict": ({}, lambda m: m.held.update(n=1)),
    "a counter": (collections.Counter(), lambda m: m.held.update("a")),
    "a deque": (collections.deque([1]), lambda m: m.held.rotate() or m.held.append(2)),
    "a set": (set(), lambda m: m.held.add(1)),
    "an object": (types.SimpleNamespace(n=0), lambda m: setattr(m.held, "n", 1)),
    "a tensor": (None, lambda m: setattr(m, "held", torch.ones(1))),
    "a module": (None, lambda m: m.add_module("other", nn.Identity())),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_is_named_and_put_back(kind: str) -> None:
    value, change = CHANGES[kind]
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].held = value
    before, shown = ModuleState(model), repr(value)
    change(model[0])
    assert before.restore().startswith("it changes 0.")
    assert repr(model[0].held) == shown
    assert model[0].held is value
    assert ModuleState(model).restore() == ""


def test_what_stays_is_not_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model[0].held = {"a": torch.ones(1), "b": [1]}
    before = ModuleState(model)
    model(torch.ones(2, 2))
    assert before.restore() == ""


def counting(model: nn.Module, change: object) -> nn.Module:
    mlp = model.model.layers[0].mlp
    mlp.register_buffer("count", torch.zeros(4))
    kind = type(mlp)

    class Counting(kind):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            change(self)
            return super().forward(x)

    mlp.__class__ = Counting
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.count.add_(1),
        lambda m: m.count[1:].mul_(2),
        lambda m: torch.add(m.count, 1, out=m.count),
        lambda m: m.count.__setitem__(0, 1.0),
        lambda m: torch.relu_(m.count),
    ],
)
def test_a_buffer_that_is_changed_in_place_is_refused_by_optimize(change: object) -> None:
    model = counting(tiny_llama(num_hidden_layers=1), change)
    with pytest.raises(CaptureError, match=r"changes model\.layers\.0\.mlp\.count in place"):
        optimize(model, CONFIG)


def test_a_change_of_what_was_made_before_an_attention_is_refused_by_optimize() -> None:
    model = tiny_llama(num_hidden_layers=1)
    layer = model.model.layers[0]
    kind = type(layer)

    class InPlace(kind):
        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            kwargs.pop("use_cache", None)
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            return hidden_states.add_(attended)

    layer.__class__ = InPlace
    with pytest.raises(CaptureError, match="made before an attention"):
        optimize(model, CONFIG)


@pytest.mark.parametrize(
    "act",
    [nn.SiLU(inplace=True), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)],
    ids=lambda act: type(act).__name__,
)
def test_an_activation_in_place_equals_the_original(act: nn.Module) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp.act_fn = act
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want, got = model(ids).logits, optimize(model, CONFIG)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
