from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.evaluation.text.scripts import (
    Part,
    Scored,
    Script,
    dense_reading,
    module_logits,
    stack,
)
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(
    mode="query", block_size=16, top_k=1, local_blocks=1, lowering="eager", offload="never",
    progress=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture(scope="module")
def fast(model):
    return optimize(model, CONFIG)


def script(seed=0, turns=2):
    """Return a script of turns of 90 read tokens and 6 steps, the last 4 of which count."""
    ids = torch.randint(0, 256, (1, 100 * turns), generator=torch.Generator().manual_seed(seed))
    parts = []
    for first in range(0, 100 * turns, 100):
        steps = Part(ids[:, first + 90 : first + 96], ids[:, first + 93 : first + 97])
        parts += [Part(ids[:, first : first + 90]), steps]
    return Script(f"sample {seed}", tuple(parts), ("",) * turns)


def test_a_reading_has_the_logits_of_one_forward(model):
    made = script()
    reading = dense_reading(model, made.parts)
    fed = torch.cat([part.ids_BT for part in made.parts], dim=1)
    logits = model(fed).logits
    assert [each.shape for each in reading.logits] == [(1, 4, 256)] * 2
    torch.testing.assert_close(reading.logits[0], logits[:, 92:96], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reading.logits[1], logits[:, 188:192], rtol=1e-4, atol=1e-5)
    keys, _ = reading.keys_values[0]
    assert keys.shape[2] == 90


@pytest.mark.parametrize("mode", ["dense", "query", "exact"])
def test_with_all_blocks_a_module_says_what_the_model_says(mode, model, fast):
    parts = stack([script(0), script(1)])
    reading = dense_reading(model, parts)
    full = optimize(fast, CONFIG.replace(mode=mode, top_k=None, hint="ema"))
    for own in (None, reading):
        for found, right in zip(module_logits(full, parts, own), reading.logits, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_steps_of_every_turn_select(model, fast):
    made = script()
    reading = dense_reading(model, made.parts)
    for found, dense in zip(module_logits(fast, made.parts, reading), reading.logits, strict=True):
        assert (found - dense).abs().max() > 1e-3


def test_a_sparse_prompt_is_read_by_the_module_itself(model, fast):
    made = script(turns=1)
    reading = dense_reading(model, made.parts)
    (dense,) = module_logits(fast, made.parts, reading)
    (own,) = module_logits(fast, made.parts, None)
    torch.testing.assert_close(own, dense, rtol=1e-4, atol=1e-4)
    sparse = optimize(fast, CONFIG.replace(prefill="sparse"))
    (selected,) = module_logits(sparse, made.parts, None)
    assert (selected - dense).abs().max() > 1e-3


def test_side_by_side_is_one_by_one(model, fast):
    both = stack([script(0), script(1)])
    together = module_logits(fast, both, dense_reading(model, both))
    for row in (0, 1):
        alone = script(row)
        logits = module_logits(fast, alone.parts, dense_reading(model, alone.parts))
        for one, two in zip(logits, together, strict=True):
            torch.testing.assert_close(one[0], two[row], rtol=1e-4, atol=1e-4)


def test_scores():
    logits = torch.log(torch.tensor([[[0.5, 0.4, 0.1], [0.1, 0.8, 0.1]]]))
    dense = torch.log(torch.tensor([[[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]]))
    (found,) = Scored.of(logits, dense, torch.tensor([[0, 1]]))
    assert found.nll == pytest.approx(-torch.tensor([0.5, 0.8]).log().sum().item())
    of_dense = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(2.5)
    assert found.kl == pytest.approx(of_dense, rel=1e-5)
    assert (found.tokens, found.same, found.is_right) == (2, 1, True)
    (wrong,) = Scored.of(logits, dense, torch.tensor([[1, 1]]))
    assert not wrong.is_right


def test_a_digest_is_of_all_tokens():
    made = script()
    read, steps = made.parts[:2]
    other = steps.targets_BA.clone()
    other[0, -1] += 1
    parts = (read, dataclasses.replace(steps, targets_BA=other), *made.parts[2:])
    assert made.digest == script().digest
    assert len({made.digest, script(1).digest, Script("", parts, ()).digest}) == 3
    assert made.shape == ((90, 0), (6, 4)) * 2
