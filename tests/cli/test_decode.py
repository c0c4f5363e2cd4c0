from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparda_compile.cli import main as cli
from sparda_compile.cli.decode import _LEAST_TOKENS


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "decode", *map(str, arguments)])


def words(text):
    return " ".join(text.replace("\u2502", " ").split())


def test_decode_writes_and_shows_each_batch(asked, tmp_path):
    result = run(
        "--batch", 1, "--batch", 4, "--overlap", 0.9, "--variant", "scheduled",
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
    result = run("--shape", "tiny", "--out", tmp_path, "--json", "--commit", "1a2b")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["results"][0]["batch_size"] == 1
    assert asked[1][2] is True
    assert asked[1][1].overlaps == (0.5, 0.7, 0.9, 0.97)
    found = json.loads((tmp_path / "decode-tiny.json").read_text())
    assert found["environment"]["commit"] == "1a2b"


def test_decode_of_a_format_of_blocks_has_its_own_file(asked, tmp_path):
    result = run("--shape", "tiny", "--out", tmp_path, "--kv-format", "int4")
    assert result.exit_code == 0, result.output
    assert asked[1][1].settings == {"kv_format": "int4", "page_format": "model"}
    found = json.loads((tmp_path / "decode-tiny-int4.json").read_text())
    assert found["kv_format"] == "int4"
    assert "page_format" not in found


def test_decode_of_small_pages_has_its_own_file(asked, tmp_path):
    formats = ("--kv-format", "fp8", "--page-format", "stored")
    result = run("--shape", "tiny", "--out", tmp_path, *formats)
    assert result.exit_code == 0, result.output
    assert asked[1][1].settings == {"kv_format": "fp8", "page_format": "stored"}
    found = json.loads((tmp_path / "decode-tiny-fp8-stored.json").read_text())
    assert (found["kv_format"], found["page_format"]) == ("fp8", "stored")


def test_decode_plots(asked, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("--out", tmp_path, "--plot", tmp_path / "decode.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_formats_are_measured_one_after_another(asked, tmp_path):
    formats = ("--kv-format", "model", "--kv-format", "int8", "--selector", "lowbit4")
    result = run("--shape", "tiny", "--out", tmp_path, "--top-k", 478, "--json", *formats)
    assert result.exit_code == 0, result.output
    (_, first, _), (_, second, _) = asked[1:]
    fields = {"page_format": "model", "selector": "lowbit4", "top_k": 478}
    assert first.settings == {"kv_format": "model", **fields}
    assert second.settings == {"kv_format": "int8", **fields}
    names = ["decode-tiny-lowbit4-top478.json", "decode-tiny-int8-lowbit4-top478.json"]
    written = [json.loads((tmp_path / name).read_text()) for name in names]
    for content in written:
        del content["environment"]
    assert json.loads(result.stdout) == {"name": "decode", "formats": written}
    assert [content.get("kv_format") for content in written] == [None, "int8"]
    assert {content["selector"] for content in written} == {"lowbit4"}


def test_modes_are_measured_one_after_another(asked, tmp_path):
    modes = ("--mode", "forecast", "--mode", "exact", "--hint", "ema", "--hint", "forecast")
    result = run("--shape", "tiny", "--out", tmp_path, *modes)
    assert result.exit_code == 0, result.output
    (_, first, _), (_, second, _) = asked[1:]
    usual = {"kv_format": "model", "page_format": "model"}
    assert first.settings == usual
    assert second.settings == {"mode": "exact", "hint": ("ema", "forecast"), **usual}
    forecast = json.loads((tmp_path / "decode-tiny.json").read_text())
    exact = json.loads((tmp_path / "decode-tiny-exact-ema-forecast.json").read_text())
    assert "mode" not in forecast
    assert (exact["mode"], exact["hint"]) == ("exact", ["ema", "forecast"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "exact", "--mode", "exact"), "--mode exact, exact names one twice"),
        (("--mode", "exact", "--hint", "ema", "--hint", "ema"), "--hint ema, ema names one twice"),
        (("--hint", "ema"), "--hint goes with --mode exact alone"),
        (("--mode", "exact", "--tp", 2), "--tp measures mode forecast alone"),
        (("--mode", "query", "--mode", "exact", "--plot", "a.png"), "--plot takes one --mode"),
        (("--mode", "speculate"), "'speculate' is not one of"),
        (("--mode", "exact", "--hint", "mixture"), "--hint mixture learns from scores, and those"),
        (("--tokens", 12800, "--top-k", 201), "--top-k 201 is more than the 200 blocks"),
        (("--kv-format", "int8", "--kv-format", "int8"), "names one twice"),
        (("--kv-format", "int8", "--kv-format", "values8", "--page-format", "stored"), "alone:"),
        (("--kv-format", "int8", "--kv-format", "fp8", "--tp", 2), "--tp takes one --kv-format"),
        (("--kv-format", "int8", "--kv-format", "fp8", "--plot", "a.png"), "--plot takes one"),
        (("--selector", "lowbit4", "--tp", 2), "--selector does not go with --tp"),
        (("--top-k", 9, "--tp", 2), "--top-k does not go with --tp"),
        (("--page-ratio", 2, "--tp", 2), "--page-ratio does not go with --tp"),
        (("--page-ratio", 0.5), "'--page-ratio': Input should be greater than or equal to 1"),
        (("--page-ratio", "nan"), "'--page-ratio': Input should be less than or equal to"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    result = run(*options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_least_tokens_have_a_trace():
    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.memory import layout_of
    from sparda_compile.bench.shapes import SHAPES
    from sparda_compile.bench.synthetic import follow
    from sparda_compile.runtime.kv_cache import KVCache

    setting = DecodeSetting(1, _LEAST_TOKENS)
    layout = layout_of(SHAPES["tiny"], "scheduled", 1, setting.max_tokens, 2)
    kv = KVCache(layout, torch.device("cpu"))
    follow(kv, setting.num_tokens, 0.5)
    with pytest.raises(ValueError, match="cannot be"):
        follow(kv, setting.num_tokens - 64, 0.5)
