from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.forecast.projection import Projection, ProjectionShape
from sparda_compile.forecast.weights import (
    ForecastInfo,
    ForecastWeights,
    fit_forecast,
    following_weights,
    load_forecast,
    projections_of,
    rank_of,
)

INFO = ForecastInfo(
    model="LlamaForCausalLM", layers=(0, 1), groups=(2, 2), head_dim=(4, 4), hidden=(6, 6),
    ranks=(None, None), block_size=64, pool_size=32, pool_stride=16, top_k=62,
    steps=2000, num_tokens=65536, versions={"torch": "2"},
)  # fmt: skip
SHAPES = {0: ProjectionShape(8, 6), 1: ProjectionShape(8, 6)}


def make():
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(8, 6, generator=generator) for n in SHAPES}
    return ForecastWeights(projections_of(tensors), INFO)


def fit(given, shapes=SHAPES, model="LlamaForCausalLM", **config):
    return fit_forecast(given, shapes, model, SpardaConfig(**config))


def released(prefix="model.", layers=2):
    names = {f"{prefix}layers.{i}.self_attn.q_future_proj.weight": i + 1 for i in range(layers)}
    names[f"{prefix}layers.0.self_attn.q_curr_proj.weight"] = 0
    return {name: torch.full((8, 6), float(target)) for name, target in names.items()}


def test_what_is_saved_is_loaded_with_what_it_is_for(tmp_path):
    weights = make()
    path = weights.save(tmp_path / "deep" / "forecast.safetensors")
    loaded = load_forecast(path)
    assert loaded.info == INFO
    assert not loaded.is_release
    assert list(loaded) == [0, 1]
    assert all(torch.equal(loaded[layer], weights[layer]) for layer in weights)
    assert [p.name for p in path.parent.iterdir()] == ["forecast.safetensors"]
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["sparda_forecast"])
    assert described["layers"] == [0, 1]
    assert described["format_version"] == 3


def test_low_rank_is_two_tensors_and_the_file_knows(tmp_path):
    projections = {n: Projection((torch.randn(8, 2), torch.randn(2, 6))) for n in SHAPES}
    weights = ForecastWeights(projections, dataclasses.replace(INFO, ranks=(2, 2)))
    path = weights.save(tmp_path / "low.safetensors")
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["0_u", "0_v", "1_u", "1_v"]
    loaded = load_forecast(path)
    assert loaded.info.ranks == (2, 2)
    for layer, projection in projections.items():
        assert all(map(torch.equal, loaded.projections[layer].factors, projection.factors))
        assert torch.equal(loaded[layer], projection.product())
    low = {n: ProjectionShape(8, 6, 2) for n in SHAPES}
    assert fit(loaded, low) == loaded.projections
    words = "layer 0 have rank 2, but those of this configuration are full. Leave forecast_rank at"
    with pytest.raises(ConfigError, match=words):
        fit(loaded)
    with pytest.raises(ConfigError, match=r"layer 0 are full, but .* have rank 2"):
        fit(make(), low)


def test_a_file_from_before_there_were_ranks_is_full(tmp_path):
    fields = dataclasses.asdict(INFO) | {"format_version": 1}
    del fields["ranks"], fields["selector"]
    tensors = {"0": torch.ones(8, 6), "1": torch.ones(8, 6)}
    path = tmp_path / "old.safetensors"
    save_file(tensors, path, metadata={"sparda_forecast": json.dumps(fields)})
    assert load_forecast(path).info == INFO


