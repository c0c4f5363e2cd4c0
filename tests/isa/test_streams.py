"""The table of streams."""

from __future__ import annotations

from sparda_compile.isa.streams import (
    ATTEND,
    BEHIND,
    COMPUTE,
    COPY,
    REPAIR,
    SELECT,
    STREAM_NAMES,
)


def test_every_stream_has_a_name_and_says_what_it_is_behind():
    known = [COMPUTE, COPY, SELECT, ATTEND, REPAIR]
    assert sorted(BEHIND) == list(range(len(STREAM_NAMES))) == known
    assert BEHIND[COMPUTE] == ()


def test_side_streams_are_behind_compute_and_none_behind_itself():
    for stream, others in BEHIND.items():
        assert stream not in others
        assert stream == COMPUTE or COMPUTE in others
        # Behind what it is behind, too, or an engine would have to follow chains.
        assert all(set(BEHIND[other]) <= set(others) for other in others)
