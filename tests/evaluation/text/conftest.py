from __future__ import annotations

import random

import pytest

from sparda_compile.evaluation.text.documents import read_documents

WORDS = (
    "the",
    "river",
    "stone",
    "old",
    "light",
    "walks",
    "under",
    "green",
    "house",
    "then",
    "sees",
)


def prose(seed, sentences):
    """Return sentences of random words."""
    generator = random.Random(seed)
    made = [" ".join(generator.choices(WORDS, k=7)) for _ in range(sentences)]
    return " ".join(f"{sentence.capitalize()}." for sentence in made)


@pytest.fixture(scope="session")
def documents(tmp_path_factory, byte_tokenizer):
    """Three documents of about 2,000 bytes each."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(prose(name, 60))
    return read_documents([folder], byte_tokenizer, 1)