@pytest.mark.parametrize(
    ("shapes", "heads", "rank"),
    [
        ([], 1, None),
        ([(256, 4096, None)], 1, None),
        ([(1024, 4096, 192)] * 2, 1, None),
        ([(1024, 4096, None)], 1, 1024),
        ([(1024, 4096, 64), (1024, 4096, 64)], 1, 64),
        # As a rule that leaves small layers full makes them, and as forecast_rank=16 does.
        ([(256, 4096, None), (1024, 4096, 192)], 1, None),
        ([(16, 16, None), (1024, 4096, 16)], 1, 16),
        # The rule for one head is no rule for two, whose limits are twice as large.
        ([(1024, 4096, 192)], 2, 192),
        ([(1024, 4096, 400)], 2, None),
    ],
)
def test_weights_say_which_rank_their_program_has(shapes, heads, rank):
    shapes = [ProjectionShape(*shape) for shape in shapes]
    projections = {
        n: Projection(tuple(torch.empty(factor, device="meta") for factor in shape.factors))
        for n, shape in enumerate(shapes)
    }
    weights = ForecastWeights(projections)
    assert rank_of(weights, heads) == rank
    assert [ProjectionShape.of(s.rows, s.hidden, rank, heads) for s in shapes] == shapes
    config = following_weights(SpardaConfig(forecast_heads=heads), weights)
    assert (config.forecast_rank, config.forecast_heads) == (rank, heads)


@pytest.mark.parametrize(("own", "heads"), [(1, 2), (2, 1), (2, 4)])
def test_other_heads_than_those_of_the_weights_are_refused(own, heads):
    weights = ForecastWeights(make().projections, dataclasses.replace(INFO, heads=own))
    assert following_weights(SpardaConfig(), weights).heads_of_forecast == own
    words = f"have {own} heads for each KV head, but this configuration has forecast_heads={heads}"
    with pytest.raises(ConfigError, match=words):
        following_weights(SpardaConfig(forecast_heads=heads), weights)


def test_file_of_bare_tensors_says_nothing(tmp_path):
    ForecastWeights(make().projections).save(tmp_path / "bare.safetensors")
    assert load_forecast(tmp_path / "bare.safetensors").info is None


def test_description_that_is_no_description(tmp_path):
    path = tmp_path / "later.safetensors"
    later = dataclasses.asdict(INFO) | {"format_version": 5}
    fewer = dataclasses.asdict(INFO)
    del fewer["steps"]
    for text, words in (
        (json.dumps(later), "format_version is 5, this version reads 4"),
        (json.dumps(fewer), "its fields are"),
        ("[]", "format_version is None"),
        ("{", "cannot be read as Forecast weights"),
    ):
        save_file({"0": torch.zeros(1)}, path, metadata={"sparda_forecast": text})
        with pytest.raises(ConfigError, match=words):
            load_forecast(path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "weights"])
@pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
def test_released_checkpoint(tmp_path, wrapper, prefix):
    path = tmp_path / "ckpt-2000.pt"
    named = released(prefix) | {"model.norm.weight": torch.zeros(6)}
    torch.save({"step": 2000, wrapper: named} if wrapper else named, path)
    loaded = load_forecast(path)
    assert loaded.is_release
    # The projection of the last layer predicts a layer that is not there.
    assert sorted(loaded) == [0, 1, 2]
    fitting = fit(loaded)
    assert {layer: float(found.product()[0, 0]) for layer, found in fitting.items()} == {
        0: 0.0,
        1: 1.0,
    }


def test_released_checkpoint_without_the_useless_projection_or_in_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(released(layers=1) | {"lm_head.weight": torch.zeros(2, 2)}, path)
    assert sorted(fit(load_forecast(path))) == [0, 1]


def test_released_checkpoint_of_a_deeper_model_is_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save(released(layers=3), path)
    with pytest.raises(ConfigError, match=r"layers \[3\] are not in it"):
        fit(load_forecast(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model.layers.3.self_attn.q_curr_proj.weight": torch.zeros(1)}, "other than 0"),
        (
            {f"{p}layers.0.self_attn.q_future_proj.weight": torch.zeros(1) for p in ("a.", "b.")},
            "two tensors are for layer 1",
        ),
        ([1, 2], "it holds a list"),
        ({"lm_head.weight": torch.zeros(1)}, "lm_head.weight"),
    ],
)
def test_checkpoint_of_something_else(tmp_path, content, words):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=rf"other.pt.*cannot be read.*{words}"):
        load_forecast(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"weights": SpardaConfig()}, path)
    with pytest.raises(ConfigError, match=r"evil.pt.*cannot be read"):
        load_forecast(path)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none.pt.*no file.*train_forecast"):
        load_forecast(tmp_path / "none.pt")


