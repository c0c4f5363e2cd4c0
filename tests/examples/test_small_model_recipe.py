from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import cache_of
from sparda_compile.evaluation.haystack import Maker
from sparda_compile.evaluation.lookup import lookup

PATH = Path(__file__).parents[2] / "examples" / "small_model_recipe.py"

pytestmark = pytest.mark.usefixtures("no_deprecations")


@pytest.fixture(scope="module")
def recipe():
    """The recipe, which is beside the script that uses it and not in a package."""
    spec = importlib.util.spec_from_file_location("small_model_recipe", PATH)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look up their annotations there.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def a_model(recipe, arch):
    """Return a model whose queries and keys are so large that attention is not even."""
    model = recipe.build_model(recipe.TOY, arch, seed=0).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(3.0)
        if arch == "qwen3":
            layer.self_attn.q_norm.weight.data.mul_(4.0)
    return model


def some_questions(length=400, queries=10):
    maker = Maker(2, length, torch.Generator().manual_seed(1))
    return lookup(maker, num_records=60, num_queries=queries)


def positions_of(batch):
    return torch.arange(batch.ids_BT.shape[1]).expand_as(batch.ids_BT)


CONFIG = SpardaConfig(
    mode="query", top_k=2, local_blocks=1, block_size=16, pool_size=8, pool_stride=4,
    lowering="eager",
)  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_all_blocks_equal_dense(recipe, arch):
    model, batch = a_model(recipe, arch), some_questions()
    dense = recipe.answer_logits(model, batch, positions_of(batch))
    every = recipe.answer_logits(
        model, batch, positions_of(batch), None, CONFIG.replace(top_k=None)
    )
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-4)
    few = recipe.answer_logits(model, batch, positions_of(batch), None, CONFIG)
    assert (few - dense).abs().max() > 0.05


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_questions_attend_as_the_optimized_model_does(recipe, arch):
    model, batch = a_model(recipe, arch), some_questions()
    trained = recipe.answer_logits(model, batch, positions_of(batch), None, CONFIG)
    fast = optimize(model, CONFIG)
    with torch.no_grad():
        past = cache_of(fast(batch.ids_BT[:, : batch.question_start], use_cache=True))
        rows = []
        for ids in batch.ids_BT[:, batch.question_start :].split(1, dim=1):
            out = fast(ids, cache=past, use_cache=True)
            past = cache_of(out)
            rows.append(out.logits[:, -1])
    decoded = torch.stack(rows, dim=1)[:, batch.answer_positions_A - 1 - batch.question_start]
    torch.testing.assert_close(trained, decoded, rtol=1e-3, atol=1e-3)


def test_selection_has_no_gradient_and_attention_has(recipe):
    model, batch = a_model(recipe, "llama"), some_questions()
    recipe.answer_logits(model, batch, positions_of(batch), None, CONFIG).square().mean().backward()
    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(layer.self_attn, part).weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("length", "top_k"), [(8192, 9), (16384, 22), (17408, 23)])
def test_deployed_blocks(recipe, length, top_k):
    config = recipe.deployed(recipe.FULL, length, 0.1)
    assert (config.top_k, config.local_blocks, config.sink_blocks) == (top_k, 2, 1)


def test_short_sequences_stay_dense(recipe):
    assert recipe.deployed(recipe.FULL, 512, 0.1) is None
    assert recipe.deployed(recipe.FULL, 8192, None) is None


def chosen_blocks(recipe, layer, batch, config, hidden):
    """Return which keys a layer's questions attend to, [B, G, Q, T], on random input."""
    x = torch.randn(*batch.ids_BT.shape, 64, generator=torch.Generator().manual_seed(3))
    rotation = [torch.ones(1, x.shape[1], 64), torch.zeros(1, x.shape[1], 64)]
    attention, start = layer.self_attn, batch.question_start
    q = recipe.rotated(attention, "q", x, rotation)[:, start:].transpose(1, 2)
    k = recipe.rotated(attention, "k", x, rotation).transpose(1, 2)
    return recipe.attended(q, k, start, attention.scaling, config, hidden)


def test_hidden_evidence_is_not_picked_and_nothing_else_changes(recipe):
    model, batch = a_model(recipe, "llama"), some_questions()
    half = recipe.hidden_evidence(batch, 0.5, torch.Generator().manual_seed(0))
    assert half.shape == (2, 30)
    asking = (half >= 0).nonzero()
    assert 5 <= len(asking) <= 15
    # The last token of a question, before its answer.
    assert set((asking[:, 1] % 3).tolist()) == {1}

    config = CONFIG.replace(top_k=8)
    layer = model.model.layers[0]
    before = chosen_blocks(recipe, layer, batch, config, None)
    after = chosen_blocks(recipe, layer, batch, config, half)
    hidden = half >= 0
    torch.testing.assert_close(
        after.transpose(1, 2)[~hidden], before.transpose(1, 2)[~hidden], rtol=0, atol=0
    )
    num_found = 0
    for row, question in asking.tolist():
        place = int(half[row, question])
        block = slice(place // 16 * 16, place // 16 * 16 + 16)
        was, now = before[row, :, question], after[row, :, question]
        is_forced = place < 16 or place // 16 >= (batch.question_start + question) // 16 - 1
        assert now[:, block].any() == is_forced
        num_found += int(was[:, block].any() and not is_forced)
        # Whatever else was read still is, and one block more where one went.
        kept = was.clone()
        kept[:, block] = is_forced
        assert (now >= kept).all()
        assert (now.sum(-1) == was.sum(-1)).all()
    assert num_found > 0


def test_hiding_in_a_layer_changes_what_comes_after_it(recipe):
    model, batch = a_model(recipe, "llama"), some_questions()
    # Of 25 blocks at most four are forced, so that only what is hidden is not read.
    config = CONFIG.replace(top_k=20)

    def logits(hidden):
        return recipe.answer_logits(model, batch, positions_of(batch), None, config, hidden)

    plain = logits(None)
    nothing = torch.full((2, 30), -1)
    assert torch.equal(logits({}), plain)
    assert torch.equal(logits({0: nothing, 1: nothing}), plain)
    every = recipe.hidden_evidence(batch, 1.0, torch.Generator().manual_seed(0))
    assert not torch.equal(logits({0: every}), plain)
    assert not torch.equal(logits({1: every}), plain)


def test_pool_size_of_a_preset_is_deployed(recipe):
    preset = dataclasses.replace(recipe.FULL, pool_size=16)
    config = recipe.deployed(preset, 8192, 0.1)
    assert (config.pool_size, config.pool_stride, config.top_k) == (16, 8, 9)
    config = recipe.deployed(recipe.FULL, 8192, 0.1)
    assert (config.pool_size, config.pool_stride) == (32, 16)
