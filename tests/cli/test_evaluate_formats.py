from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparda_compile import SpardaConfig
from sparda_compile.cli import main as cli


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name in ("one", "two"):
        (path / f"{name}.txt").write_text(" ".join(f"Line {i} of {name}." for i in range(80)))
    return path


SMALL = ("--tokens", 300, "--scored", 30, "--block-size", 16)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", "formats", *map(str, arguments)])


def test_a_mix_is_chosen_printed_and_written(folder, texts, tmp_path):
    path = tmp_path / "formats.json"
    given = (folder, "--document", texts, *SMALL, "--json-file", path, "--commit", "abc")
    result = run(*given, "--limit", 100)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    # Whatever it costs is allowed, so that all take the fewest bytes.
    assert set(found["kv_format"].values()) == {"int4"}
    assert found["settings"]["formats"] == ["fp8", "int8", "int4"]
    assert f"kv_format={ {int(k): v for k, v in found['kv_format'].items()} }" in result.stdout
    assert 0.2 < found["bytes_share"] < 0.35
    assert found["cost"]["kl"] > 0
    assert found["environment"]["commit"] == "abc"
    SpardaConfig(kv_format={int(layer): name for layer, name in found["kv_format"].items()})


def test_a_small_limit_is_kept(folder, texts):
    least = json.loads(run(folder, "--document", texts, *SMALL, "--limit", 100, "--json").stdout)
    total = least["cost"]["kl"]
    result = run(folder, "--document", texts, *SMALL, "--limit", total / 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["cost"]["kl"] <= total / 4
    assert found["bytes_share"] > least["bytes_share"]


def test_what_rounds_nothing_is_refused(folder, texts):
    result = run(folder, "--document", texts, *SMALL, "--kv-format", "model")
    assert result.exit_code == 2
    assert "rounds nothing" in " ".join(result.stderr.split())
    result = run(folder, "--document", texts, *SMALL, "--limit", 0)
    assert result.exit_code == 2
    assert "--limit" in result.stderr
