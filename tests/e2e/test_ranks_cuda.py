"""Tensor parallel on two GPUs: NCCL inside of one CUDA graph a rank, and what one GPU says.

pytest -m gpu tests/e2e/test_ranks_cuda.py                      needs two GPUs of one host
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("rank_cases.py")
spec = importlib.util.spec_from_file_location("rank_cases", CASES)
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs of one host"),
]
# What a sum in another order changes: float32, activations of about one.
ROUNDING = 1e-4


class Runs:
    """What one GPU and two GPUs said."""

    def __init__(self, folder):
        cases.sibling("rank_models").make_models(folder)
        ranks = cases.start(folder, "nccl", 2)
        output, _ = ranks.communicate(timeout=500)
        assert ranks.returncode == 0, output[-6000:]
        self.two = [torch.load(folder / f"two{rank}", weights_only=False) for rank in range(2)]
        self.alone = {}
        for family in cases.FAMILIES:
            model = cases.read(folder / family).cuda()
            self.alone[family], fast = cases.all_modes(folder, model, family)
            if family == "llama":
                self.alone["variants"] = cases.variants(folder, fast)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("gpu_ranks"))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_two_gpus_say_what_one_says(runs, family, mode):
    one, first, second = (x[family][mode] for x in (runs.alone, *runs.two))
    assert torch.equal(first, second), "logits are the same bits on all ranks"
    torch.testing.assert_close(first, one, rtol=0, atol=ROUNDING)
    assert torch.equal(first.argmax(-1), one.argmax(-1))


@pytest.mark.parametrize("variant", ["on the device", "late"])
def test_where_blocks_are_and_when_they_come_changes_no_bit(runs, variant):
    for rank in runs.two:
        assert torch.equal(rank["variants"][variant], rank["llama"]["forecast"])


def test_texts_of_two_gpus_are_one_text(runs):
    first, second = (x["variants"] for x in runs.two)
    assert torch.equal(first["greedy"], runs.alone["variants"]["greedy"])
    assert torch.equal(first["greedy"], second["greedy"])
    assert torch.equal(first["sampled"], second["sampled"])


def test_gpus_that_differ_are_refused(runs):
    for rank in runs.two:
        assert "input_ids" in rank["refused"]["other tokens"]
        assert "the order of collectives" in rank["refused"]["other order"]


def test_a_step_of_each_rank_is_one_cuda_graph(runs):
    assert [rank["graphs"] for rank in runs.two] == [1, 1]


def test_a_process_that_ends_does_not_let_the_other_hang(tmp_path):
    cases.sibling("rank_models").make_models(tmp_path)
    ranks = cases.start(tmp_path, "dying", 2)
    try:
        output, _ = ranks.communicate(timeout=180)
    finally:
        ranks.kill()
    assert "RankLostError: a replayed step did not end within 15 s" in output, output[-3000:]
