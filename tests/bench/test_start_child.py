"""One process of `sparda bench start`, run in this one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sparda_compile import progress
from sparda_compile.bench import start_child
from sparda_compile.bench.start_child import TOKENS, Job, Scenario, run_job
from sparda_compile.errors import ConfigError, HostPoolFullError


def job(program, *scenarios):
    return Job(program, "tiny", 1, "cpu", "query", "eager", scenarios)


def found_by(job):
    found = []
    run_job(job, found.append)
    json.dumps(found)
    return found


@pytest.mark.parametrize(("text", "sizes"), [("1x300", (1, 300)), ("16x131072", (16, 131072))])
def test_scenario(text, sizes):
    scenario = Scenario.parse(text)
    assert (scenario.batch_size, scenario.num_tokens) == sizes
    assert str(scenario) == text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        *((text, "such as 4x1024") for text in ("", "4", "4x", "x4", "4x-1", "1024*4", "2x3x4")),
        ("0x300", "use 1 or more of both"),
        ("2x0", "use 1 or more of both"),
    ],
)
def test_scenario_that_is_none(text, what):
    with pytest.raises(ConfigError, match=f"--scenario {text}".replace("*", r"\*")) as caught:
        Scenario.parse(text)
    assert what in str(caught.value)


@pytest.mark.parametrize("program", ["dynamic", "static"])
def test_baseline(program):
    imports, model, *scenarios = found_by(job(program, "1x20", "2x9"))
    assert list(imports["import_s"]) == ["torch", "transformers"]
    assert model["model_s"] > 0
    assert [found["scenario"] for found in scenarios] == ["1x20", "2x9"]
    for found in scenarios:
        assert set(found) == {"scenario", "first_use", "repeat"}
        for use in (found["first_use"], found["repeat"]):
            assert tuple(use["token_s"]) == TOKENS
            assert min(use["token_s"].values()) > 0
            assert use["total_s"] >= sum(use["token_s"].values())
            assert use["stage_s"] == use["stage_counts"] == {}


def test_ours():
    imports, _, optimized, scenario = found_by(job("sparda", "2x20"))
    assert list(imports["import_s"]) == ["torch", "transformers", "sparda_compile"]
    assert optimized["optimize"]["total_s"] > 0
    assert "num_compilations" in optimized["optimize"]
    assert "num_compilations" in scenario
    for use in (scenario["first_use"], scenario["repeat"]):
        assert tuple(use["token_s"]) == TOKENS
        assert set(use["stage_s"]) == set(use["stage_counts"])


def test_stages_of_ours(monkeypatch):
    """Stages are those that begin in optimize and in each call."""

    class Fast:
        def __init__(self, model):
            self.model = model
            self.config = model.config
            self.sparda = self
            self.num_compilations = {"prefill": 0, "decode": 0}

        def generate(self, ids, **settings):
            if not self.num_compilations["prefill"]:
                with progress.stage("compile", "prefill"):
                    self.num_compilations = {"prefill": 1, "decode": 2}
            return self.model.generate(ids, **settings)

    def optimize(model, config):
        assert (config.mode, config.lowering) == ("query", "eager")
        with progress.stage("capture"), progress.stage("passes"):
            return Fast(model)

    monkeypatch.setattr("sparda_compile.api.optimize", optimize)
    _, _, optimized, one, two = found_by(job("sparda", "1x20", "1x20"))
    assert optimized["optimize"]["stage_counts"] == {"capture": 1, "passes": 1}
    assert set(optimized["optimize"]["stage_s"]) == {"capture", "passes"}
    assert optimized["optimize"]["num_compilations"] == {"prefill": 0, "decode": 0}
    assert one["first_use"]["stage_counts"] == {"compile": 1}
    assert one["num_compilations"] == {"prefill": 1, "decode": 2}
    assert one["repeat"]["stage_counts"] == two["first_use"]["stage_counts"] == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, HostPoolFullError])
def test_scenario_without_memory_is_skipped(monkeypatch, error):
    def measure(model, job, scenario, seed):
        if scenario.batch_size == 9:
            raise error("no room\nfor much")
        return {"seed": seed}

    monkeypatch.setattr(start_child, "_measure", measure)
    *_, one, two = found_by(job("dynamic", "9x20", "1x20"))
    assert one == {"scenario": "9x20", "skipped": "out of memory: no room"}
    assert two == {"scenario": "1x20", "seed": 1}


def test_numbers_are_rounded_and_counts_kept():
    plain = {"a": {"b": 0.123456, "n": 3}, "text": "1x2", "list": [1]}
    assert start_child._rounded(plain) == {"a": {"b": 0.1235, "n": 3}, "text": "1x2", "list": [1]}


def test_main_writes_what_is_found(monkeypatch, tmp_path):
    path = tmp_path / "found.jsonl"

    def run(job, tell):
        tell({"scenario": job.scenarios[0], "first_use": {"total_s": 0.12345678}})

    monkeypatch.setattr(start_child, "run_job", run)
    monkeypatch.setattr(start_child.time, "time", lambda: 100.25)
    plain = json.dumps(job("dynamic", "1x20").__dict__)
    monkeypatch.setattr(sys, "argv", ["-c", plain, str(path), "100.0"])
    start_child.main()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"import_s": {"python": 0.25}},
        {"scenario": "1x20", "first_use": {"total_s": 0.1235}},
    ]


def test_importing_it_imports_nothing_that_is_measured():
    code = (
        "import sys, sparda_compile.bench.start_child\n"
        "print([name for name in ('torch', 'transformers', 'rich', 'sparda_compile.api') "
        "if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")
