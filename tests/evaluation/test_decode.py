from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read, read_ahead
from sparda_compile.kernels.begin_prediction import WINDOW
from sparda_compile.testing import build, random_forecast, reference_decode, tiny_llama, tiny_nosa

START, STEPS = 300, 12
CONFIG = SpardaConfig(
    mode="query", top_k=2, local_blocks=1, block_size=16, pool_size=16, pool_stride=8,
    lowering="eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (2, START + STEPS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def forecast(model):
    named = random_forecast(model, seed=1)
    return {0: named["bootstrap"], **{layer + 1: named[layer] for layer in (0,)}}


@pytest.fixture(scope="module")
def optimized(model):
    """One tracing for all configurations."""
    return optimize(model, CONFIG)


@pytest.fixture(scope="module")
def reading(model, ids):
    return read(model, ids[:, :START])


def test_read_ahead_is_a_reading_and_the_dense_model(model, ids, reading):
    ahead, logits = read_ahead(model, ids, START)
    assert ahead.length == START
    for mine, other in zip(
        (*ahead.keys, *ahead.values), (*reading.keys, *reading.values), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, START:])


def program_logits(optimized, ids, config, forecast=None):
    """Return the logits of the steps from the program that `optimize` builds."""
    with torch.no_grad():
        fast = optimize(optimized, config, forecast=forecast)
        out = fast(ids[:, :START], logits_to_keep=1)
        logits = []
        for place in range(START, ids.shape[1]):
            step = ids[:, place : place + 1]
            out = fast(step, past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "dense"},
        {},
        {"selector": "quest"},
        {"mode": "forecast"},
        {"selector": "lowbit2"},
        {"mode": "forecast", "selector": "lowbit2"},
        {"mode": "exact", "hint": "previous_step"},
        {"mode": "dense", "kv_format": "int4"},
        {"kv_format": "int8"},
        {"selector": "lowbit2", "kv_format": "fp8"},
    ],
    ids=str,
)
def test_is_what_the_program_computes(model, optimized, ids, reading, forecast, changes):
    config = CONFIG.replace(**changes)
    weights = forecast if config.needs_forecast else None
    decoded = decode(model, reading, ids[:, START:], config, forecast=weights)
    truth = program_logits(optimized, ids, config, weights)
    torch.testing.assert_close(decoded.logits_BSV, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"selector": "quest"}, {"speculation_budget": 1.0, "ema_damping": 0.5}], ids=str
)
def test_a_union_is_what_the_program_computes(model, optimized, ids, reading, changes):
    """Predictions begin with the last 32 tokens of the prompt, which reads everything."""
    config = CONFIG.replace(
        mode="speculate", repair="union", offload="never", machine="h200",
        speculate_where="always", prefill="dense", **changes,
    )  # fmt: skip
    part = reading.before(START - WINDOW)
    decoded = decode(model, part, ids[:, START - WINDOW :], config, num_ahead=WINDOW)
    truth = program_logits(optimized, ids, config)
    torch.testing.assert_close(decoded.logits_BSV, truth, rtol=1e-4, atol=1e-4)
    exact = decode(model, reading, ids[:, START:], config.replace(repair="exact"))
    assert (exact.logits_BSV - truth).abs().max() > 1e-2
    for steps, others in zip(decoded.records, exact.records, strict=True):
        for record, other in zip(steps, others, strict=True):
            assert (record.read_BGN >= record.chosen["query"]).all()
            assert record.read_BGN.sum() > other.read_BGN.sum()


def test_a_format_that_rounds_changes_what_is_read_and_not_what_is_chosen(model, reading, ids):
    """In the first layer, whose query does not know of it; `mass` is that of what is read."""
    exact, rounded = (
        decode(model, reading, ids[:, START:], CONFIG.replace(kv_format=name))
        for name in ("model", "int4")
    )
    assert float((exact.logits_BSV - rounded.logits_BSV).abs().max()) > 1e-3
    for one, other in zip(exact.records, rounded.records, strict=True):
        assert torch.equal(one[0].read_BGN, other[0].read_BGN)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_dense_is_the_model_itself(name, ids):
    other = build(name)
    decoded = decode(
        other, read(other, ids[:, :START]), ids[:, START:], CONFIG.replace(mode="dense")
    )
    with torch.no_grad():
        truth = other(ids, logits_to_keep=STEPS).logits
    torch.testing.assert_close(decoded.logits_BSV, truth, rtol=1e-4, atol=1e-4)


def test_reading_serves_many_configurations(model, ids, reading):
    before = [keys.clone() for keys in reading.keys]
    first, second = (decode(model, reading, ids[:, START:], CONFIG) for _ in range(2))
    assert torch.equal(first.logits_BSV, second.logits_BSV)
    assert all(torch.equal(a, b) for a, b in zip(before, reading.keys, strict=True))


