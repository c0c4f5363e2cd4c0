"""What a run on fake tensors notes, and what it remembers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparda_compile.capture.tracing import record
from sparda_compile.errors import CaptureError


class Small(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.body = body

    def forward(self, x):
        return self.body(self.inner(x))


def calls(body, shape=(2, 4)):
    model = Small(body).eval()

    def inputs(mode):
        with mode:
            return [torch.empty(shape)]

    return record(lambda x: model(x), model, inputs).calls


def names(body):
    return [call.function.__name__ for call in calls(body)]


def test_every_torch_call_is_noted_with_its_module_and_line():
    linear, relu, add = calls(lambda x: torch.relu(x) + 1)
    assert (linear.path, linear.module) == ("inner", nn.Linear)
    assert (relu.path, relu.module) == ("", Small)
    assert "test_tracing.py" in relu.where
    assert tuple(add.result.shape) == (2, 4)


def test_what_gives_back_its_input_is_no_call():
    assert names(lambda x: x.to(torch.float32).contiguous()) == ["linear"]


def test_views_and_choices_are_calls():
    assert names(lambda x: x.T[0].unsqueeze(0)) == ["linear", "__get__", "__getitem__", "unsqueeze"]


def test_changes_in_place_are_marked():
    found = calls(lambda x: x.add_(1).mul(2))
    assert [call.changes for call in found] == [False, True, False]


def test_results_of_torchs_own_tuples_keep_their_names():
    _, top, _ = calls(lambda x: torch.topk(x, 2).values + 1)
    assert tuple(top.result.indices.shape) == (2, 2)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda x: x if x.sum() > 0 else -x, "needs the values of a tensor"),
        (lambda x: x * x.sum().item(), "needs the values of a tensor"),
        (lambda x: x[x > 0], "needs the values of a tensor"),
        (lambda x: torch.func.vmap(torch.sin)(x), "torch.func"),
        (lambda x: x / 0 if 1 // 0 else x, "division"),
    ],
)
def test_what_has_no_graph_is_refused(body, words):
    with pytest.raises(CaptureError, match=f"Small: cannot trace forward as one graph: .*{words}"):
        calls(body)


def test_autocast_is_refused():
    def body(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x.T

    with pytest.raises(CaptureError, match=r"torch\.autocast"):
        calls(body)


def test_a_flag_of_the_module_is_put_back():
    model = Small(lambda x: x)
    model.forward = lambda x: setattr(model, "seen", True) or model.inner(x)

    def inputs(mode):
        with mode:
            return [torch.empty(2, 4)]

    with pytest.raises(CaptureError, match="changes seen of its module"):
        record(lambda x: model(x), model, inputs)
    assert "seen" not in vars(model)


def test_the_compiling_flag_is_put_back():
    calls(lambda x: x)
    assert not torch.compiler.is_compiling()


def test_hooks_are_taken_off_again():
    model = Small(lambda x: x)

    def inputs(mode):
        with mode:
            return [torch.empty(2, 4)]

    record(lambda x: model(x), model, inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
