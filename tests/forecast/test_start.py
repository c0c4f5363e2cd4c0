from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.demo.small_model import SMALL_CONFIG, load_small_model
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.metrics import RecallSums
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.forecast.projection import ProjectionShape
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.graph.nodes import tensor_shape
from sparda_compile.graph.site import forecast_dim, sites_of
from sparda_compile.module.captures_of import captures_of
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.find.find_attention import FindAttention
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.manager import run_passes
from sparda_compile.testing import build, tiny_llama

ROWS, HIDDEN = 32, 48
BOUND = 1 / math.sqrt(HIDDEN)


class Start:
    """The decode graph of a model with its attentions found; tests change copies of it."""

    def __init__(self, model, captured=None, batch_size=1, rank=None):
        self.model = model
        captures = captures_of(model)
        self.captured = captured or captures.get("decode")
        gm = self.captured.copy()
        ctx = PassContext(
            SpardaConfig(), "decode", dict(captures.windows), "Model", None, MACHINES["cpu"]
        )
        run_passes(gm, [FindAttention()], ctx)
        self.graph, self.sites = gm.graph, sites_of(gm.graph)
        self.shapes = {
            site.layer: ProjectionShape(
                site.num_groups * forecast_dim(site), tensor_shape(site.hidden)[2], rank
            )
            for site in self.sites
        }

    def weights(self, dtype=torch.float32, **changes):
        """Return the projections multiplied out; a warning is an error."""
        parts = {name: changes.get(name, getattr(self, name)) for name in PARTS}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return products(initial_forecast(*parts.values(), dtype))

    def warned(self, words, **changes):
        parts = {name: changes.get(name, getattr(self, name)) for name in PARTS}
        with pytest.warns(UserWarning, match=words):
            return products(initial_forecast(*parts.values(), torch.float32))

    def with_weights(self, change):
        """Return the captured forward with other values of its weights."""
        weights = {name: change(tensor) for name, tensor in self.captured.weights.items()}
        return dataclasses.replace(self.captured, weights=weights)


def products(projections):
    return {layer: projection.product() for layer, projection in projections.items()}


PARTS = ("graph", "sites", "shapes", "captured")


@pytest.fixture(scope="module")
def llama():
    return Start(tiny_llama(hidden_size=HIDDEN))


@pytest.fixture
def broken(llama):
    """The same with the query of layer 1 free to change."""
    return Start(llama.model, llama.captured)


def mean_rows(model, layer, num_groups=2):
    """Return the mean of each group's rows of the query projection."""
    weight = model.model.layers[layer].self_attn.q_proj.weight.detach()
    heads = weight.view(num_groups, -1, 16, weight.shape[1])
    return heads.mean(1).flatten(0, 1)


def insert(start, method, *args):
    """Put a call of a method behind the query projection of layer 1."""
    projection = start.sites[1].projection
    with start.graph.inserting_after(projection):
        node = start.graph.call_method(method, (projection, *args))
    projection.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def is_random(weight):
    return weight.shape == (ROWS, HIDDEN) and 0.9 * BOUND < weight.abs().max() <= BOUND


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_mean_of_the_group_s_query_rows(llama, batch_size):
    start = llama if batch_size == 1 else Start(llama.model, llama.captured, batch_size)
    weights = start.weights()
    assert list(weights) == [0, 1]
    for layer, weight in weights.items():
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        torch.testing.assert_close(weight, mean_rows(llama.model, layer), rtol=0, atol=1e-7)


def test_half_precision_is_averaged_in_float32(llama):
    captured = llama.with_weights(lambda w: w.bfloat16() if w.is_floating_point() else w)
    weights = llama.weights(torch.bfloat16, captured=captured)
    for layer, weight in weights.items():
        half = tiny_llama(hidden_size=HIDDEN).bfloat16().float()
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, mean_rows(half, layer).bfloat16())


def test_it_depends_on_the_model_alone(llama):
    first = llama.weights()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with torch.inference_mode():
        captured = llama.with_weights(torch.clone)
        second = llama.weights(captured=captured)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[layer], second[layer]) for layer in first)
    assert all(p.grad is None for p in llama.model.parameters())


def test_layers_without_a_forecast_are_left_out(llama):
    assert list(llama.weights(shapes={1: ProjectionShape(ROWS, HIDDEN)})) == [1]


def test_scores_have_the_scale_that_training_expects(llama):
    """A Forecast is trained as if the model's scale were 1 / sqrt(D)."""
    sites = [dataclasses.replace(site, scale=0.5) for site in llama.sites]
    doubled = llama.weights(sites=sites)
    for layer, weight in llama.weights().items():
        torch.testing.assert_close(doubled[layer], 2 * weight)


