"""`sparda bench prefill` and `sparda bench turns`, with a tiny model on a CPU from end to end."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.bench.lab import Lab
from sparda_compile.bench.memory import FreeMemory
from sparda_compile.bench.prefill import PrefillSetting
from sparda_compile.bench.prompt_floor import Rates
from sparda_compile.bench.suite import PARTS
from sparda_compile.bench.turns import TurnSetting
from sparda_compile.cli import labs
from sparda_compile.cli import main as cli
from sparda_compile.cli.prompts import prompt_part

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
SMALL = {"lowering": "eager", "block_size": 16, "top_k": 4, "local_blocks": 2, "short_list": 2}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


class TinyLab(Lab):
    """A lab on a CPU whose programs have small blocks; remembers what it was asked for."""

    asked = ()

    def prefill(self, setting, file):
        self.asked.append(setting)
        settings = {**SMALL, **setting.settings}
        return super().prefill(dataclasses.replace(setting, settings=settings), file)

    def turns(self, setting, file):
        self.asked.append(setting)
        settings = {**SMALL, **setting.settings}
        return super().turns(dataclasses.replace(setting, settings=settings), file)


@pytest.fixture(scope="module")
def tiny():
    lab = TinyLab("tiny", lambda text: None, device="cpu")
    assert lab.model
    return lab


@pytest.fixture
def lab(tiny, monkeypatch):
    """The lab that the commands get; its machine has room for everything."""
    tiny.asked = []
    room = FreeMemory(1 << 40, 1 << 40)
    monkeypatch.setattr(FreeMemory, "now", classmethod(lambda cls, limit=None: room))
    monkeypatch.setattr(Rates, "measure", classmethod(lambda cls, device: Rates(0.05, 5.0)))
    monkeypatch.setattr(labs, "require_gpu", lambda command: None)
    monkeypatch.setattr(labs, "make_lab", lambda shape, say, max_host_gib: tiny)
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")
    yield tiny
    tiny.prompts.drop()


def test_prefill(lab, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "prefill.svg"
    result = run(
        "prefill", "--shape", "tiny", "--tokens", 200, "--tokens", 40, "--program", "sparse_query",
        "--program", "dense", "--rounds", 1, "--out", tmp_path, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (setting,) = lab.asked
    assert setting.tokens == (200, 40)
    assert setting.programs == ("sparse_query", "dense", "transformers_cudnn", "transformers_flash")
    assert (setting.rounds, setting.limit_s, setting.settings) == (1, 130.0, {})
    found = json.loads((tmp_path / "prefill-tiny.json").read_text())
    assert (found["name"], found["shape"]) == ("prefill", "tiny")
    assert found["environment"]["commit"] == "abc123"
    assert [r["tokens"] for r in found["results"]] == [40, 200]
    for each in found["results"]:
        assert list(each["programs"]) == ["sparse_query", "dense", "transformers_flash"]
    assert "200 sparse_query" in words(result.stdout)
    assert "40 tokens: transformers_cudnn is left out: torch has no such" in words(result.stdout)
    assert "prefill-tiny.json" in result.stdout
    assert plot.read_text().count("<svg") == 1


def test_prefill_as_json_goes_on_where_it_was(lab, tmp_path):
    arguments = ("prefill", "--shape", "tiny", "--tokens", 40, "--out", tmp_path, "--json")
    first = run(*arguments, "--no-baseline", "--program", "dense", "--commit", "1a2b")
    assert first.exit_code == 0, first.output
    (before,) = json.loads(first.stdout)["results"]
    assert list(before["programs"]) == ["dense"]
    assert not before["skipped"]
    second = run(*arguments, "--no-baseline", "--commit", "1a2b", "--rounds", 1)
    (after,) = json.loads(second.stdout)["results"]
    assert list(after["programs"]) == ["sparse_forecast", "sparse_query", "dense"]
    assert after["programs"]["dense"] == before["programs"]["dense"]
    # Chunks that are asked for are another measurement.
    other = run(
        *arguments, "--no-baseline", "--commit", "1a2b", "--chunk-tokens", 64, "--minutes", 0
    )
    assert lab.asked[-1].settings == {"chunk_tokens": 64}
    (same,) = json.loads(other.stdout)["results"]
    assert same["programs"] == after["programs"]
    assert "minutes, and 0.0 are left" in same["skipped"]["dense"]
    assert "unfinished" in same


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"selector": "lowbit2"}, "prefill-tiny-lowbit2.json"),
        ({"selector": "quest"}, "prefill-tiny-quest.json"),
        (
            {"selector": "lowbit4", "prefill_selector": "infllm2"},
            "prefill-tiny-lowbit4-prompts-infllm2.json",
        ),
    ],
)
def test_prefill_by_another_selector(lab, tmp_path, chosen, name):
    options = [w for k, value in chosen.items() for w in (f"--{k.replace('_', '-')}", value)]
    programs = ("sparse_forecast", "sparse_query", "dense", "sparse_resident")
    named = [word for program in programs for word in ("--program", program)]
    few = ("--tokens", 200, "--rounds", 1, "--no-baseline", "--out", tmp_path)
    result = run("prefill", "--shape", "tiny", *few, *named, *options)
    assert result.exit_code == 0, result.output
    assert {lab.prompts.config(program).selector for program in programs} == {chosen["selector"]}
    wanted = chosen.get("prefill_selector")
    assert {lab.prompts.config(program).prefill_selector for program in programs} == {wanted}
    found = json.loads((tmp_path / name).read_text())
    assert {key: found[key] for key in chosen} == chosen
    (each,) = found["results"]
    assert set(each["programs"]) == set(programs)
    compared = {program: row["compared"]["phase"] for program, row in each["programs"].items()}
    assert compared == dict.fromkeys(programs, "sparse_prefill") | {"dense": "prefill"}
    assert words(result.stdout).startswith(f"selector {chosen['selector']}")


def test_prefill_by_candidates(lab, tmp_path):
    few = ("--tokens", 200, "--rounds", 1, "--no-baseline", "--out", tmp_path)
    options = ("--selector", "lowbit2", "--prefill-candidates", 2)
    programs = ("--program", "sparse_query", "--program", "sparse_forecast")
    result = run("prefill", "--shape", "tiny", *few, *options, *programs)
    assert result.exit_code == 0, result.output
    assert lab.prompts.config("sparse_query").prefill_candidates == 2.0
    assert lab.prompts.config("sparse_forecast").prefill_candidates is None
    found = json.loads((tmp_path / "prefill-tiny-lowbit2-candidates2.0.json").read_text())
    assert found["prefill_candidates"] == 2.0
    assert words(result.stdout).startswith("selector lowbit2, 2.0x candidates")


def test_selector_nosa_needs_another_model(lab, tmp_path):
    few = ("--tokens", 200, "--no-baseline", "--program", "sparse_query", "--out", tmp_path)
    result = run("prefill", "--shape", "tiny", *few, "--selector", "nosa", "--minutes", 1)
    assert result.exit_code == 1, result.output
    assert "reads a retention score from the last channel of each key" in words(result.stderr)


def test_turns(lab, tmp_path):
    result = run(
        "turns", "--shape", "tiny", "--past", 300, "--tokens", 1, "--tokens", 20, "--rounds", 1,
        "--program", "sparse_forecast", "--out", tmp_path, "--selector", "lowbit2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (setting,) = lab.asked
    assert setting.settings == {"selector": "lowbit2"}
    assert (setting.past, setting.turns, setting.rounds) == ((300,), (1, 20), 1)
    found = json.loads((tmp_path / "turns-tiny-lowbit2.json").read_text())
    assert (found["name"], found["shape"]) == ("turns", "tiny")
    assert found["selector"] == "lowbit2"
    (each,) = found["results"]
    assert list(each["programs"]["sparse_forecast"]["by_turn"]) == ["1", "20"]
    assert each["transformers_over"]["20"]["program"] == "transformers_flash"
    assert "300 20 sparse_forecast" in words(result.stdout)
    assert "turns-tiny-lowbit2.json" in result.stdout


def test_turns_as_json(lab, tmp_path):
    result = run(
        "turns", "--shape", "tiny", "--past", 50, "--tokens", 3, "--rounds", 1, "--no-baseline",
        "--program", "dense", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert list(found["programs"]) == ["dense"]
    assert found["transformers_over"] == {}


def test_parts_of_all_are_done_when_their_result_is_whole(lab, tmp_path):
    prefill, turns = (
        prompt_part(what, "tiny", 40, 1.0, (tmp_path, "1a2b"), lambda shape: lab)
        for what in ("prefill", "turns")
    )
    assert (prefill.name, turns.name) == ("prefill tiny 40 tokens", "turns tiny behind 40 tokens")
    assert not prefill.is_done()
    prefill.run()
    assert prefill.is_done()
    assert not turns.is_done()
    assert lab.asked[0].minutes == 2.0
    head = {"environment": environment.describe("1a2b"), "name": "turns", "shape": "tiny"}
    head["repeat"] = TurnSetting().repeat
    rows = {name: {"by_turn": {"1": {}, "200": {}}} for name in TurnSetting().programs[1:]}
    each = {"past": 40, "programs": rows, "skipped": {TurnSetting().programs[0]: "no memory"}}
    path = tmp_path / "turns-tiny.json"
    path.write_text(json.dumps({**head, "results": [each]}))
    assert not turns.is_done()
    for row in rows.values():
        row["by_turn"]["4000"] = {}
    path.write_text(json.dumps({**head, "results": [each]}))
    assert turns.is_done()
    path.write_text(json.dumps({**head, "results": [{**each, "unfinished": "more"}]}))
    assert not turns.is_done()


def test_every_prompt_of_all_can_be_asked_for(lab, tmp_path):
    for what, shape, size, minutes in PARTS:
        if what != "decode":
            part = prompt_part(what, shape, size, minutes, (tmp_path, None), lambda shape: lab)
            assert part.minutes == minutes
            assert not part.is_done()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prefill", "--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["prefill", "--tokens", 1], "--tokens"),
        (["prefill", "--program", "fast"], "not one of 'sparse_forecast'"),
        (["prefill", "--rounds", 0], "--rounds"),
        (["prefill", "--chunk-tokens", 0], "--chunk-tokens"),
        (["prefill", "--selector", "forecast"], "not one of 'infllm2'"),
        (["turns", "--past", 0], "--past"),
        (["turns", "--tokens", 0], "--tokens"),
    ],
)
def test_wrong_usage(lab, arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in words(result.stderr)
    assert lab.asked == []


def test_defaults(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(Lab, "prefill", lambda *args: [])
    monkeypatch.setattr(Lab, "turns", lambda *args: [])
    for command in ("prefill", "turns"):
        assert run(command, "--out", tmp_path).exit_code == 0
    prefill, turns = lab.asked
    assert (prefill, turns) == (PrefillSetting(), TurnSetting())
    assert prefill.tokens == (1024, 131072, 32768, 524288, 1048576, 4096)
    assert len(prefill.programs) == 5
    assert (turns.past, turns.turns) == ((131072,), (1, 200, 4000))
    assert len(turns.programs) == 6


@needs_no_gpu
@pytest.mark.parametrize("command", ["prefill", "turns"])
def test_no_gpu(command, tmp_path):
    result = run(command, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"`sparda bench {command}` measures a CUDA GPU" in words(result.stderr)
    assert not list(tmp_path.iterdir())
