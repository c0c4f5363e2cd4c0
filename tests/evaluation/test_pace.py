from __future__ import annotations

import pytest

from sparda_compile.evaluation.pace import Pace


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.0, "about 6 s left"), (100.0, "about 5 min left"), (7200.0, "about 6.0 h left")],
)
def test_what_is_left_takes_as_long_as_what_was_done(seconds, words):
    now = [5.0]
    pace = Pace(100.0, lambda: now[0])
    assert str(pace) == ""
    now[0] += seconds
    pace.add(20.0)
    pace.leave_out(20.0)
    assert str(pace) == words
    pace.add(60.0)
    assert str(pace) == "about 0 s left"
