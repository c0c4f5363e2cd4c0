from __future__ import annotations

import dataclasses
import json
import math
import os

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


def test_what_was_measured_otherwise_is_not_kept(tmp_path):
    path = tmp_path / "found.json"
    make(path).save([DENSE, ROW])
    assert not make(path).keep("multi_key", 8192, ["dense", "query 10%"])
    assert not make(path).keep("multi_key", 4096, ["dense"])
    assert not make(path).keep("multi_key", 4096, ["dense", "query 20%"])
    assert not make(path, batch_size=2).keep("multi_key", 4096, ["dense", "query 10%"])
    for text in ("", "{}", "[]", '{"rows": 3}'):
        path.write_text(text)
        assert not make(path).keep("multi_key", 4096, ["dense", "query 10%"])


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
