"""What a decode graph issues."""

from __future__ import annotations

from sparda_compile.graph.nodes import snapshot
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT
from sparda_compile.passes.check.issued import extract_program


def by_name(plan_of, **settings):
    graph = snapshot(plan_of("llama", machine="h200", **settings).graph_module).graph
    program = extract_program(graph)
    return program, {each.name: each for each in program}


def test_a_copy_its_selection_and_its_wait(plan_of):
    program, named = by_name(plan_of, mode="forecast")
    copy, selection, fork = (named[n] for n in ("prefetch_1", "select_pages_1", "fork_1"))
    assert (copy.stream, selection.stream, fork.stream) == (COPY, SELECT, COMPUTE)
    assert fork.forks
    assert program[copy.selected_by[0]].chosen_from == program.index(selection)
    assert {program[i].chosen_from for i in copy.selected_by} == {program.index(selection)}
    wait = next(each for each in program if each.waits == copy.records)
    assert wait.stream == COMPUTE
    assert not wait.allocates
    assert {program[i].name for i in wait.keepalive} >= {"miss_blocks_1", "miss_pages_1"}
    assert selection.allocates
    assert not copy.allocates
    scores = named["scores_1"]
    first = scores if scores.forked_by is not None else selection
    assert program[first.forked_by] is fork


def test_numbers_are_places_in_the_program(plan_of):
    program, _ = by_name(plan_of, mode="exact", hint="next_query")
    for i, each in enumerate(program):
        assert all(0 <= source < len(program) for source in (*each.inputs, *each.touches))
        assert each.chosen_from is None or each.chosen_from < i
        assert set(each.keepalive) <= set(each.inputs)
        assert (each.stream == COMPUTE) or not each.forks
