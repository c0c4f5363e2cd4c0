"""The mixture of past steps and an early query: where its ops stand, and what they take."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import call_name, program_order
from sparda_compile.graph.site import sites_of
from sparda_compile.hints.mixture import MixtureHint
from sparda_compile.kernels.mixture import START, share_of

CONFIG = {"mode": "exact", "hint": "mixture", "machine": "h200"}


def test_it_is_mixed_a_layer_ahead_and_learned_behind_the_attention(lab):
    graph = lab.decode_graph("insert_forecast", ema_damping=0.25, **CONFIG)
    order, sites = program_order(graph), sites_of(graph)
    mixed, learned = lab.ops(graph, "mix_scores"), lab.ops(graph, "learn_mixture")
    attention, updates = lab.ops(graph, "sparse_attention"), lab.ops(graph, "update_prediction")
    assert set(mixed) == set(learned) == set(updates) == set(range(1, lab.num_layers))
    for layer, node in mixed.items():
        assert order[sites[layer - 1].hidden] < order[node] < order[attention[layer - 1]]
        asked = argument(node, "asked")
        assert call_name(asked) == "sparda.score_blocks"
        assert argument(learned[layer], "asked") is asked
        own = argument(learned[layer], "scores")
        assert own is argument(updates[layer], "scores") is not asked
        assert argument(own, "query") is sites[layer].query
        for name in ("level", "trend", "mixture"):
            assert argument(node, name).name == f"sparda_{name}_{layer}"
            assert argument(learned[layer], name) is argument(node, name)
        assert argument(node, "damping") == argument(learned[layer], "damping") == 0.25
        assert order[attention[layer]] < order[learned[layer]] < order[updates[layer]]
        (picked,) = [n for n in node.users if call_name(n) == "sparda.select_blocks"]
        assert picked is not None


def test_prompts_begin_its_levels(lab):
    module = lab.module(ema_calibrate=True, **CONFIG)
    graph = module.programs.get("prefill", 1, 256, last_only=True).plan.graph_module.graph
    assert set(lab.ops(graph, "begin_prediction")) == set(range(lab.num_layers))
    graph = lab.decode_graph("insert_forecast", ema_calibrate=True, **CONFIG)
    for name in ("mix_scores", "learn_mixture", "update_prediction"):
        for layer, node in lab.ops(graph, name).items():
            assert argument(node, "calibrated").name == f"sparda_calibrated_{layer}"


def test_steps_learn_a_share_of_each_sequence_and_head(lab):
    module = lab.module(**CONFIG)
    cache = module.new_cache(256)
    ids = torch.randint(2, 250, (2, 120), generator=torch.Generator().manual_seed(0))
    module(ids[:, :100], past_key_values=cache)
    name = "sparda_mixture_1"
    assert (share_of(cache.kv.state[name]) == START).all()
    for column in range(100, 120):
        module(ids[:, column : column + 1], past_key_values=cache)
    share = share_of(cache.kv.state[name])
    assert len(share.unique()) == share.numel() > 1
    assert (cache.kv.state["sparda_mixture_0"] == 0).all()  # the first layer has no guess
    cache.reset()
    assert (cache.kv.state[name] == 0).all()


@pytest.mark.parametrize("other", MixtureHint.includes)
def test_its_parts_do_not_stand_beside_it(other):
    for names in (("mixture", other), (other, "forecast", "mixture")):
        with pytest.raises(ConfigError, match=f"names '{other}', which hint 'mixture' has in it"):
            SpardaConfig(mode="exact", hint=names)
    assert SpardaConfig(mode="exact", hint=("mixture", "forecast")).hints == ("mixture", "forecast")
