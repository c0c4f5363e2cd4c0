"""How many blocks of a layer to attend to before they are known: the budget of mode `speculate`.

    cost(b) = max(T_select, T_speculate(b)) + T_repair(misses(b))

The times are those of the cost model. The misses are counted on the device while the model runs,
so they are known of budgets that were in use alone. A smaller budget misses at least as much as a
larger one, and that is all that is assumed of one that was never used: it is tried if it could then
win, and kept if it does. Where no budget pays, the smallest is left, that of blocks which are read
in every step: those are never wrong.

Source: PRR (arXiv 2606.30389) section 4.4. Differs from the paper, which looks up one budget for a
context length, by times alone: the largest that selection hides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.passes.schedule.layer_times import LayerTimes

__all__ = ["BudgetControl", "budgets_of"]

# Of what blocks are chosen by score, as PRR's own tables have them.
_SHARES: Final = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
# A budget is left for one that is expected to be so much faster.
_GAIN: Final = 0.02
# Weight of the newest period in what a budget misses.
_NEWEST: Final = 0.5


def budgets_of(num_forced: int, num_scored: int, most: int) -> tuple[int, ...]:
    """Return the budgets to choose from, ascending.

    Args:
        num_forced: Blocks that are read in every step.
        num_scored: Blocks that scores choose.
        most: Blocks that there is room to predict, one of the choices in any case.
    """
    wanted = {num_forced + round(share * num_scored) for share in _SHARES}
    return tuple(sorted({most, *(budget for budget in wanted if budget < most)}))


class BudgetControl:
    """Chooses the budget of one layer, from what it has missed so far.

    Args:
        times: What the layer's parts take.
        budgets: To choose from, ascending; see `budgets_of`.
        start: The budget to begin with, one of them.

    Attributes:
        budget: In use now.
        changes: How often it was changed.
    """

    def __init__(self, times: LayerTimes, budgets: Sequence[int], start: int) -> None:
        self.times = times
        self.budgets = tuple(budgets)
        self.budget = start
        self.changes = 0
        self._misses: dict[int, float] = {}

    def observe(self, misses: float) -> int:
        """Take in what the budget in use has missed; return the one to use from now on.

        Args:
            misses: Mean blocks missed in a step, of each sequence and KV head.
        """
        known = self._misses.get(self.budget, misses)
        self._misses[self.budget] = _NEWEST * misses + (1.0 - _NEWEST) * known
        now = self.times.speculating_us(self.budget, self._misses[self.budget])
        best = min(self.budgets, key=self._at_best)
        if self._at_best(best) < (1.0 - _GAIN) * now:
            self.budget = best
            self.changes += 1
        return self.budget

    @property
    def pays(self) -> bool:
        """Whether the budget in use is expected to be faster than no speculation."""
        misses = self._misses.get(self.budget)
        return misses is None or self.times.pays(self.budget, misses)

    def _at_best(self, budget: int) -> float:
        """Return the least that a budget can cost, by what is known of it and of larger ones."""
        larger = [misses for other, misses in self._misses.items() if other >= budget]
        misses = self._misses.get(budget, max(larger, default=0.0))
        return self.times.speculating_us(budget, misses)
