from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.layer_formats import FormatTrial, MixCost, choose
from sparda_compile.evaluation.text.scripts import Part, Script


class Trial:
    """Costs that are known: of layer l with f, and twice their sum together."""

    layers = (0, 1, 2)

    def __init__(self):
        self.alone = {"int8": (0.001, 0.001, 0.001), "int4": (0.01, 0.1, 0.02)}
        self.measured = []

    def num_bytes(self, layer, name):
        return {"model": 100, "int8": 51, "int4": 27}[name]

    def measure(self, formats):
        self.measured.append(dict(formats))
        costs = [self.alone[name][layer] for layer, name in formats.items()]
        return MixCost(sum(costs) * (2 if len(costs) > 1 else 1), 1.0, 1.0)


def quiet(text):
    assert text


@pytest.mark.parametrize(
    ("limit", "formats"),
    [
        (1.0, {0: "int4", 1: "int4", 2: "int4"}),
        (0.06, {0: "int4", 1: "int8", 2: "int8"}),  # layer 2 as int4, too, is .062 together
        (0.022, {0: "int8", 1: "int8", 2: "int8"}),
        (0.0001, {}),
    ],
)
def test_the_smallest_within_the_limit_as_measured_together(limit, formats):
    trial = Trial()
    mix = choose(trial, ("int8", "int4"), limit, quiet)
    assert mix.formats == formats
    assert mix.cost.kl <= limit
    assert mix.costs[1] == {"int8": 0.001, "int4": 0.1}
    if formats:
        assert trial.measured[-1] == formats
        num_bytes = sum(trial.num_bytes(n, formats.get(n, "model")) for n in trial.layers)
        assert mix.bytes_share == pytest.approx(num_bytes / 300)


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="limit=-1"):
        choose(Trial(), ("int8",), -1, quiet)


def test_only_full_blocks_of_named_layers_are_rounded(shared_llama):
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(0))
    script = Script("some", (Part(ids[:, :40]), Part(ids[:, 40:-1], ids[:, 41:])), ("",))
    trial = FormatTrial(shared_llama, [script], 16)
    assert trial.layers == [0, 1]
    nothing = trial.measure({})
    assert nothing.kl == pytest.approx(0.0, abs=1e-6)
    assert (nothing.ratio, nothing.same) == (1.0, 1.0)
    one, both = trial.measure({1: "int4"}), trial.measure({0: "int4", 1: "int4"})
    assert 0 < one.kl < both.kl
    # A prompt that fills no block has nothing to round.
    short = FormatTrial(shared_llama, [script], 48)
    assert short.measure({0: "int4", 1: "int4"}) == nothing
