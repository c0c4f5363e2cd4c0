"""Sizes and rank of a projection, those of published models among them, and its two matrices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparda_compile import SpardaConfig, explain
from sparda_compile.errors import ConfigError
from sparda_compile.forecast.projection import (
    Projection,
    ProjectionShape,
    from_inputs,
    from_tensors,
    to_inputs,
    to_tensors,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"

# The published configurations. MiniCPM4.1-8B has the parameters of a Llama of its sizes.
PUBLISHED = {
    "MiniCPM4.1-8B": ("Llama", 32, 2, 16384, 73448),
    "Llama-3.1-8B": ("Llama", 32, 8, 14336, 128256),
    "Qwen3-8B": ("Qwen3", 36, 8, 12288, 151936),
}


def published(name, num_layers=None):
    """Return a model of published sizes on the meta device."""
    import transformers

    family, layers, groups, intermediate, vocabulary = PUBLISHED[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=intermediate,
        num_hidden_layers=num_layers or layers, num_attention_heads=32, head_dim=128,
        num_key_value_heads=groups, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PUBLISHED)
def test_docs_say_what_published_models_need(name):
    """By the sizes of one layer; that `explain` counts those is another test's."""
    groups, num_layers = PUBLISHED[name][2], PUBLISHED[name][1]
    shape = ProjectionShape.of(groups * 128, 4096, None)
    total = num_layers * shape.num_weights
    share = 100 * total / sum(p.numel() for p in published(name).parameters())
    assert share < 0.5
    rank = "full" if shape.rank is None else shape.rank
    row = f"| {name} | {groups} | {rank} | {total / 1e6:.1f} million | {share:.2f}% |"
    assert row in DOCUMENT.read_text(encoding="utf-8")


def test_explain_counts_the_matrices_that_the_rule_gives():
    model = published("Llama-3.1-8B", num_layers=1)
    report = explain(model, SpardaConfig(lowering="eager"))
    assert report.forecast_parameters == 192 * (1024 + 4096)
    (row,) = [line for line in str(report).splitlines() if line.startswith("Forecast")]
    assert re.match("Forecast: 983040 parameters", row)


@pytest.mark.parametrize(
    ("rows", "hidden", "rank"),
    [
        (256, 4096, None),
        (1024, 4096, 192),
        (512, 1024, 160),
        (64, 256, None),
        (257, 4096, 240),
        # The rule's own would be 3; a multiple of 16 is never 0.
        (4096, 64, 16),
    ],
)
def test_rule(rows, hidden, rank):
    shape = ProjectionShape.of(rows, hidden, None)
    assert shape == ProjectionShape(rows, hidden, rank)
    assert shape.num_weights <= 256 * hidden or rank == 16


@pytest.mark.parametrize(("rank", "made"), [(1, 1), (21, 21), (22, None), (64, None), (999, None)])
def test_a_rank_that_saves_nothing_is_full(rank, made):
    """A full 32 x 64 has 2048 numbers: rank 21 has 2016, rank 22 has 2112."""
    assert ProjectionShape.of(32, 64, rank).rank == made


def test_names_and_the_way_back():
    full = Projection((draw(6, 8),))
    low = Projection((draw(6, 2), draw(2, 8)))
    assert (full.shape, low.shape) == (ProjectionShape(6, 8), ProjectionShape(6, 8, 2))
    tensors = to_tensors({10: low, 9: full})
    assert list(tensors) == ["9", "10_u", "10_v"]
    for back in (
        from_tensors(dict(reversed(tensors.items()))),
        from_inputs(to_inputs({10: low, 9: full}) | {"input_ids": draw(1)}),
    ):
        assert list(back) == [9, 10]
        assert back[9].factors[0] is full.factors[0]
        assert [*map(id, back[10].factors)] == [*map(id, low.factors)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lm_head"], "lm_head names no projection"),
        (["3_u"], "layer 3 has 3_u, not one full"),
        (["3", "3_v"], "layer 3 has 3, 3_v"),
    ],
)
def test_names_of_something_else(names, words):
    with pytest.raises(ValueError, match=words):
        from_tensors(dict.fromkeys(names, draw(2, 2)))


@pytest.mark.parametrize("shapes", [[(3,)], [(3, 2), (3, 2)], [(2, 2)] * 3])
def test_matrices_that_make_no_projection(shapes):
    with pytest.raises(ConfigError, match="must be one matrix"):
        Projection(tuple(draw(*shape) for shape in shapes))


def test_it_is_applied_one_by_one():
    low, hidden = Projection((draw(6, 2), draw(2, 8, seed=1))), draw(3, 8, seed=2)
    torch.testing.assert_close(low(hidden), hidden @ low.product().T)
    assert low.to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "hidden"), [(12, 20), (20, 12)])
def test_truncated_is_the_closest_with_its_values_shared(rows, hidden):
    weight = draw(rows, hidden)
    assert Projection.truncated(weight, None).factors[0] is weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    low = Projection.truncated(weight, 5)
    closest = left[:, :5] * values[:5] @ right[:5]
    torch.testing.assert_close(low.product(), closest, rtol=0, atol=1e-5)
    for squares in (low.factors[0].square().sum(0), low.factors[1].square().sum(1)):
        torch.testing.assert_close(squares, values[:5], rtol=1e-5, atol=1e-5)


def test_truncated_of_less_than_the_rank_is_finite_and_equal():
    weight = draw(8, 1) @ draw(1, 10)
    for given in (weight, torch.zeros(8, 10)):
        low = Projection.truncated(given, 3)
        torch.testing.assert_close(low.product(), given, rtol=0, atol=1e-5)
