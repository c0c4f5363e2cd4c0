from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.guesses import REFERENCES
from sparda_compile.evaluation.run import budget_config, evaluate
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.evaluation.vocabulary import NUM_TOKENS

CONFIG = SpardaConfig(
    mode="query", top_k=3, local_blocks=1, block_size=16, pool_size=16, pool_stride=8,
    lowering="eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def found(model):
    configs = {
        "dense": CONFIG.replace(mode="dense"),
        "few": CONFIG,
        "all": CONFIG.replace(top_k=None),
    }
    return evaluate(
        model, configs, tasks=["single_needle", "multi_value"], length=240, num_samples=5,
        batch_size=2,
    )  # fmt: skip


def test_one_row_for_each_task_and_configuration(found):
    names = [(row.task, row.name) for row in found.rows]
    tasks = ("single_needle", "multi_value")
    assert names == [(task, name) for task in tasks for name in ("dense", "few", "all")]
    assert {row.num_samples for row in found.rows} == {5}
    assert {row.num_blocks for row in found.rows} == {15}


def test_reading_everything_is_the_dense_model(found):
    for row in found.rows:
        if row.name != "few":
            assert row.kl == pytest.approx(0.0, abs=1e-5)
            assert row.agreement == 1.0
            assert row.budget == 1.0
        else:
            assert row.kl > 1e-4
            assert row.budget == 6 / 15


def test_recalls_are_there_where_there_is_a_budget(found):
    by_name = {row.name: row for row in found.rows if row.task == "multi_value"}
    assert by_name["all"].recalls == ()
    recalls = {(recall.name, recall.layer): recall for recall in by_name["few"].recalls}
    names = {"query", "oracle", "next_query", "previous_layer", "previous_step"}
    assert {name for name, _ in recalls} == names
    assert ("next_query", 0) not in recalls
    assert recalls["query", None].blocks == 1.0
    for layer in (None, 0, 1):
        best = recalls["oracle", layer].mass
        assert all(recall.mass <= best + 1e-6 for key, recall in recalls.items() if key[1] == layer)
    assert all(recall.mass_low <= recall.mass <= recall.mass_high for recall in recalls.values())


def test_a_model_that_knows_the_answers_is_always_right(model, monkeypatch):
    """The whole way from tokens to accuracy, with logits that are right by construction."""
    batch = make_batch("multi_query", batch_size=3, length=240, seed=7)

    class Knowing:
        def __init__(self, logits, records):
            self.logits_BSV, self.records = logits, records

    def decode(_, reading, ids, config, forecast, num_ahead=0):
        following = torch.cat([batch.ids_BT, batch.ids_BT[:, :1]], 1)[:, reading.length + 1 :]
        logits = torch.nn.functional.one_hot(following[:, : ids.shape[1]], NUM_TOKENS).float()
        if config.mode == "query":
            logits[0] = 0.0
        return Knowing(logits, [])

    monkeypatch.setattr("sparda_compile.evaluation.run.decode", decode)
    configs = {"dense": CONFIG.replace(mode="dense", top_k=None), "few": CONFIG.replace(top_k=None)}
    found = evaluate(
        model, configs, tasks=["multi_query"], length=240, num_samples=3, batch_size=3, seed=7
    )
    assert [row.num_right for row in found.rows] == [3, 2]
    assert found.rows[1].accuracy == pytest.approx(2 / 3)
    assert found.rows[1].low < 2 / 3 < found.rows[1].high < 1.0


def test_json_has_no_nan(found):
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["model"] == "LlamaForCausalLM"
    assert all(not math.isnan(row.kl) for row in found.rows)


def test_budget_is_a_share_of_the_blocks():
    config = budget_config(SpardaConfig(mode="query", local_blocks=4), 16384, 0.1)
    assert config.num_selected(256) == 26
    assert budget_config(config, 16384, 1.0).top_k is None
    # A part of a block is a block.
    assert budget_config(config, 16385, 0.5).num_selected(257) == 129


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_budget_is_no_share(share):
    with pytest.raises(ConfigError, match="is not a share"):
        budget_config(CONFIG, 1000, share)


def test_budget_without_room():
    with pytest.raises(ConfigError, match="34 that are always read"):
        budget_config(SpardaConfig(mode="query"), 4096, 0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["poetry"]}, "poetry.*use some of single_needle"),
        ({"tasks": []}, "use some of"),
        ({"num_samples": 0}, "nothing to measure"),
        ({"configs": {}}, "nothing to measure"),
    ],
)
def test_wrong_arguments(model, changes, words):
    arguments = {"configs": {"few": CONFIG}, "tasks": ["single_needle"], "num_samples": 1} | changes
    configs = arguments.pop("configs")
    with pytest.raises(ConfigError, match=words):
        evaluate(model, configs, length=100, **arguments)


def test_guesses_are_counted_where_they_are_asked_for(model):
    configs = {"dense": CONFIG.replace(mode="dense", top_k=None), "few": CONFIG}
    asked = {"tasks": ["multi_value"], "length": 240, "num_samples": 2, "batch_size": 2}
    plain = evaluate(model, configs, **asked)
    found = evaluate(model, configs, hints=["ema"], **asked)
    assert all(row.guesses == () for row in plain.rows)
    assert found.rows[0].guesses == ()
    few = found.rows[1]
    assert {guess.name for guess in few.guesses} == {"ema", *REFERENCES}
    assert (few.accuracy, few.kl) == (plain.rows[1].accuracy, plain.rows[1].kl)
    assert {guess.layer for guess in few.guesses} == {None, 0, 1}
