from __future__ import annotations

import json

import pytest

from sparda_compile import environment
from sparda_compile.bench.result_file import ResultFile

HEAD = {"name": "decode", "shape": "tiny"}


@pytest.fixture(autouse=True)
def _commit(monkeypatch):
    monkeypatch.setattr(environment, "_commit", lambda: "abc123")


def result_file(tmp_path, **head):
    return ResultFile(tmp_path / "r.json", {**HEAD, **head}, "batch_size")


def test_each_result_is_written_at_once_and_kept(tmp_path):
    file = result_file(tmp_path)
    file.save({"batch_size": 16, "x": 1})
    assert [r["batch_size"] for r in json.loads(file.path.read_text())["results"]] == [16]
    file.save({"batch_size": 4, "x": 2})
    file.save({"batch_size": 16, "x": 3})
    again = result_file(tmp_path)
    assert again.results == [{"batch_size": 4, "x": 2}, {"batch_size": 16, "x": 3}]
    assert again.has(4)
    assert not again.has(8)
    assert again.content() == {**HEAD, "results": again.results}


def test_unfinished_result_is_measured_again(tmp_path):
    file = result_file(tmp_path)
    file.save({"batch_size": 1, "unfinished": "baselines"})
    assert not result_file(tmp_path).has(1)


def test_results_of_another_environment_are_not_mixed_in(tmp_path, monkeypatch):
    file = result_file(tmp_path)
    file.save({"batch_size": 1})
    assert not result_file(tmp_path, shape="8b").results
    assert not ResultFile(file.path, HEAD, "batch_size", "other").results
    document = json.loads(file.path.read_text())
    document["environment"]["date"] = "2020-01-01"
    file.path.write_text(json.dumps(document))
    assert result_file(tmp_path).has(1)
    document["environment"]["torch"] = "1.0"
    file.path.write_text(json.dumps(document))
    assert not result_file(tmp_path).results


@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_file_that_holds_something_else(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    assert result_file(tmp_path).results == []
