"""Methods from outside the package: one file, one registration, and every mode runs them."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ConfigError
from sparda_compile.graph.nodes import find_ops
from sparda_compile.hints.base import Hint
from sparda_compile.registry import HINTS, SELECTORS, Registry
from sparda_compile.selectors.base import Selector, Summary
from sparda_compile.selectors.pooled_keys import PooledKeys, existing_windows, windows_to_blocks
from sparda_compile.state.layout import TensorSpec
from sparda_compile.testing import tiny_llama

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "top_k": 2, "local_blocks": 1,
    "max_tokens": 512, "lowering": "eager", "machine": "h200",
}  # fmt: skip


class NewestFirst(Selector):
    """The newest blocks, whatever the query asks for."""

    name: ClassVar[str] = "newest_first"
    kernels: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[Summary] = PooledKeys()

    def score(self, query_BHTD, tensors, lengths_B, scale, geometry):
        """Return the number of each window that exists."""
        del query_BHTD, scale
        pooled_BGWD = tensors[0]
        exists_BW = existing_windows(lengths_B, pooled_BGWD.shape[2], geometry)[:, None]
        numbers = torch.arange(pooled_BGWD.shape[2], dtype=torch.float32)
        scores_BGW = numbers.expand(pooled_BGWD.shape[:3]).masked_fill(~exists_BW, float("-inf"))
        return windows_to_blocks(scores_BGW, geometry)


class StepBeforeLast(Hint):
    """What the layer selected one step before, kept under a name of its own."""

    name: ClassVar[str] = "step_before"
    ops: ClassVar[tuple[str, ...]] = ("recall_ids", "remember_ids")

    def state(self, layout, layer):
        """Return the ids that it keeps."""
        shape = (layout.batch_size, layer.num_groups, layout.num_selected)
        return {"ids_before": TensorSpec(shape, torch.int32, fill=-1)}

    def emit(self, point):
        """Recall them in the layer before, and remember this step's."""
        layer = point.target.layer
        kept = point.state.get("ids_before", layer)
        recalled = point.after(point.source.hidden).call("recall_ids", kept)
        ids = point.block_ids[layer]
        point.after(ids).call("remember_ids", ids, kept)
        return recalled


@pytest.fixture(scope="module", autouse=True)
def _outsiders():
    SELECTORS.add(NewestFirst())
    HINTS.add(StepBeforeLast())
    yield
    SELECTORS.remove("newest_first")
    HINTS.remove("step_before")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def generated(model, **settings):
    ids = torch.randint(2, 250, (2, 150), generator=torch.Generator().manual_seed(0))
    fast = optimize(model, SpardaConfig(**SMALL, **settings))
    out = fast.generate(
        ids, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return fast, torch.cat(out.logits)


@pytest.mark.parametrize("mode", ["query", "forecast", "exact", "speculate"])
def test_a_selector_from_outside_runs_in_every_mode(model, mode):
    resident = {"offload": "never", "speculate_where": "always"} if mode == "speculate" else {}
    fast, logits = generated(model, mode=mode, selector="newest_first", **resident)
    assert torch.isfinite(logits).all()
    scores = find_ops(fast.sparda.graph("decode", after="replace_attention").graph, "score_blocks")
    first = "infllm2" if mode == "forecast" else "newest_first"
    assert {node.args[3] for node in scores} <= {first, "newest_first"}
    if mode == "exact":
        _, by_query = generated(model, mode="query", selector="newest_first")
        assert torch.equal(logits, by_query)


@pytest.mark.parametrize("offload", ["always", "never"])
def test_a_hint_from_outside_prefetches_and_changes_nothing(model, offload):
    fast, logits = generated(model, mode="exact", hint="step_before", offload=offload)
    _, known = generated(model, mode="exact", hint="previous_step", offload=offload)
    _, by_query = generated(model, mode="query", offload=offload)
    assert torch.equal(logits, known)
    assert torch.equal(logits, by_query)
    state = fast.sparda.stats().total
    assert state.hits > 0
    graph = fast.sparda.graph("decode").graph
    names = {node.name for node in graph.nodes if node.op == "placeholder"}
    assert "sparda_ids_before_1" in names
    assert "sparda_last_block_ids_1" not in names


def test_names_of_outsiders_are_known_and_offered():
    with pytest.raises(ConfigError, match=r"hint='step_befor' .*Did you mean 'step_before'"):
        SpardaConfig(mode="exact", hint="step_befor")
    assert SELECTORS.choices()[-1] == "newest_first"
    assert "forecast" not in SELECTORS.choices()
    assert "forecast" in SELECTORS.names()


class TestRegistry:
    @pytest.fixture
    def registry(self):
        return Registry("fruit", {"apple": "types:SimpleNamespace"}, internal=("apple",))

    def test_what_is_named_is_made_once_and_when_asked_for(self, registry):
        assert registry.names() == ("apple",)
        assert "apple" in registry
        assert registry["apple"] is registry["apple"]
        assert registry.choices() == ()
        assert list(registry) == [registry["apple"]]
        with pytest.raises(KeyError):
            registry["pear"]

    def test_a_name_is_given_once(self, registry):
        pear = registry.add(type("Pear", (), {"name": "pear"})())
        assert registry["pear"] is pear
        for other in (pear, type("Apple", (), {"name": "apple"})()):
            with pytest.raises(ConfigError, match="there is a fruit"):
                registry.add(other)
        with pytest.raises(ConfigError, match="has no name"):
            registry.add(object())
        registry.remove("pear")
        for name in ("pear", "apple"):
            with pytest.raises(ConfigError, match="no fruit"):
                registry.remove(name)
