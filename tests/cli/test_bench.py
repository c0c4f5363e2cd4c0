from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile import environment
from sparda_compile.bench import memory, suite
from sparda_compile.bench.memory import GIB
from sparda_compile.bench.suite import PARTS, WITH_BASELINES, Part
from sparda_compile.cli import bench
from sparda_compile.cli import main as cli

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")


def spread(us):
    return {"median": us, "low": us, "high": us, "runs": 3, "h2d_bytes": 1000}


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


class FakeLab:
    """Measures nothing; remembers what it was asked for."""

    def __init__(self, name, asked):
        self.name = name
        self.asked = asked

    def decode(self, setting, save, *, with_baselines):
        self.asked.append((self.name, setting, with_baselines))
        if setting.batch_size == 8:
            raise RuntimeError("CUDA error")
        row = {"scheduled": spread(4000.0), "tokens_per_s": 250.0 * setting.batch_size}
        result = {
            "batch_size": setting.batch_size,
            "max_tokens": setting.max_tokens,
            "by_overlap": {str(overlap): row for overlap in setting.overlaps},
            "skipped": {"dense": "its KV cache is too big"},
        }
        save(result)
        return result

    def budget(self, gib, setting, save):
        self.asked.append((self.name, setting, gib))
        side = {"batch_size": 2, "limited_by": "budget", "device_gib": 1.0, "host_gib": 0.0}
        save({"budget_gib": gib, "resident": side, "scheduled": side, "by_overlap": {}})

    def prefill(self, setting, file):
        self.asked.append((self.name, setting, "prefill"))
        skipped = dict.fromkeys(setting.programs, "no time")
        file.save({"tokens": setting.tokens[0], "programs": {}, "skipped": skipped})

    def turns(self, setting, file):
        self.asked.append((self.name, setting, "turns"))
        skipped = dict.fromkeys(setting.programs, "no time")
        file.save({"past": setting.past[0], "programs": {}, "skipped": skipped})


@pytest.fixture
def asked(monkeypatch):
    asked = []

    def lab(shape, say, max_host_gib):
        asked.append((shape, max_host_gib))
        return FakeLab(shape, asked)

    monkeypatch.setattr(bench, "require_gpu", lambda command: None)
    monkeypatch.setattr(bench, "make_lab", lab)
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")
    monkeypatch.setattr(memory, "free_everything", lambda: None)
    monkeypatch.setattr(suite, "free_everything", lambda: None)
    monkeypatch.setattr(bench, "prr_part", lambda *args: Part("prr", 1.0, lambda: True, list))
    return asked


def test_decode_writes_and_shows_each_batch(asked, tmp_path):
    result = run(
        "decode", "--batch", 1, "--batch", 4, "--overlap", 0.9, "--variant", "scheduled",
        "--variant", "dense", "--no-baseline", "--rounds", 2, "--steps", 5, "--out", tmp_path,
        "--tokens", 65536, "--max-host-gib", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "decode-8b.json").read_text())
    assert [r["batch_size"] for r in found["results"]] == [1, 4]
    assert (found["name"], found["shape"], found["max_tokens"]) == ("decode", "8b", 65536)
    assert asked[0] == ("8b", 3)
    _, setting, with_baselines = asked[1]
    assert not with_baselines
    assert (setting.batch_size, setting.max_tokens, setting.rounds, setting.steps) == (
        1, 65536, 2, 5,
    )  # fmt: skip
    assert (setting.overlaps, setting.variants) == ((0.9,), ("scheduled", "dense"))
    assert "4 0.9 4.000" in words(result.stdout)
    assert "batch 1: dense is left out: its KV cache is too big." in words(result.stdout)
    assert "decode-8b.json" in result.stdout


