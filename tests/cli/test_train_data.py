from __future__ import annotations

import pytest
import torch

from sparda_compile.cli.train_data import DocumentBatches, Sources
from sparda_compile.errors import ConfigError


def sources(path=None, **changes):
    fields = {
        "documents": () if path is None else (path,),
        "text": None,
        "dataset": None,
        "tokenizer": "bytes",
        "length": 20,
        "batch_size": 2,
        "share": 0.25,
        "measured": 1,
        "seed": 0,
    }
    return Sources(**(fields | changes))


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name * 150)
    return tmp_path


def test_documents_that_are_held_out_are_in_no_batch(folder):
    said = []
    found = sources(folder).read(said.append)
    (name,) = found.names
    held_out = ord(name[-1])
    assert (found.num_documents, found.num_tokens, len(found.batches)) == (3, 450, 450 // 40)
    assert {int(token) for token in torch.cat(found.held_out).flatten()} == {held_out}
    learned = {int(token) for token in torch.cat(found.batches).flatten()}
    assert learned == {*map(ord, "abcd")} - {held_out}
    assert len(found.held_out) == 1
    assert said == ["reading documents"]


def test_a_text_has_no_held_out_part(folder):
    batches = sources(text=folder / "a").read(print)
    assert [tuple(batch.shape) for batch in batches] == [(2, 20)] * 3


def test_one_source_has_to_be_given(folder):
    for given in (sources(), sources(folder, text=folder / "a")):
        with pytest.raises(ConfigError, match="missing or given twice"):
            given.read(print)


def test_steps_and_epochs_of_an_amount_of_tokens():
    batches = DocumentBatches([torch.zeros(2, 50, dtype=torch.int64)] * 5, [], 3, 510, ["x"])
    assert batches.steps(600, 2) == 3
    words = "3 documents of 510 tokens, 1 more held out; 10 sequences of 50 tokens, of which"
    assert batches.sentence(3, 2) == f"{words} 12 are asked for: 1.20 times"
    assert batches.sentence(1, 2) == f"{words} 4 are asked for: 40% of them"
