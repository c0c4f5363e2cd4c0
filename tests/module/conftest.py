"""A tiny model, and one with a linear that has a switch, as adapters have them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from sparda_compile.testing import tiny_llama


class Adapter(nn.Module):
    """A linear with a switch, as adapters have them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.ModuleDict({"one": nn.Linear(2, base.out_features, bias=False)})
        self._active = ["one"]
        self.scales = {"one": 2.0}
        self.settings = SimpleNamespace(is_off=False, note="")

    @property
    def active(self):
        return self._active

    def forward(self, x):
        out = self.base(x)
        if self.settings.is_off:
            return out
        for name in self.active:
            out = out + self.up[name](self.down(x)) * self.scales[name]
        return out


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=2)


@pytest.fixture
def adapted(model):
    model.lm_head = Adapter(model.lm_head)
    return model.eval()