def test_decode_as_json(asked, tmp_path):
    result = run("decode", "--shape", "tiny", "--out", tmp_path, "--json", "--commit", "1a2b")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"][0]["batch_size"] == 1
    assert asked[1][2] is True
    assert asked[1][1].overlaps == (0.5, 0.7, 0.9, 0.97)
    found = json.loads((tmp_path / "decode-tiny.json").read_text())
    assert found["environment"]["commit"] == "1a2b"


def test_decode_of_a_format_of_blocks_has_its_own_file(asked, tmp_path):
    result = run("decode", "--shape", "tiny", "--out", tmp_path, "--kv-format", "int4")
    assert result.exit_code == 0, result.output
    assert asked[1][1].settings == {"kv_format": "int4", "page_format": "model"}
    found = json.loads((tmp_path / "decode-tiny-int4.json").read_text())
    assert found["kv_format"] == "int4"
    assert "page_format" not in found


def test_decode_of_small_pages_has_its_own_file(asked, tmp_path):
    formats = ("--kv-format", "fp8", "--page-format", "stored")
    result = run("decode", "--shape", "tiny", "--out", tmp_path, *formats)
    assert result.exit_code == 0, result.output
    assert asked[1][1].settings == {"kv_format": "fp8", "page_format": "stored"}
    found = json.loads((tmp_path / "decode-tiny-fp8-stored.json").read_text())
    assert (found["kv_format"], found["page_format"]) == ("fp8", "stored")


