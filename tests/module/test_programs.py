"""The programs of a module: one for each shape, built when asked for."""

from __future__ import annotations

import gc
import weakref

import pytest

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.programs import MOST_PROGRAMS
from sparda_compile.program.program import Program
from sparda_compile.testing import tiny_llama


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def programs(model):
    return optimize(model, SpardaConfig(mode="query", lowering="eager")).programs


def test_a_program_is_built_once_for_each_shape(programs):
    one = programs.get("decode", 1, 512, last_only=True)
    assert programs.get("decode", 1, 512, last_only=True) is one
    others = [
        programs.get("decode", 2, 512, last_only=True),
        programs.get("decode", 1, 1024, last_only=True),
        programs.get("prefill", 1, 512, last_only=True),
        programs.get("prefill", 1, 512, last_only=False),
    ]
    assert len({one, *others}) == 5
    assert programs.compiled() == []
    one.compile()
    assert programs.compiled() == [one]
    assert programs.num_compiled() == {"prefill": 0, "decode": 1}


def test_the_latest_plan_is_that_of_the_last_program_of_a_phase(programs):
    assert programs.latest_plan("prefill").layout.batch_size == 1
    programs.get("decode", 3, 512, last_only=True)
    assert programs.latest_plan("decode").layout.batch_size == 3
    with pytest.raises(UnsupportedInputError, match="phase 'training' is not known"):
        programs.latest_plan("training")


def test_a_program_can_be_put_in_anothers_place(programs):
    plan = programs.get("decode", 1, 512, last_only=True).plan
    mine = Program(plan, programs.forecast)
    assert programs.put(plan, mine) is mine
    assert programs.get("decode", 1, 512, last_only=True) is mine
    assert programs.put(plan) is not mine


@pytest.mark.parametrize(
    ("num_tokens", "capacity"),
    [(1, 512), (512, 512), (513, 1024), (8192, 8192), (8193, 16384), (16385, 24576)],
)
def test_capacities_are_few(programs, num_tokens, capacity):
    assert programs.capacity(num_tokens) == capacity


def test_a_fixed_capacity_is_kept(model):
    fast = optimize(model, SpardaConfig(mode="query", lowering="eager", max_tokens=128, top_k=1))
    assert fast.programs.capacity(1) == fast.programs.capacity(5000) == 128


def test_programs_of_many_shapes_are_let_go(programs):
    """The one asked for longest ago goes; what a caller holds lives on, and can be built again."""
    held = programs.get("prefill", 1, 512, last_only=True)
    held.compile()
    before = programs.num_compiled()
    refs = [weakref.ref(programs.get("decode", 1, 512, last_only=True))]
    for batch_size in range(2, MOST_PROGRAMS + 6):
        refs.append(weakref.ref(programs.get("decode", batch_size, 512, last_only=True)))
        assert programs.get("decode", 1, 512, last_only=True) is refs[0]()
    gc.collect()
    alive = [number for number, ref in enumerate(refs, start=1) if ref() is not None]
    assert alive == [1, *range(7, MOST_PROGRAMS + 6)]
    assert programs.num_compiled() == before
    again = programs.get("prefill", 1, 512, last_only=True)
    assert again is not held
    assert held.is_compiled
