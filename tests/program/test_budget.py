"""The budget of a layer is what costs least, by the times and by what was missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparda_compile.passes.schedule.layer_times import LayerTimes
from sparda_compile.program.budget import BudgetControl, budgets_of

# Selection hides about 144 blocks.
TIMES = LayerTimes(
    select_us=20.0, start_us=5.6, block_us=0.1, repair_us=4.0, miss_us=0.5, serial_us=12.0
)
BUDGETS = (34, 65, 96, 112, 127, 158)


def settle(control, misses, periods=30):
    """Let a layer miss `misses[budget]` blocks for some periods; return the budgets in use."""
    return [control.observe(misses[control.budget]) for _ in range(periods)]


def test_cost_is_the_longer_of_both_and_the_repair():
    assert TIMES.speculating_us(100, 2.0) == pytest.approx(20.0 + 4.0 + 1.0)
    assert TIMES.speculating_us(200, 2.0) == pytest.approx(25.6 + 4.0 + 1.0)
    assert TIMES.pays(100, 2.0)
    assert not TIMES.pays(100, 16.0)


def test_budgets_are_shares_of_what_scores_choose():
    assert budgets_of(34, 62, 158) == (34, 65, 96, 112, 127, 158)
    assert budgets_of(34, 62, 100) == (34, 65, 96, 100)
    assert budgets_of(3, 0, 3) == (3,)
    assert budgets_of(3, 4, 19) == (3, 5, 7, 8, 9, 11, 19)


def test_the_best_budget_is_found_and_kept():
    misses = dict(zip(BUDGETS, (62, 40, 18, 12, 9, 1), strict=True))
    want = min(BUDGETS, key=lambda budget: TIMES.speculating_us(budget, misses[budget]))
    for start in BUDGETS:
        control = BudgetControl(TIMES, BUDGETS, start)
        used = settle(control, misses)
        assert used[-1] == want
        assert control.changes <= len(BUDGETS)
        assert len(set(used[len(BUDGETS) :])) == 1


def test_a_budget_follows_the_text():
    easy, hard = (
        dict.fromkeys(BUDGETS, 0.0),
        dict(zip(BUDGETS, (62, 50, 40, 30, 20, 0), strict=True)),
    )
    control = BudgetControl(TIMES, BUDGETS, 96)
    settle(control, easy)
    before = control.budget
    settle(control, hard)
    assert control.budget == 158 != before


def test_a_layer_where_nothing_pays_says_so():
    never = LayerTimes(
        select_us=3.0, start_us=6.0, block_us=0.1, repair_us=4.0, miss_us=0.5, serial_us=6.0
    )
    control = BudgetControl(never, BUDGETS, 96)
    assert control.pays  # nothing is known yet
    settle(control, dict(zip(BUDGETS, (62, 40, 18, 12, 9, 1), strict=True)))
    assert not control.pays


def test_small_differences_change_nothing():
    control = BudgetControl(TIMES, BUDGETS, 158)
    for misses in (1.0, 1.2, 0.9, 1.1) * 10:
        control.observe(misses)
    assert control.changes <= 1


@given(
    st.lists(st.floats(0.0, 60.0), min_size=6, max_size=6), st.sampled_from(BUDGETS),
    st.floats(0.0, 40.0), st.floats(0.0, 2.0),
)  # fmt: skip
def test_no_budget_is_much_better_than_the_one_that_is_kept(missed, start, select_us, miss_us):
    misses = dict(zip(BUDGETS, sorted(missed, reverse=True), strict=True))
    times = LayerTimes(select_us, 5.6, 0.1, 4.0, miss_us, 12.0)
    control = BudgetControl(times, BUDGETS, start)
    settle(control, misses)
    best = min(times.speculating_us(budget, misses[budget]) for budget in BUDGETS)
    assert times.speculating_us(control.budget, misses[control.budget]) <= best / 0.98 + 1e-6
