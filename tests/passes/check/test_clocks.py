"""Vector clocks of programs that are written as what is issued."""

from __future__ import annotations

from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY, SELECT
from sparda_compile.passes.check.clocks import happens_before, join, vector_clocks
from sparda_compile.passes.check.issued import Issued


def issued(name, stream=COMPUTE, **fields):
    usual = {
        "order": 0, "inputs": (), "keepalive": (), "touches": (), "forks": False,
        "forked_by": None, "selected_by": (), "chosen_from": None, "records": None,
        "waits": None, "allocates": False, "node": None,
    }  # fmt: skip
    return Issued(name, stream, **(usual | fields))


def before(program, steps=1):
    clocks = vector_clocks(program, steps)
    return {
        (a, b) for a in range(len(clocks)) for b in range(len(clocks))
        if happens_before(program, clocks, a, b)
    }  # fmt: skip


def test_join_takes_what_is_later():
    mine = [1, 5, 2]
    join(mine, (3, 4, 2))
    assert mine == [3, 5, 2]


def test_a_stream_is_in_order_and_others_are_not():
    program = [issued("a"), issued("b", COPY), issued("c"), issued("d", COPY)]
    assert before(program) == {(0, 2), (1, 3)}


def test_forks_selections_and_waits_order_streams():
    program = [
        issued("a"),
        issued("fork", forks=True),
        issued("ids", SELECT, forked_by=1),
        issued("copy", COPY, selected_by=(2,), records=7),
        issued("b"),
        issued("wait", waits=7),
    ]
    found = before(program)
    assert {(0, 2), (1, 2), (2, 3), (0, 3), (3, 5), (2, 5)} <= found
    assert (3, 4) not in found
    assert (2, 4) not in found


def test_a_side_stream_waits_for_another_and_compute_for_both():
    program = [
        issued("copy", COPY, records=1),
        issued("wait", ATTEND, waits=1),
        issued("attention", ATTEND, records=2),
        issued("b"),
        issued("join", waits=2),
    ]
    found = before(program)
    assert {(0, 1), (0, 2), (2, 4), (0, 4)} <= found
    assert (0, 3) not in found


def test_the_next_run_is_behind_what_compute_has_joined():
    program = [issued("copy", COPY, records=1), issued("wait", waits=1), issued("late", COPY)]
    found = before(program, steps=2)
    assert (1, 4) in found  # compute's own order
    assert (0, 4) in found
    assert {(2, 3), (2, 4)} <= found  # the copy of the next run is behind it
    assert (2, 1) not in found