def test_records_keep_the_budget(model, ids, reading, forecast):
    decoded = decode(model, reading, ids[:, START:], CONFIG, forecast=forecast)
    assert len(decoded.records) == STEPS
    for step, layers in enumerate(decoded.records):
        current = (START + step) // 16
        for layer, record in enumerate(layers):
            torch.testing.assert_close(
                record.mass_BGN.sum(-1), torch.ones(2, record.mass_BGN.shape[1])
            )
            forced = torch.where(record.forced_BGN[0, 0])[0].tolist()
            assert forced == [0, current - 1, current]
            assert torch.equal(record.read_BGN, record.chosen["query"])
            expected = {"query", "forecast"}
            expected |= {"next_query", "previous_layer"} if layer else set()
            expected |= {"previous_step"} if step else set()
            assert set(record.chosen) == expected
            for name, chosen in record.chosen.items():
                count = chosen.sum(-1)
                # A block that has begun since the last step is forced on top.
                limit = 5 if name != "previous_step" else 6
                assert int(count.min()) >= 5
                assert int(count.max()) <= limit
                assert bool((chosen | ~record.forced_BGN).all())


def test_predictors_are_the_choices_they_stand_for(model, ids, reading):
    records = decode(model, reading, ids[:, START:], CONFIG).records
    assert torch.equal(records[3][1].chosen["previous_layer"], records[3][0].chosen["query"])
    before = records[2][1].chosen["query"] | records[3][1].forced_BGN
    assert torch.equal(records[3][1].chosen["previous_step"], before)


def test_mass_is_that_of_the_model(model, ids, reading):
    """With all blocks read, the mass is the attention that transformers computes."""
    decoded = decode(model, reading, ids[:, START : START + 1], CONFIG.replace(mode="dense"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[:, : START + 1], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for record, weights in zip(decoded.records[0], attentions, strict=True):
        groups, num_blocks = record.mass_BGN.shape[1:]
        last = weights[:, :, -1].unflatten(1, (groups, -1)).mean(2)
        padded = torch.nn.functional.pad(last, (0, 16 * num_blocks - last.shape[-1]))
        truth = padded.unflatten(-1, (num_blocks, 16)).sum(-1)
        torch.testing.assert_close(record.mass_BGN, truth, rtol=1e-4, atol=1e-5)


def test_forecast_is_missing(model, ids, reading):
    with pytest.raises(ConfigError, match="pass forecast"):
        decode(model, reading, ids[:, START:], CONFIG.replace(mode="forecast"))


def test_a_union_is_not_calibrated(model, ids, reading):
    config = CONFIG.replace(mode="speculate", repair="union", offload="never", ema_calibrate=True)
    with pytest.raises(ConfigError, match="ema_calibrate=True with repair='union'"):
        decode(model, reading, ids[:, START:], config)


def test_nothing_to_decode(model, ids, reading):
    with pytest.raises(ConfigError, match="no token"):
        decode(model, reading, ids[:, :0], CONFIG)


def test_other_architectures_are_refused():
    with pytest.raises(UnsupportedInputError, match="optimize"):
        read(build("gpt2"), torch.zeros(1, 4, dtype=torch.long))


SIZES = {"block_size": 16, "pool_size": 16, "pool_stride": 8, "local_blocks": 1}


@pytest.mark.parametrize("mode", ["dense", "query", "forecast"])
def test_retention_is_that_of_the_reference(ids, mode):
    other, budget = tiny_nosa(), {"top_k": 4, "short_list": 2, **SIZES}
    named = random_forecast(other, seed=1)
    tokens, logits = reference_decode(
        other, ids[0, :200], 8, mode=mode, selector="nosa", forecast=named, **budget
    )
    config = SpardaConfig(mode=mode, selector="nosa", **budget)
    reading = read(other, ids[:1, :200])
    forecast = {0: named["bootstrap"], 1: named[0]}
    decoded = decode(other, reading, torch.tensor([tokens[:-1]]), config, forecast=forecast)
    torch.testing.assert_close(decoded.logits_BSV[0], torch.stack(logits[1:]), rtol=0, atol=1e-3)
    predictors = {"query", "forecast", "next_query", "previous_layer", "previous_step"}
    assert set(decoded.records[1][1].chosen) == predictors


def test_model_without_retention_is_refused(model, ids, reading):
    config = CONFIG.replace(selector="nosa", short_list=1)
    with pytest.raises(UnsupportedInputError, match="keys that carry a retention score"):
        decode(model, reading, ids[:, START:], config)


def test_wider_keys_without_their_rule_are_refused(ids, monkeypatch):
    other = tiny_nosa()
    reading = read(other, ids[:1, :40])
    monkeypatch.delattr(type(other.model.layers[0].self_attn), "retention")
    with pytest.raises(UnsupportedInputError, match="go together"):
        decode(other, reading, ids[:1, :1], CONFIG)
