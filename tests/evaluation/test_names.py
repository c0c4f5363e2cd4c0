from __future__ import annotations

from typing import get_args

from sparda_compile.evaluation.names import TaskName
from sparda_compile.evaluation.tasks import TASKS


def test_they_are_the_tasks():
    assert get_args(TaskName) == tuple(TASKS)
