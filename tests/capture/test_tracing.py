"""What a run on fake tensors notes, and what it remembers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparda_compile.capture.forward import _target
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
    assert [call.changed is not None for call in found] == [False, True, False]


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


@pytest.mark.parametrize(
    "body",
    [
        lambda x: F.relu(x, inplace=True) + 1,
        lambda x: nn.SiLU(inplace=True)(x) + 1,
        lambda x: torch.add(x, 1, out=torch.empty(2, 4)) + 1,
        lambda x: torch.relu_(x) + 1,
        lambda x: x[:1].add_(1) + 1,
    ],
)
def test_a_change_in_place_is_found_whatever_it_is_called(body):
    assert [call.changed is not None for call in calls(body)][-2:] == [True, False]


def test_a_change_of_a_view_is_one_of_what_it_views_however_often_it_was_seen():
    model = nn.Module()
    model.first, model.second = (nn.Parameter(torch.zeros(4)) for _ in range(2))

    def step(x):
        return x + model.first[:2].mul(2).sum() + model.second[:2].mul_(2).sum()

    with pytest.raises(CaptureError, match="changes second in place"):
        record(step, model, in_mode)


def in_mode(mode):
    with mode:
        return [torch.empty(4)]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: torch._foreach_add_([x], 1.0) or x,
        lambda x: x + F.embedding(torch.zeros(1, dtype=torch.long), x, max_norm=1.0),
    ],
)
def test_changes_beside_the_result_are_refused(body):
    with pytest.raises(CaptureError, match="beside the one that it returns"):
        calls(body)


@pytest.mark.parametrize("body", [lambda x: x**2, lambda x: x.mul(2).__ipow__(2)])
def test_powers_are_methods(body):
    found = calls(body)[-1]
    target, name, _ = _target(found.function, found.args)
    assert (target, getattr(torch.Tensor, name) is not None) == ("call_method", True)