def test_weights_that_fit_are_returned_by_layer(recwarn):
    weights = make()
    assert fit(weights).keys() == {0, 1}
    assert fit(dict(weights)).keys() == {0, 1}
    assert not recwarn.list


def test_weights_of_another_model():
    with pytest.raises(ConfigError, match=r"trained for LlamaForCausalLM, but the model is a Qwen"):
        fit(make(), model="Qwen3ForCausalLM")
    with pytest.raises(ConfigError, match=r"layer 0 have shape \(8, 6\).*needs \(16, 6\)"):
        fit(make(), {**SHAPES, 0: ProjectionShape(16, 6)})
    with pytest.raises(ConfigError, match=r"layers \[2\] are missing and layers \[\] are not"):
        fit(make(), {**SHAPES, 2: ProjectionShape(8, 6)})


def test_other_block_sizes_are_warned_of():
    with pytest.warns(UserWarning, match=r"block_size=32 \(trained with 64\).*less well"):
        fit(make(), block_size=32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.masked_fill(t > 1, float("nan")), "hold NaN or infinity"),
        (lambda t: t.masked_fill(t > 1, float("inf")), "hold NaN or infinity"),
        (lambda t: t.long(), "are torch.int64"),
        (lambda t: t > 0, "are torch.bool"),
        (lambda t: t.to(torch.complex64), "are torch.complex64"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", None])
def test_numbers_that_no_projection_has_are_refused(tmp_path, change, words, suffix):
    damaged = {0: torch.randn(8, 6), 1: change(torch.linspace(-2, 2, 48).view(8, 6))}
    if suffix is None:
        with pytest.raises(ConfigError, match=f"layer 1 .*{words}"):
            fit(damaged)
        return
    path = tmp_path / f"damaged{suffix}"
    if suffix == ".pt":
        names = {1: "layers.0.self_attn.q_future_proj.weight",
                 0: "layers.0.self_attn.q_curr_proj.weight"}  # fmt: skip
        torch.save({names[layer]: tensor for layer, tensor in damaged.items()}, path)
    else:
        save_file({str(layer): tensor for layer, tensor in damaged.items()}, path)
    with pytest.raises(ConfigError, match=words):
        load_forecast(path)


@pytest.mark.parametrize("given", [[torch.zeros(4, 4)], 3, torch.zeros(4, 4)])
def test_what_names_no_layers_is_refused(given):
    with pytest.raises(ConfigError, match=f"forecast is a {type(given).__name__}; pass a dict"):
        projections_of(given)


def test_a_wrapper_that_holds_itself_is_refused(tmp_path):
    wrapper = {}
    wrapper["state_dict"] = wrapper
    torch.save({"state_dict": wrapper}, tmp_path / "loop.pt")
    with pytest.raises(ConfigError, match="a wrapper in it holds itself"):
        load_forecast(tmp_path / "loop.pt")


def test_bad_path_is_a_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "f.safetensors", ""):
        with pytest.raises(ConfigError, match=r"cannot be written|is no path"):
            make().save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_another_selector_than_in_training_is_said_where_its_forecast_scores_other_keys():
    with pytest.warns(UserWarning, match=r"selector=lowbit2 \(trained with infllm2\)"):
        fit(make(), selector="lowbit2")
    low_bit = ForecastWeights(make().projections, dataclasses.replace(INFO, selector="lowbit2"))
    with pytest.warns(UserWarning, match=r"selector=infllm2 \(trained with lowbit2\)"):
        fit(low_bit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make(), selector="quest")
        fit(low_bit, selector="lowbit2")
