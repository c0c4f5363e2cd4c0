from __future__ import annotations

import pytest
import torch
from torch import nn

from sparda_compile.errors import ConfigError, RankLostError, RanksDisagreeError
from sparda_compile.ranks.agreement import ALONE, Ranks, ranks_of

SECOND = Ranks(2, 1, "pair")


def other(monkeypatch, block=lambda facts: None):
    """Let the first rank run a block of its own; return what both said."""
    said = []

    def exchange(self, what, mine):
        del self, what
        said.append(mine)
        return [mine, mine]

    monkeypatch.setattr(Ranks, "_exchange", exchange)
    with Ranks(2, 0, "pair").together("it") as facts:
        block(facts)
    first = said.pop()
    monkeypatch.setattr(Ranks, "_exchange", lambda self, what, mine: [first, mine])


def enter(**facts):
    return lambda into: into.update(facts)


@pytest.mark.parametrize(
    "value", [torch.arange(5), "text", 3, None, torch.tensor([[True]]), torch.ones(2).bfloat16()]
)
def test_ranks_that_say_the_same_go_on(monkeypatch, value):
    other(monkeypatch, enter(value=value))
    with SECOND.together("it") as facts:
        facts["value"] = value


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        (torch.arange(5), torch.arange(1, 6)),
        (torch.arange(4), torch.arange(4).view(2, 2)),
        (torch.zeros(4), torch.zeros(4).int()),
        ("a", "b"),
        (1, 1.0),
    ],
)
def test_ranks_that_differ_are_refused_by_name(monkeypatch, mine, its):
    other(monkeypatch, enter(value=its))
    with (
        pytest.raises(RanksDisagreeError, match="it is not the same on all ranks: value of rank 1"),
        SECOND.together("it") as facts,
    ):
        facts["value"] = mine


def test_what_a_rank_does_not_say_differs(monkeypatch):
    other(monkeypatch, enter(value=1))
    with (
        pytest.raises(RanksDisagreeError, match="value of rank 1 is nothing"),
        SECOND.together("it"),
    ):
        pass


def test_own_error_goes_on_as_it_is(monkeypatch):
    other(monkeypatch)
    with pytest.raises(ConfigError, match="mine"), SECOND.together("it"):
        raise ConfigError("mine")


def test_errors_of_others_are_told(monkeypatch):
    def fail(facts):
        del facts
        raise ConfigError("its own")

    said = []
    monkeypatch.setattr(
        Ranks, "_exchange", lambda self, what, mine: said.append(mine) or [mine] * 2
    )
    with pytest.raises(ConfigError), Ranks(2, 0, "pair").together("it") as facts:
        fail(facts)
    monkeypatch.setattr(Ranks, "_exchange", lambda self, what, mine: [said[0], mine])
    with (
        pytest.raises(RanksDisagreeError, match=r"it failed on rank 0, .*: ConfigError: its own"),
        SECOND.together("it"),
    ):
        pass


def test_a_lost_rank_does_not_hide_what_this_one_raised(monkeypatch):
    def gone(self, what, mine):
        raise RankLostError("gone")

    monkeypatch.setattr(Ranks, "_exchange", gone)
    with pytest.raises(ConfigError, match="mine"), SECOND.together("it"):
        raise ConfigError("mine")
    with pytest.raises(RankLostError, match="gone"), SECOND.together("it"):
        pass


def test_a_single_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(Ranks, "_exchange", None)
    with ALONE.together("it") as facts:
        facts["value"] = object()
    state = torch.get_rng_state()
    ALONE.share_random_state(torch.device("cpu"))
    ALONE.check_alive()
    assert torch.equal(torch.get_rng_state(), state)
    assert (ALONE.from_first("x"), ALONE.least(3)) == ("x", 3)


def test_the_least_number_of_all_ranks_counts(monkeypatch):
    monkeypatch.setattr(Ranks, "_exchange", lambda self, what, mine: [5, mine])
    assert (SECOND.least(7), SECOND.least(2)) == (5, 2)


def test_a_group_that_is_gone_is_refused():
    with pytest.raises(RankLostError, match="destroy_process_group"):
        SECOND.check_alive()


def test_a_model_that_is_not_sharded_has_one_rank():
    assert ranks_of(nn.Linear(2, 2)) is ALONE
    assert ranks_of("no module") is ALONE


def test_random_state_is_the_first_ones(alone):
    single = Ranks(2, 0, alone)  # two in name: the broadcast reaches this process alone
    torch.manual_seed(5)
    single.share_random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
