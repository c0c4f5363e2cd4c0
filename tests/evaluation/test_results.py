from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.guesses import Guess
from sparda_compile.evaluation.results import EvaluationFile, fingerprint
from sparda_compile.evaluation.run import EvaluationRow, Recall

NAN = float("nan")
RECALL = Recall(
    name="query", layer=None, mass=NAN, mass_low=0.1, mass_high=0.2, blocks=0.5, blocks_low=0.4,
    blocks_high=0.6,
)  # fmt: skip
GUESS = Guess(name="ema", layer=3, budget=1.5, coverage=NAN, precision=0.6, fetched=0.4)
ROW = EvaluationRow(
    name="query 10%", mode="query", selector="infllm2", task="multi_key", length=4096, budget=0.1,
    num_blocks=64, num_samples=20, num_right=19, accuracy=0.95, low=0.764, high=0.991, kl=0.125,
    agreement=0.9, recalls=(RECALL,), guesses=(GUESS,),
)  # fmt: skip
DENSE = dataclasses.replace(ROW, name="dense", recalls=(), guesses=())


def make(path, **changes):
    settings = {"batch_size": 4, **changes}
    return EvaluationFile(path, "Model", 0, settings)


def test_parts_are_kept_and_taken_over(tmp_path):
    path = tmp_path / "new" / "found.json"
    make(path).save([DENSE, ROW])
    file = make(path)
    assert file.rows == []
    assert file.keep("multi_key", 4096, ["dense", "query 10%"])
    assert file.rows[0] == DENSE
    assert math.isnan(file.rows[1].recalls[0].mass)
    assert math.isnan(file.rows[1].guesses[0].coverage)
    assert str(file.rows) == str([DENSE, ROW])
    file.save([dataclasses.replace(ROW, task="key_value")])
    plain = json.loads(path.read_text())
    assert [row["task"] for row in plain["rows"]] == ["multi_key", "multi_key", "key_value"]
    assert plain["environment"]["torch"]


def test_a_part_needs_a_row_for_each_configuration(tmp_path):
    path = tmp_path / "found.json"
    make(path).save([DENSE, ROW])
    assert not make(path).keep("multi_key", 8192, ["dense", "query 10%"])
    assert not make(path).keep("key_value", 4096, ["dense", "query 10%"])
    assert not make(path).keep("multi_key", 4096, ["dense", "query 20%"])
    file = make(path)
    assert file.keep("multi_key", 4096, ["query 10%"])
    assert str(file.evaluation().rows) == str((ROW,))


def test_what_is_not_asked_for_again_stays_in_the_file(tmp_path):
    path = tmp_path / "found.json"
    make(path).save([DENSE, ROW])
    file = make(path)
    file.save([dataclasses.replace(ROW, name="query 20%"), dataclasses.replace(DENSE, kl=0.5)])
    assert [row.name for row in file.evaluation().rows] == ["query 20%", "dense"]
    rows = json.loads(path.read_text())["rows"]
    assert [(row["name"], row["kl"]) for row in rows] == [
        ("dense", 0.5), ("query 10%", 0.125), ("query 20%", 0.125),
    ]  # fmt: skip
    assert make(path).keep("multi_key", 4096, ["dense", "query 10%", "query 20%"])


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "found.json"
    make(path).save([DENSE, ROW])
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"other settings.*as it is now: batch_size 4\."):
        make(path, batch_size=2)
    with pytest.raises(ConfigError, match=r"as it is now: model\."):
        EvaluationFile(path, "Other", 0, {"batch_size": 4})
    assert path.read_text() == before
    damaged = {**json.loads(before), "rows": [{"name": "dense"}]}
    for text in ("", "{}", "[]", '{"rows": 3}', json.dumps(damaged), "# Notes\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no file of this command"):
            make(path)
        assert path.read_text() == text


def test_no_path_keeps_nothing():
    file = make(None)
    file.save([ROW])
    assert file.evaluation().rows == (ROW,)


def test_a_file_that_changed_has_another_fingerprint(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    os.utime(file, ns=(1, 1))
    assert fingerprint(tmp_path) != before
