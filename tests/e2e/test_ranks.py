"""Tensor parallel: 2 and 4 ranks say what one process says, and agree or stop together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparda_compile.forecast.projection import to_tensors
from sparda_compile.forecast.weights import load_forecast

CASES = Path(__file__).with_name("rank_cases.py")
spec = importlib.util.spec_from_file_location("rank_cases", CASES)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
works = cases.sibling("rank_works")

# What a sum in another order changes: float32, activations of about one.
ROUNDING = 2e-5


class Runs:
    """What one process, two ranks and four ranks said."""

    def __init__(self, folder):
        cases.sibling("rank_models").make_models(folder)
        works.make_texts(folder)
        ranks = cases.start(folder, "gloo")
        self.alone = {}
        for family in cases.FAMILIES:
            model = AutoModelForCausalLM.from_pretrained(folder / family).eval()
            self.alone[family], fast = cases.all_modes(folder, model, family)
            if family == "llama":
                whole = fast
                self.alone["variants"] = cases.variants(folder, fast)
        self.few, olmo2 = (
            AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("few", "olmo2")
        )
        olmo2 = cases.build(folder, "olmo2", olmo2, "forecast")
        self.alone["gathered"] = cases.said(olmo2)
        self.alone["gathered start"] = works.gathered_start(olmo2)
        self.alone["start"] = works.training_of_a_part(whole, 0)["start"]
        self.alone["trained"] = works.trained(whole, accumulate=2)
        alone = works.trained_by_command(folder, "", accumulate=2)
        self.alone["command"] = json.loads(alone)
        output, _ = ranks.communicate(timeout=240)
        assert ranks.returncode == 0, output[-6000:]
        self.four, self.two = (
            [torch.load(folder / f"{name}{rank}", weights_only=False) for rank in range(size)]
            for name, size in (("four", 4), ("two", 2))
        )
        self.files = {path.name: path for path in folder.glob("trained*")}
        self.prefill, self.turns = (
            json.loads((folder / f"{name}.json").read_text())["results"]
            for name in ("prefill", "turns")
        )
        self.ending = torch.load(folder / "ending", weights_only=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_two_ranks_say_what_one_process_says(runs, family, mode):
    one, first, second = (x[family][mode] for x in (runs.alone, *runs.two))
    assert torch.equal(first, second), "logits are the same bits on all ranks"
    torch.testing.assert_close(first, one, rtol=0, atol=ROUNDING)
    assert torch.equal(first.argmax(-1), one.argmax(-1))


@pytest.mark.parametrize("mode", cases.MODES_OF_FOUR)
def test_four_ranks_say_what_one_process_says(runs, mode):
    ranks = [x["llama"][mode] for x in runs.four]
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])
    torch.testing.assert_close(ranks[0], runs.alone["llama"][mode], rtol=0, atol=ROUNDING)
    assert torch.equal(ranks[0].argmax(-1), runs.alone["llama"][mode].argmax(-1))


def test_each_rank_keeps_the_heads_that_are_its_own(runs):
    assert [x["heads"] for x in runs.two] == [[2, 2]] * 2
    assert [x["heads"] for x in runs.four] == [[1, 1]] * 4


def test_a_report_says_what_one_rank_has(runs):
    for rank in runs.two:
        assert "Each of 2 ranks: 2 KV heads of a layer; a step has" in rank["report"]


@pytest.mark.parametrize("variant", ["on the device", "late"])
def test_where_blocks_are_and_when_they_come_changes_no_bit(runs, variant):
    for rank in runs.two:
        assert torch.equal(rank["variants"][variant], rank["llama"]["forecast"])


def test_chunks_of_a_prompt_say_what_one_process_says(runs):
    alone = runs.alone["variants"]["in chunks"]
    for rank in runs.two:
        torch.testing.assert_close(rank["variants"]["in chunks"], alone, rtol=0, atol=ROUNDING)


def test_a_mixture_of_hints_says_what_one_process_says(runs):
    alone = runs.alone["variants"]["mixture"]
    for rank in runs.two:
        torch.testing.assert_close(rank["variants"]["mixture"], alone, rtol=0, atol=ROUNDING)


def test_rounded_blocks_are_those_of_one_process(runs):
    """But where a sum in another order takes an element over the edge of a code."""
    first, second = (x["variants"] for x in runs.two)
    alone = runs.alone["variants"]["int8, always"]
    assert torch.equal(first["int8, always"], second["int8, always"])
    assert torch.equal(first["int8, always"], first["int8, never"])
    assert not torch.equal(first["int8, always"], runs.two[0]["llama"]["forecast"])
    off = (first["int8, always"] - alone).abs()
    lost = (runs.alone["llama"]["forecast"] - alone).abs()
    assert off.mean() < 0.1 * lost.mean()


def test_greedy_texts_are_those_of_one_process(runs):
    for rank in runs.two:
        assert torch.equal(rank["variants"]["greedy"], runs.alone["variants"]["greedy"])


def test_sampled_texts_are_one_text_that_of_the_first_rank(runs):
    first, second = (x["variants"]["sampled"] for x in runs.two)
    assert torch.equal(first, second)
    assert torch.equal(first, runs.alone["variants"]["sampled"]), "its random state was used"
    assert not torch.equal(
        first[:, -cases.SAMPLED :], runs.two[0]["variants"]["greedy"][:, -cases.SAMPLED :]
    )


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other tokens", "RanksDisagreeError: generate is not the same on all ranks: input_ids"),
        ("other tokens in forward", "a call of forward is not the same on all ranks: input_ids"),
        ("other length", "of rank 1 is [3, 89] torch.int64"),
        ("max_time", "each would stop by its own clock"),
        ("save", "SpardaCache.save is not supported for a model that 2 ranks share"),
        ("load", "load_cache is not supported for a model that 2 ranks share"),
        ("other configuration", "optimize is not the same on all ranks: config of rank 1"),
        ("other order", "first run of the prefill is not the same on all ranks: the order of coll"),
    ],
)
def test_ranks_that_differ_are_refused_on_every_rank(runs, case, words):
    for rank in runs.two:
        assert words in rank["refused"][case]


def test_what_one_rank_raises_the_others_are_told(runs):
    first, second = (x["refused"]["one alone"] for x in runs.two)
    assert (
        "RanksDisagreeError: generate failed on rank 1, so no rank runs it: KVCacheError" in first
    )
    assert second.startswith("KVCacheError: prompt and new tokens")
    assert "need 592 tokens" in second


def test_a_module_goes_on_after_a_refusal(runs):
    first, second = (x["refused"]["afterwards"] for x in runs.two)
    assert torch.equal(first, second)
    assert first.shape == (3, 92)


def test_a_rank_that_dies_ends_the_others_with_a_clear_error(runs):
    assert runs.ending["lost"].startswith(
        "RankLostError: all_reduce failed: another rank has ended"
    )


@pytest.mark.parametrize("call", ["destroyed", "destroyed in generate"])
def test_without_its_process_group_a_module_says_so(runs, call):
    assert "that the model was sharded over is gone" in runs.ending[call]


def test_heads_that_ranks_cannot_share_equally_are_refused_with_the_numbers(runs):
    for rank in runs.four:
        assert "has 12 query heads and 6 KV heads, which 4 ranks cannot share" in rank["odd heads"]
        assert "use 1, 2, 3, 6 ranks" in rank["odd heads"]


def test_heads_that_a_plan_gathers_are_kept_by_every_rank(runs):
    first, second = (rank["gathered"] for rank in runs.two)
    assert [rank["gathered heads"] for rank in runs.two] == [[1, 1]] * 2
    assert torch.equal(first, second)
    torch.testing.assert_close(first, runs.alone["gathered"], rtol=0, atol=ROUNDING)


def test_transformers_itself_fails_on_fewer_kv_heads_than_ranks(runs):
    """Why such a model is refused: docs/parallel.md."""
    with torch.no_grad():
        whole = runs.few(cases.prompt()[0][:1]).logits
    for rank in runs.four:
        few = rank["few heads"]
        assert "shape '[1, 90, -1, 8]' is invalid for input of size 360" in few["transformers"]
        assert "into 4 parts, 0.5 heads each, and its own forward fails" in few["ours"]
        assert (few["whole keys"] - whole).abs().max() > 0.1, "whole keys: another text, no error"
        assert "leaves every rank all of the second" in few["ours of whole keys"]


def test_prompts_are_measured_on_two_ranks(runs):
    (prompt,) = runs.prefill
    ours = prompt["programs"]["sparse_query"]
    assert ours["compared"]["phase"] == "sparse_prefill"
    assert ours["compared"]["same_token"]
    assert ours["first_token_s"]["median"] > 0
    (first, second) = (rank["sparse_query"]["host_kv_bytes"] for rank in prompt["ranks"])
    assert first == second == ours["host_kv_bytes"] > 0


def test_turns_are_measured_on_two_ranks(runs):
    (turns,) = runs.turns
    for row in turns["programs"].values():
        assert all(row["by_turn"][turn]["median"] > 0 for turn in ("1", "20"))
    compared = turns["programs"]["sparse_query"]["by_turn"]["20"]["compared"]
    assert (compared["phase"], compared["same_token"]) == ("sparse_prefill", True)
    assert set(turns["transformers_over"]["20"]) == {"program", "sparse_query"}
    assert len(turns["ranks"]) == 2


def test_two_processes_train_as_one_that_has_their_batches(runs):
    first, second = (rank["replicas"] for rank in runs.two)
    alone = runs.alone["trained"]
    for name, mine in first["weights"].items():
        torch.testing.assert_close(mine, alone["weights"][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(mine, second["weights"][name])
    assert [each[2] for each in first["reports"]] == [200, 200, 100, 100]
    for number, (mine, its) in enumerate(zip(first["reports"], alone["reports"], strict=True)):
        torch.testing.assert_close(mine[0], its[0], rtol=1e-4, atol=1e-6)
        if number > 1:  # held out; a step looks at the recall of each process's last batch alone
            torch.testing.assert_close(mine[1], its[1], rtol=1e-4, atol=1e-6)
    assert second["reports"] == [], "only the first process reports"


def test_replicas_that_share_a_model_train_as_one_process(runs):
    """`sparda train --tp 2` on four processes: two replicas."""
    first, *others = (rank["trained"] for rank in runs.four)
    assert others == [""] * 3, "only the first process prints"
    said, alone = json.loads(first), runs.alone["command"]
    assert (said["processes"], said["tp"]) == (4, 2)
    assert said["documents"] == alone["documents"]
    assert said["documents"]["held_out_sequences"] > 0
    assert said["forecast"]["groups"] == alone["forecast"]["groups"] == [4, 4]
    assert said["forecast"]["ranks"] == alone["forecast"]["ranks"] == [12, 12]
    assert [each["num_tokens"] for each in said["steps"]] == [200, 200]
    for mine, its in zip(said["steps"], alone["steps"], strict=True):
        torch.testing.assert_close(mine["losses"], its["losses"], rtol=1e-4, atol=1e-6)
    for mine, its in zip(said["held_out"], alone["held_out"], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    mine, its = (runs.files[f"trained{rank}.safetensors"] for rank in ("0", ""))
    mine, its = (to_tensors(load_forecast(path).projections) for path in (mine, its))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_only_the_first_process_writes_what_was_trained(runs):
    names = (f"trained{rank}.safetensors{end}" for rank in ("", "0") for end in ("", ".checkpoint"))
    assert sorted(runs.files) == sorted(names)


def test_a_sharded_model_starts_from_the_forecast_of_all_heads(runs):
    first, second = (rank["training"]["start"] for rank in runs.two)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        torch.testing.assert_close(weight, runs.alone["start"][name], rtol=1e-4, atol=1e-6)


def test_heads_that_a_plan_gathers_start_as_on_one_process(runs):
    """Their queries are made by all ranks, and so is the derivative that a Forecast starts from."""
    first, second = (rank["gathered start"] for rank in runs.two)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        torch.testing.assert_close(weight, runs.alone["gathered start"][name], rtol=0, atol=1e-6)


def test_ranks_that_share_a_model_train_on_the_same_batches(runs):
    for rank in runs.two:
        assert (
            "a step of training is not the same on all ranks: batch 0"
            in (rank["training"]["other batches"])
        )
