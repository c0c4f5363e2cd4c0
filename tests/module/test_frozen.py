"""A frozen module is used as it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sparda_compile.errors import BypassError, UnsupportedInputError
from sparda_compile.module.frozen import FrozenModule


class Small(FrozenModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.train(), "cannot be trained"),
        (lambda m: m.half(), "cannot be moved or cast"),
        (lambda m: m.to(torch.float64), "cannot be moved or cast"),
        (lambda m: m.to("meta"), "cannot be moved or cast"),
        (lambda m: m.to("cpu:1"), "cannot be moved or cast.* made for cpu"),
        (copy.deepcopy, "cannot be pickled or deep-copied"),
        (pickle.dumps, "cannot be pickled or deep-copied"),
    ],
)
def test_what_would_change_it_is_refused(change, words):
    with pytest.raises(UnsupportedInputError, match=words):
        change(Small())


def test_what_changes_nothing_is_not():
    module = Small()
    assert module.eval() is module
    assert module.train(False) is module
    assert module.to("cpu") is module
    assert module.to("cpu:0") is module
    assert module.to(torch.float32) is module
    with pytest.raises(BypassError, match="has no compile"):
        module.compile()
