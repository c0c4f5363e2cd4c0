from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sparda_compile.cli import main as cli


@pytest.fixture
def result_file(tmp_path):
    row = {name: {"median": us} for name, us in (("scheduled", 100.0), ("body", 50.0))}
    content = {
        "environment": {"gpu": "NVIDIA H200", "date": "2026-11-29"},
        "name": "decode",
        "shape": "tiny",
        "max_tokens": 16384,
        "results": [{"batch_size": 2, "by_overlap": {"0.9": row}}],
    }
    path = tmp_path / "decode-tiny.json"
    path.write_text(json.dumps(content))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "predict", *map(str, arguments)])


def test_predicted_stands_beside_measured(result_file):
    result = run(result_file)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    (line,) = (line for line in lines if "tiny scheduled" in line)
    predicted, measured, ratio = map(float, line.split()[-3:])
    assert measured == 0.1
    assert ratio == pytest.approx(predicted / measured, rel=0.02)
    assert any(line.startswith("2 points, from") for line in lines)


def test_json(result_file):
    found = json.loads(run(result_file, "--json").stdout)
    assert [point["variant"] for point in found["points"]] == ["scheduled", "body"]
    scheduled, body = found["points"]
    assert scheduled["predicted_us"] > body["predicted_us"] > 0
    assert scheduled["is_judged"]


def test_a_file_that_is_no_result(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    result = run(path)
    assert result.exit_code == 2
    assert "decode, budget or profile" in " ".join(result.stderr.split())