def test_decode_plots(asked, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("decode", "--out", tmp_path, "--plot", tmp_path / "decode.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_budget(asked, tmp_path):
    result = run("budget", "--gib", 8, "--gib", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert [entry[2] for entry in asked[1:]] == [8.0, 4.0]
    assert asked[1][1].overlaps == (0.9,)
    found = json.loads((tmp_path / "budget-8b.json").read_text())
    assert [r["budget_gib"] for r in found["results"]] == [4.0, 8.0]
    assert "limited by" in result.stdout


@pytest.fixture
def kernels(monkeypatch):
    found = {
        "copy": {"gbps": 4000.0},
        "gather": {"memcpy": {**spread(1.0), "gbps": 50.0}, "by_programs": {}},
        "prompt": {"tokens": 64, "past": 512, "kernels": {}, "others": {}},
        "beside": {},
    }
    module = pytest.importorskip("sparda_compile.bench.kernels")
    monkeypatch.setattr(module, "bench_kernels", lambda say: found)
    return found


def test_kernels(asked, kernels, tmp_path):
    result = run("kernels", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Device copy: 4000 GB/s" in result.stdout
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["results"][0]["copy"] == kernels["copy"]


def test_all_runs_in_order_goes_on_after_a_failure_and_keeps_what_is_there(
    asked, kernels, tmp_path
):
    result = run("all", "--out", tmp_path, "--minutes", 600, "--json")
    assert result.exit_code == 1
    assert "decode 8b batch 8 failed; see above" in words(result.stderr)
    assert "RuntimeError: CUDA error" in result.stderr
    parts = json.loads(result.stdout)["parts"]
    words_of = {"decode": "batch {}", "prefill": "{} tokens", "turns": "behind {} tokens"}
    names = [f"{what} {shape} {words_of[what].format(size)}" for what, shape, size, _ in PARTS]
    assert [part["name"] for part in parts] == [
        "kernels", "prr", *names, "budget 8 GiB", "budget 16 GiB",
    ]  # fmt: skip
    assert {part["status"] for part in parts} == {"done", "failed", "kept"}
    measured = [entry for entry in asked if len(entry) == 3][:-2]
    for (name, setting, how), (what, shape, size, _) in zip(measured, PARTS, strict=True):
        assert name == shape
        if what == "decode":
            assert (setting.batch_size, how) == (size, (shape, size) == WITH_BASELINES)
        else:
            assert (setting.tokens if what == "prefill" else setting.past, how) == ((size,), what)
    # One model at a time: that of 8b is made again for the budget.
    assert [entry[0] for entry in asked if len(entry) == 2] == ["8b", "8b-8kv", "8b"]
    assert json.loads((tmp_path / "all.json").read_text())["parts"] == parts
    asked.clear()
    again = json.loads(run("all", "--out", tmp_path, "--json").stdout)["parts"]
    assert [p["name"] for p in again if p["status"] != "kept"] == ["decode 8b batch 8"]


def test_all_stops_in_time(asked, kernels, monkeypatch, tmp_path):
    monkeypatch.setattr("sparda_compile.cli.bench._KERNEL_MINUTES", 2.0)  # less than all others
    result = run("all", "--out", tmp_path, "--minutes", 2.5)
    assert result.exit_code == 0, result.output
    assert asked == []
    assert "kernels done" in words(result.stdout)
    assert "decode 8b batch 1 left out" in words(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["decode", "--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["decode", "--tokens", 1000], "multiple of 64 from 10176 on"),
        (["decode", "--tokens", 10300], "multiple of 64 from 10176 on"),
        (["decode", "--variant", "inline"], "add --variant scheduled"),
        (["decode", "--variant", "scheduled", "--variant", "fast"], "not one of 'scheduled'"),
        (["decode", "--overlap", 2], "less than or equal to 1"),
        (["decode", "--steps", 93], "use 1 to 92"),
        (["decode", "--batch", 0], "greater than or equal to 1"),
        (["compile", "--shape", "70b"], "not one of '8b', '8b-8kv', 'tiny'"),
        (["compile", "--variant", "fast"], "not one of 'scheduled'"),
        (["budget", "--gib", 0], "use more than 0"),
        (["budget", "--shape", "70b"], "not one of '8b'"),
    ],
)
def test_wrong_usage(asked, arguments, expected):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert expected in words(result.stderr)
    assert asked == []


def test_least_tokens_have_a_trace():
    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.memory import layout_of
    from sparda_compile.bench.shapes import SHAPES
    from sparda_compile.bench.synthetic import follow
    from sparda_compile.cli.decode import _LEAST_TOKENS
    from sparda_compile.runtime.kv_cache import KVCache

    setting = DecodeSetting(1, _LEAST_TOKENS)
    layout = layout_of(SHAPES["tiny"], "scheduled", 1, setting.max_tokens, 2)
    kv = KVCache(layout, torch.device("cpu"))
    follow(kv, setting.num_tokens, 0.5)
    with pytest.raises(ValueError, match="cannot be"):
        follow(kv, setting.num_tokens - 64, 0.5)


def test_plot_without_matplotlib_is_refused_before_anything_runs(asked, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("decode", "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "sparda-compile[plot]" in words(result.stderr)
    assert asked == []


@needs_no_gpu
@pytest.mark.parametrize("command", ["decode", "budget", "kernels", "all"])
def test_no_gpu(command, tmp_path):
    result = run(command, "--out", tmp_path)
    assert result.exit_code == 2
    assert f"`sparda bench {command}` measures a CUDA GPU" in words(result.stderr)
    assert not list(tmp_path.iterdir())


def test_lab_is_told_how_much_cpu_memory_it_may_take():
    lab = bench.make_lab("tiny", lambda text: None, 1.5)
    assert lab.max_host_bytes == 1.5 * GIB
    assert bench.make_lab("tiny", lambda text: None, None).max_host_bytes is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kv-format", "int8", "--kv-format", "int8"), "names one twice"),
        (("--kv-format", "int8", "--kv-format", "fp8", "--tp", 2), "--tp takes one --kv-format"),
        (("--kv-format", "int8", "--kv-format", "fp8", "--plot", "a.png"), "--plot takes one"),
        (("--selector", "lowbit4", "--tp", 2), "--selector goes with neither --trace nor --tp"),
    ],
)
def test_options_of_decode_that_do_not_go_together_are_refused(options, said):
    result = run("decode", *map(str, options))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
