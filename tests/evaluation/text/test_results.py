from __future__ import annotations

import hashlib
import json
import math

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.results import Record, TextFile, digest_of, rows_of

HEAD = {"model": {"name": "tiny"}, "settings": {"scored": 4}}


def record(case="query 25%", sample="a.txt", **fields):
    plain = {
        "task": "perplexity", "length": 320, "label": "", "digest": "d", "mode": "query",
        "selector": "infllm2", "hints": "", "prefill": "dense", "num_read": 5, "num_blocks": 20,
        "tokens": 10, "nll": 20.0, "kl": 1.0, "same": 9, "is_right": False,
    }  # fmt: skip
    return Record(**plain | {"case": case, "sample": sample} | fields)


def dense(sample="a.txt", **fields):
    return record("dense", sample, **{"mode": "dense", "kl": 0.0, "same": 10} | fields)


def test_a_row_of_texts():
    records = [
        dense(nll=18.0), dense("b.txt", tokens=30, nll=60.0),
        record(nll=20.0), record(sample="b.txt", tokens=30, nll=63.0, kl=5.0, same=27),
    ]  # fmt: skip
    first, row = rows_of(records)
    assert (first.case, first.ratio.value, first.kl.value) == ("dense", 1.0, 0.0)
    assert row.perplexity.value == pytest.approx(math.exp(83 / 40))
    assert row.ratio.value == pytest.approx(math.exp(5 / 40))
    assert row.kl.value == pytest.approx(6 / 40)
    assert row.top1.value == pytest.approx(36 / 40)
    assert (row.num_samples, row.tokens, row.budget) == (2, 40, 0.25)
    assert row.ratio.low < 1.0 < row.ratio.value < row.ratio.high
    assert (row.right, row.right_gain, row.right_by_label) == (None, None, {})


def test_a_row_of_answers():
    def answers(make, rights):
        return [
            make(sample=f"chat {i // 2}", task="chat", label=f"q{i % 2}", is_right=is_right)
            for i, is_right in enumerate(rights)
        ]

    rights = [True, False, True, True]
    first, row = rows_of([*answers(dense, [True] * 4), *answers(record, rights)])
    assert (first.right.value, first.right_gain.value) == (1.0, 0.0)
    assert (row.right.value, row.right_gain.value) == (0.75, -0.25)
    assert row.right_by_label == {"q0": 1.0, "q1": 0.5}
    assert row.num_samples == 2
    assert 0.0 < row.right.low < row.right.value < row.right.high < 1.0


def test_a_file_goes_on(tmp_path):
    path = tmp_path / "found.json"
    file = TextFile(path, HEAD)
    assert not file.has("perplexity", 320, "dense", [("a.txt", "d")])
    file.add([dense()])
    again = TextFile(path, HEAD)
    assert again.records == [dense()]
    assert again.has("perplexity", 320, "dense", [("a.txt", "d")])
    assert not again.has("perplexity", 320, "dense", [("a.txt", "d"), ("b.txt", "d")])
    assert not again.has("perplexity", 320, "dense", [("a.txt", "other tokens")])
    assert not again.has("perplexity", 640, "dense", [("a.txt", "d")])
    again.add([dense(), record()])
    content = json.loads(path.read_text())
    assert [each["case"] for each in content["records"]] == ["dense", "query 25%"]
    assert [row["case"] for row in content["rows"]] == ["dense", "query 25%"]
    assert content["rows"][0]["kl"] == {"value": 0.0, "low": None, "high": None}
    assert content["settings"] == HEAD["settings"]
    assert {"commit", "date", "torch"} <= set(content["environment"])


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "found.json"
    TextFile(path, HEAD).add([dense()])
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"other settings.*now: scored \d+\."):
        TextFile(path, {**HEAD, "settings": {"scored": 5}})
    with pytest.raises(ConfigError, match=r"is not as it is now: commit "):
        TextFile(path, HEAD, commit="another")
    assert path.read_text() == before
    damaged = {**json.loads(before), "records": [{"task": "perplexity"}]}
    for text in ('{"name": "another command"}', "[]", "", json.dumps(damaged)):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no file of this command"):
            TextFile(path, HEAD)
        assert path.read_text() == text


def test_numbers_that_are_not_finite_are_kept_as_json_has_them(tmp_path):
    """A model may answer with NaN, or be so wrong that perplexity is more than a float has."""
    path = tmp_path / "found.json"
    file = TextFile(path, HEAD)
    file.add([dense(nll=math.nan), record("loud", nll=1e6), record("sure", nll=math.inf)])
    assert math.isnan(rows_of(file.records)[0].perplexity.value)
    assert rows_of(file.records)[1].perplexity.value == math.inf

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert [row["perplexity"]["value"] for row in content["rows"]] == [None, None, None]
    nats = [record.nll for record in TextFile(path, HEAD).records]
    assert [math.isnan(each) for each in nats] == [True, False, True]
    assert nats[1] == 1e6


def test_without_a_path_nothing_is_written():
    file = TextFile(None, HEAD)
    file.add([dense()])
    assert file.to_dict()["records"] == [vars(dense())]


def test_a_digest_is_of_the_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("one")
    found = digest_of(tmp_path)
    assert found == hashlib.sha256(b"weights").hexdigest()
    assert digest_of(tmp_path / "model.safetensors") == found
    (tmp_path / "README.md").write_text("two")
    assert digest_of(tmp_path) == found
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert digest_of(tmp_path) != found
