from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.errors import RankLostError
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.ranks import collectives
from sparda_compile.ranks.collectives import all_gather, all_reduce, group_named, lost_ranks


def test_sum_is_a_tensor_of_its_own_and_leaves_the_summand(alone):
    x = torch.arange(12.0).view(3, 4).T
    total = all_reduce(x, 1, alone)
    assert torch.equal(total, x)
    assert total.is_contiguous()
    total.zero_()
    assert x[1, 0] == 1.0, "the summand is another tensor"


def test_parts_are_gathered_along_the_first_dimension(alone):
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(all_gather(x, 1, alone), x)


@pytest.mark.parametrize("op", [all_reduce, all_gather])
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 4)])
def test_fake_results_are_as_real_ones(alone, op, shape):
    x = torch.randn(shape).transpose(0, 1)
    real = op(x, 1, alone)
    with FakeTensorMode() as mode:
        fake = op(mode.from_tensor(x), 1, alone)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_fake_parts_of_more_ranks_are_more_rows():
    with FakeTensorMode():
        assert all_gather(torch.empty(3, 5), 4, "nobody").shape == (12, 5)


def test_both_are_collectives_of_no_layer():
    for name in ("all_reduce", "all_gather"):
        assert INSTRUCTIONS[name].is_collective
        assert INSTRUCTIONS[name].stream == 0


def test_a_group_that_is_gone_is_named(alone):
    dist.destroy_process_group()
    with pytest.raises(RankLostError, match=f"'{alone}' that the model was sharded over is gone"):
        all_reduce(torch.ones(2), 1, alone)
    with pytest.raises(RankLostError):
        group_named(alone)


def test_what_torch_says_of_a_lost_rank_becomes_a_sentence():
    with (
        pytest.raises(
            RankLostError, match=r"all_gather failed: another rank .* \(Connection closed"
        ),
        lost_ranks("all_gather"),
    ):
        raise RuntimeError("Connection closed by peer\nmore")


def test_an_error_that_says_so_already_stays():
    with pytest.raises(RankLostError, match=r"^mine$"), lost_ranks("all_gather"):
        raise RankLostError("mine")


def test_derivative_of_what_is_gathered_is_that_of_this_ranks_part(alone, monkeypatch):
    """One of three ranks, the second: the others' rows depend on tensors of their own."""
    group = SimpleNamespace(rank=lambda: 1)
    monkeypatch.setattr(collectives, "group_named", lambda name: group)
    monkeypatch.setattr(collectives, "_GATHER", lambda into, x, group: into.copy_(x.repeat(3, 1)))
    x = torch.randn(2, 4, requires_grad=True)
    whole = all_gather(x, 3, alone)
    directions = torch.randn(5, 6, 4)
    (found,) = torch.autograd.grad(whole, x, directions, is_grads_batched=True)
    assert torch.equal(found, directions[:, 2:4])