def test_with_a_query_norm_it_is_nearly_the_best_linear_fit():
    model = build("qwen3")
    weights = Start(model).weights()
    generator = torch.Generator().manual_seed(5)
    many, held_out = torch.randn(2, 4096, 64, generator=generator)
    for layer, weight in weights.items():
        attention = model.model.layers[layer].self_attn

        @torch.no_grad()
        def means(hidden, attention=attention):
            heads = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (2, 2, 16)))
            return heads.mean(2).flatten(1)

        def error(candidate, means=means):
            want = means(held_out)
            return float((held_out @ candidate.T - want).square().sum() / want.square().sum())

        best = error(torch.linalg.lstsq(many, means(many)).solution.T)
        random = torch.empty_like(weight).uniform_(-1 / 8, 1 / 8, generator=generator)
        assert best < 0.06
        assert error(weight) < 1.5 * best
        assert error(weight) < 0.4 * error(mean_rows(model, layer))
        assert error(weight) < 0.1 * error(random)


@pytest.mark.parametrize(
    ("inserted", "words"),
    [
        (("detach",), "does not require grad"),
        (("add", "input_ids"), "they depend on .*input_ids"),
        (("log",), "not finite"),
        (("repeat", 1, 1, 2), "RuntimeError: .*size 128"),
        (("no_such_method",), "AttributeError"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_queries_without_a_start_leave_random_weights_and_a_warning(broken, inserted, words):
    name, *args = inserted
    ids = next(n for n in broken.graph.nodes if "input_ids" in n.name)
    insert(broken, name, *[ids if arg == "input_ids" else arg for arg in args])
    weights = broken.warned(rf"layers 1 starts from random weights.*{words}.*mode='query'")
    assert is_random(weights[1])
    torch.testing.assert_close(weights[0], mean_rows(broken.model, 0), rtol=0, atol=1e-7)


def test_another_width_in_the_layer_before(llama):
    weights = llama.warned(
        "48 channels, the layer before has 40", shapes={1: ProjectionShape(ROWS, 40)}
    )
    assert weights[1].shape == (ROWS, 40)


def test_of_low_rank_it_is_the_closest_to_the_full_start(llama):
    low = Start(llama.model, llama.captured, rank=6).weights()
    for layer, weight in llama.weights().items():
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        closest = left[:, :6] * values[:6] @ right[:6]
        torch.testing.assert_close(low[layer], closest, rtol=0, atol=1e-5)


def test_random_weights_of_low_rank(llama):
    captured = llama.with_weights(lambda w: w * math.nan if w.is_floating_point() else w)
    shapes = {1: ProjectionShape(ROWS, HIDDEN, 6)}
    (weight,) = llama.warned("layers 1 starts", captured=captured, shapes=shapes).values()
    assert torch.linalg.matrix_rank(weight) == 6
    assert weight.abs().max() > 0.3 * BOUND


def test_random_weights_are_another_for_each_layer_and_always_the_same(llama):
    captured = llama.with_weights(lambda w: w * math.nan if w.is_floating_point() else w)
    state = torch.get_rng_state()
    first, second = (llama.warned("layers 0, 1 starts", captured=captured) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(is_random(first[layer]) for layer in (0, 1))
    assert all(torch.equal(first[layer], second[layer]) for layer in (0, 1))
    assert not torch.equal(first[0], first[1])


def test_untrained_it_finds_what_the_small_model_looks_for():
    model = load_small_model()
    weights = Start(model).weights()
    generator = torch.Generator().manual_seed(1)
    random = {
        layer: torch.empty_like(weight).uniform_(-1 / 16, 1 / 16, generator=generator)
        for layer, weight in weights.items()
    }
    batch = make_batch("multi_query", batch_size=2, length=2048, seed=3)
    first, last = batch.question_start, int(batch.answer_positions_A[-1])
    reading = read(model, batch.ids_BT[:, :first])
    config = SMALL_CONFIG.replace(mode="dense", top_k=4)
    found = {}
    for name, forecast in (("start", weights), ("random", random)):
        sums = RecallSums()
        decoded = decode(model, reading, batch.ids_BT[:, first:last], config, forecast=forecast)
        sums.add(decoded.records)
        mass, all_mass, blocks, all_blocks = sums.get("forecast").sum(1).tolist()
        found[name] = mass / all_mass, blocks / all_blocks
    assert found["start"][0] > 2 * found["random"][0]
    assert found["start"][1] > 2 * found["random"][1]
