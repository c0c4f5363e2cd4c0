from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import BackendUnavailableError, ConfigError, UnsupportedInputError
from sparda_compile.training.data import (
    BYTES,
    check_batch,
    endless,
    load_dataset,
    load_tokenizer,
    shortest_sequence,
    text_batches,
    token_chunks,
)

CONFIG = SpardaConfig(block_size=16, pool_size=8, pool_stride=4, local_blocks=1, top_k=2)


def test_shortest_sequence_has_one_query_with_a_choice():
    assert shortest_sequence(CONFIG) == 3 * 16 + 1
    assert shortest_sequence(SpardaConfig()) == 34 * 64 + 1
    few = CONFIG.replace(sink_blocks=0, local_blocks=0, pool_size=32)
    assert shortest_sequence(few) == 32


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([1, 2], "a batch is list"),
        (torch.zeros(60, dtype=torch.long), r"\(60,\) torch.int64"),
        (torch.zeros(1, 60, dtype=torch.int32), "int32"),
        (torch.zeros(0, 60, dtype=torch.long), r"\(0, 60\)"),
        (torch.zeros(1, 48, dtype=torch.long), "48 tokens per sequence.*cover the first 48.*49"),
        (torch.full((1, 60), 9), "ids from 9 to 9, but the model knows 0 to 8"),
        (torch.full((1, 60), -1), "ids from -1 to -1"),
    ],
)
def test_batches_that_cannot_be_trained_on(batch, words):
    with pytest.raises(UnsupportedInputError, match=words):
        check_batch(batch, CONFIG, 9)


def test_batches_that_can():
    check_batch(torch.full((2, 49), 8), CONFIG, 9)
    check_batch(torch.full((2, 49), 800), CONFIG, None)


def take(batches, count, num_used=0, rank=0, world_size=1):
    return list(itertools.islice(endless(batches, num_used, rank, world_size), count))


def test_processes_share_the_batches_and_go_through_them_again():
    batches = list(range(5))
    assert take(batches, 7) == [0, 1, 2, 3, 4, 0, 1]
    assert take(batches, 5, rank=0, world_size=2) == [0, 2, 4, 1, 3]
    assert take(batches, 5, rank=1, world_size=2) == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("used", [0, 2, 6, 14])
def test_a_resumed_run_goes_on_where_it_was(used):
    batches = list(range(5))
    for rank in range(2):
        everything = take(batches, 20, rank=rank, world_size=2)
        assert take(batches, 3, used, rank, 2) == everything[used // 2 : used // 2 + 3]


def test_generator_that_ends_and_no_batches_at_all():
    with pytest.raises(ConfigError, match=r"ended after 2 batches and cannot.*pass a list"):
        take(iter([1, 2]), 3)
    with pytest.raises(ConfigError, match="token_batches is empty"):
        take([], 1)


def test_chunks_are_the_text_in_order():
    batches = token_chunks(range(23), 5, 2)
    assert [b.tolist() for b in batches] == [
        [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]],
        [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]],
    ]
    assert batches[0].dtype == torch.int64
    with pytest.raises(ConfigError, match=r"23 tokens.*2 sequences of 12 tokens needs 24"):
        token_chunks(range(23), 12, 2)
    with pytest.raises(ConfigError, match="length=0 is too small"):
        token_chunks(range(23), 0, 2)


def test_text_as_bytes(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Grüße an hund", encoding="utf-8")
    (batch,) = text_batches(path, load_tokenizer(BYTES), length=15, batch_size=1)
    assert bytes(batch[0].tolist()).decode() == "Grüße an hund"


def test_texts_and_tokenizers_that_cannot_be_read(tmp_path):
    tokenize = load_tokenizer(BYTES)
    with pytest.raises(ConfigError, match=r"no.txt.*cannot be read.*UTF-8"):
        text_batches(tmp_path / "no.txt", tokenize, length=4, batch_size=1)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"binary.txt.*cannot be read"):
        text_batches(binary, tokenize, length=1, batch_size=1)
    with pytest.raises(ConfigError, match=r"'words' is no folder.*'bytes'"):
        load_tokenizer("words")
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path)


class Samples(list):
    """What datasets' load_from_disk returns, as far as training looks at it."""

    @property
    def column_names(self):
        return list(self[0])


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Put a data set where load_from_disk finds it; returns its folder."""

    def put(samples):
        module = types.ModuleType("datasets")
        module.load_from_disk = lambda path: samples
        monkeypatch.setitem(sys.modules, "datasets", module)
        return tmp_path

    return put


def test_samples_give_their_first_tokens_and_short_ones_none(saved):
    samples = Samples({"input_ids": list(range(n, n + n))} for n in (7, 3, 5, 9, 6))
    batches = load_dataset(saved(samples), None, length=5, batch_size=2)
    for _ in range(2):
        assert [b.tolist() for b in batches] == [
            [[7, 8, 9, 10, 11], [5, 6, 7, 8, 9]],
            [[9, 10, 11, 12, 13], [6, 7, 8, 9, 10]],
        ]


def test_samples_of_text_are_tokenized(saved):
    folder = saved(Samples([{"text": "abc"}]))
    (batch,) = load_dataset(folder, load_tokenizer(BYTES), length=3, batch_size=1)
    assert batch.tolist() == [[97, 98, 99]]


def test_data_sets_that_cannot_be_used(saved, tmp_path, monkeypatch):
    sizes = {"length": 4, "batch_size": 2}
    with pytest.raises(ConfigError, match="dataset='nowhere' is no folder"):
        load_dataset("nowhere", None, **sizes)
    with pytest.raises(ConfigError, match=r"columns label.*input_ids, or text together"):
        load_dataset(saved(Samples([{"label": 1}])), None, **sizes)
    with pytest.raises(ConfigError, match=r"only 1 samples.*have 4 tokens"):
        list(load_dataset(saved(Samples([{"input_ids": [1] * 4}])), None, **sizes))
    splits = types.SimpleNamespace(column_names={"train": ["text"], "test": ["text"]})
    with pytest.raises(ConfigError, match=r"several splits \(train, test\)"):
        load_dataset(saved(splits), None, **sizes)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BackendUnavailableError, match=r"package datasets.*pip install datasets"):
        load_dataset(tmp_path, None, **sizes)
