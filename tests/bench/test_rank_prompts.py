"""What decides alike on all ranks; two ranks run it in tests/e2e/test_ranks.py."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from sparda_compile.bench.prefill import PrefillSetting
from sparda_compile.bench.rank_prompts import (
    RankLab,
    RankPrograms,
    measure_prompts_on_ranks,
    shape_of_rank,
)
from sparda_compile.bench.result_file import ResultFile
from sparda_compile.bench.shapes import SHAPES, ModelShape
from sparda_compile.errors import ConfigError
from sparda_compile.ranks.agreement import Ranks


@pytest.fixture
def lab():
    """The second of two ranks; the process group is torch's `fake`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        made = RankLab("tiny", lambda text: None, torch.device("cpu"), 2, 100)
        assert made.model
        yield made
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook
        _clear_sharding_prop_cache()


def test_a_rank_computes_its_share_of_what_is_split():
    assert shape_of_rank(SHAPES["8b-8kv"], 8) == ModelShape(32, 4096, 2048, 4, 1, 128, 9181)
    assert shape_of_rank(SHAPES["tiny"], 2) == ModelShape(2, 64, 64, 2, 1, 16, 128)


def test_times_and_memory_are_those_that_all_ranks_go_by(lab, monkeypatch):
    asked = []
    monkeypatch.setattr(Ranks, "from_first", lambda self, value: asked.append(value) or 17.0)
    monkeypatch.setattr(Ranks, "least", lambda self, number: 1000)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    assert lab.clock() == 17.0
    assert asked == [5.0]
    assert (lab.room().device, lab.room().host) == (1000, 500)
    assert isinstance(lab.prompts, RankPrograms)
    assert lab.prompts.weight_bytes < sum(p.nbytes for p in lab.model.parameters())
    assert lab.rates.tflops == 1.0
    monkeypatch.setattr("sparda_compile.bench.prompt_programs.token_times", lambda *a, **k: [3.0])
    assert lab.prompts.generate("transformers_flash", torch.ones(1, 4), 2) == 17.0
    assert asked[-1] == [3.0]


def test_a_rank_that_is_not_the_first_writes_nothing(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(Ranks, "from_first", lambda self, value: value)

    def gather(said, mine):
        said[:] = [{"dense": {"peak_gpu_bytes": 1}}, mine]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    row = {"peak_gpu_bytes": 2, "first_token_s": 1.0}
    monkeypatch.setattr(
        "sparda_compile.bench.lab.Lab.prefill",
        lambda self, setting, file: (
            file.save({"tokens": 9, "programs": {"dense": row}}) or [setting, file]
        ),
    )
    path = tmp_path / "prefill.json"
    setting, file = lab.prefill(PrefillSetting((9,)), ResultFile(path, {"name": "x"}, "tokens"))
    assert setting.settings == {"lowering": "eager"}
    (result,) = file.results
    assert result["ranks"] == [{"dense": {"peak_gpu_bytes": 1}}, {"dense": {"peak_gpu_bytes": 2}}]
    assert not path.exists()
    file.is_first = True
    file.save({"tokens": 8, "programs": {}})
    assert [each["tokens"] for each in json.loads(path.read_text())["results"]] == [8, 9]


def test_another_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="--tp 2 was started in 3 processes"):
        measure_prompts_on_ranks("tiny", PrefillSetting((9,)), 2, print, None)
