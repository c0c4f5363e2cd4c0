from __future__ import annotations

from typing import get_args

from sparda_compile.evaluation.names import TaskName, TextPromptName, TextTaskName
from sparda_compile.evaluation.tasks import TASKS
from sparda_compile.evaluation.text.documents import read_documents
from sparda_compile.evaluation.text.run import make_scripts
from sparda_compile.selection import Prefill


def test_they_are_the_tasks():
    assert get_args(TaskName) == tuple(TASKS)


def test_names_of_text_are_those_that_are_measured(byte_tokenizer, tmp_path):
    (tmp_path / "it.txt").write_text("A sentence of this text. " * 100)
    documents = read_documents([tmp_path], byte_tokenizer, 1200)
    counts = {"scored": 8, "trials": 1, "depths": 1, "seed": 0}
    for task in get_args(TextTaskName):
        (script, *_) = make_scripts(task, byte_tokenizer, documents, 1200, counts)
        assert script.parts[0].targets_BA is None
    assert set(get_args(TextPromptName)) <= set(get_args(Prefill))
