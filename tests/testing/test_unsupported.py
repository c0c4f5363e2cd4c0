from __future__ import annotations

import pytest
import torch

from sparda_compile.testing import UNSUPPORTED_MODELS, PlainCausalLM
from sparda_compile.testing import unsupported as odd

IDS = torch.arange(40).remainder(11).reshape(1, 40)
ENCODER_DECODERS = ("bart", "t5")


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_MODELS))
@torch.no_grad()
def test_model_runs_by_itself(name):
    make, word = UNSUPPORTED_MODELS[name]
    before = torch.get_rng_state()
    model = make()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    extra = {"decoder_input_ids": IDS} if name in ENCODER_DECODERS else {}
    out = model(IDS, **extra)
    logits = getattr(out, "logits", out)
    assert logits.shape == (1, 40, 256)
    assert logits.isfinite().all()
    assert word == "position_ids" or word in type(model).__name__


@pytest.mark.parametrize(
    "odd_class", [odd.BidirectionalLM, odd.AlibiLM, odd.InterleavedLM, odd.PrefixLM]
)
@torch.no_grad()
def test_oddity_changes_the_outcome(odd_class):
    plain, other = PlainCausalLM(), odd_class()
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert (plain(IDS) - other(IDS)).abs().max() > 0.1


def test_no_position_model_refuses_positions():
    model = odd.NoPositionLM()
    torch.testing.assert_close(model(IDS), PlainCausalLM()(IDS))
    with pytest.raises(TypeError, match="position_ids"):
        model(IDS, position_ids=torch.arange(40).unsqueeze(0))


@torch.no_grad()
def test_prefix_and_bidirectional_models_see_ahead():
    changed_early, changed_late = IDS.clone(), IDS.clone()
    changed_early[:, 5], changed_late[:, 30] = 99, 99
    prefix, both = odd.PrefixLM(), odd.BidirectionalLM()
    assert not torch.allclose(prefix(IDS)[:, 0], prefix(changed_early)[:, 0], atol=1e-3)
    torch.testing.assert_close(prefix(IDS)[:, :30], prefix(changed_late)[:, :30])
    assert not torch.allclose(both(IDS)[:, 0], both(changed_late)[:, 0], atol=1e-3)
