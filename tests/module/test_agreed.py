from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.agreed import (
    Turn,
    at_prompt,
    check_same_text,
    facts_of_call,
    facts_of_generation,
)
from sparda_compile.ranks.agreement import ALONE, Ranks

PAIR = Ranks(2, 1, "pair")
IDS = torch.arange(6).view(2, 3)


@pytest.fixture
def asked(monkeypatch):
    """Note what the ranks are asked together; all say what this one says."""
    found = []

    def exchange(self, what, mine):
        del self
        found.append((what, sorted(mine.facts)))
        return [mine, mine]

    monkeypatch.setattr(Ranks, "_exchange", exchange)
    return found


@pytest.mark.parametrize(
    ("tokens", "kv", "times"), [(3, None, 1), (3, "held", 1), (1, None, 1), (1, "held", 0)]
)
def test_prompts_and_first_calls_are_compared_and_steps_are_not(asked, tokens, kv, times):
    with at_prompt(PAIR, SimpleNamespace(kv=kv), IDS[:, :tokens]) as facts:
        facts |= facts_of_call(IDS, None, None, 1)
    assert asked == [("a call of forward", ["input_ids", "logits_to_keep"])] * times


def test_a_generation_is_compared_by_its_tensors_and_plain_settings():
    settings = {
        "max_new_tokens": 3,
        "do_sample": True,
        "_from_model_config": 1,
        "streamer": object(),
    }
    facts = facts_of_generation(PAIR, IDS, {"attention_mask": IDS, "streamer": object()}, settings)
    assert facts.keys() == {"input_ids", "attention_mask", "max_new_tokens", "do_sample"}
    assert facts["do_sample"] is True
    assert facts_of_generation(ALONE, None, {}, {})["do_sample"] is False


def test_a_rank_does_not_stop_by_its_own_clock():
    with pytest.raises(UnsupportedInputError, match=r"max_time=2\.5 .* 2 ranks"):
        facts_of_generation(PAIR, IDS, {}, {"max_time": 2.5})
    facts_of_generation(ALONE, IDS, {}, {"max_time": 2.5})


@pytest.mark.parametrize("output", [IDS, SimpleNamespace(sequences=IDS)])
def test_texts_are_compared_in_the_end(asked, output):
    check_same_text(PAIR, output)
    check_same_text(ALONE, output)
    assert asked == [("the end of generate", ["tokens"])]


@pytest.mark.parametrize(("ranks", "refused"), [(PAIR, True), (ALONE, False)])
def test_one_thread_at_a_time_runs_a_sharded_model(ranks, refused):
    turn, found = Turn(ranks), []

    def other():
        try:
            with turn.taken():
                found.append("ran")
        except UnsupportedInputError as error:
            found.append(str(error))

    with turn.taken(), turn.taken():  # forward inside of generate
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert ("another thread runs the model, which 2 ranks share" in found[0]) == refused
    with turn.taken():
        found.append("again")
