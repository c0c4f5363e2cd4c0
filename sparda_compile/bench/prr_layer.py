"""One layer's selection and attention: ours, serial and speculating, beside torch's and FlashInfer.

    torch_sdpa, torch_flex   selection, gather and attention by operators of torch
    torch_compiled           torch_sdpa with a compiled selection; beside the baselines, not of them
    flashinfer_*             the same selection, and FlashInfer's block-sparse attention
    query                    ours, serial
    speculate_b<x>_c<y>      ours; x times K blocks are predicted, which hold a share y of the
                             selected ones; `_update` with the next prediction beside it
    union_b<x>_c<y>          the same, and blocks that were predicted in vain count
    reuse_last               ours; predicted is what the step before read

Every program is one CUDA graph of all steps of all layers of `prr_case`, and they take turns.
Outputs of the first layer are compared with fp64 over the blocks that the trace names: ours have to
be right, and what others offer is left out if it is not.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.memory import FreeMemory, free_everything, too_big
from sparda_compile.bench.prompt_others import compiled_flex
from sparda_compile.bench.prr_case import MOST_ERROR, PrrCase, attend_exactly, error_of, listed
from sparda_compile.bench.prr_others import (
    BACKENDS,
    BlockSparse,
    best_sdpa,
    gather,
    in_row,
    torch_selection,
)
from sparda_compile.bench.prr_programs import (
    Speculation,
    engine_for,
    every_step,
    query_step,
    speculating_step,
)
from sparda_compile.bench.prr_summary import TORCH, ablation, headline, ladder
from sparda_compile.bench.refusals import REFUSALS, reason_of
from sparda_compile.bench.timing import Spread, graphs_us, time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.bench.prr_case import DecodeShape, PrrLayer

    # Of queries [B, H, 1, D], keys and values [B, G, S, D]; of a layer's place and a step.
    Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
    Step = Callable[[int, int], Tensor]
    Selection = Callable[[PrrLayer, int], Tensor]
    Run = Callable[[], list[Tensor]]

__all__ = ["LayerSetting", "measure_layer"]

_STATED_COVERAGE: Final = 0.98
_STATED_BUDGET: Final = 1.5
_PROBED: Final = 4


@dataclasses.dataclass(frozen=True)
class LayerSetting:
    """What is measured of each shape.

    Attributes:
        coverages: Shares of the selected blocks that are predicted.
        budgets: Predicted blocks over selected ones.
        overlaps: Shares of a step's scored blocks that the step before read; with all but the first
            only what depends on it is measured.
        rounds: Turns of each program.
        compiles: Whether `torch_compiled` is measured, whose compilation takes seconds.
    """

    coverages: tuple[float, ...] = (0.7, 0.9, 0.98, 1.0)
    budgets: tuple[float, ...] = (1.0, 1.5, 2.0)
    overlaps: tuple[float, ...] = (0.9, 0.7)
    rounds: int = 8
    compiles: bool = True

    @property
    def stated_coverage(self) -> float:
        """What is compared with the baselines: the paper's coverage, or the next to it."""
        return min(self.coverages, key=lambda each: abs(each - _STATED_COVERAGE))

    @property
    def stated_budget(self) -> float:
        """The budget of what is compared with the baselines; the paper does not state its own."""
        return min(self.budgets, key=lambda each: abs(each - _STATED_BUDGET))


def measure_layer(
    device: torch.device,
    shape: DecodeShape,
    setting: LayerSetting,
    gbps: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure one shape; what does not fit the memory says so under `skipped`.

    Args:
        device: Where.
        shape: Sizes.
        setting: What.
        gbps: The memory's bandwidth, 10^9 bytes per second, for the floors.
        say: Told what is being measured.
    """
    sizes = {"heads": shape.heads, "groups": shape.groups, "layers": shape.layers}
    result: dict[str, Any] = {**sizes, "steps": shape.steps, "by_overlap": {}, "skipped": {}}
    reason = too_big("the cache of all layers", shape.num_bytes, "device", FreeMemory.now().device)
    if reason is not None:
        return {**result, "skipped": {"everything": reason}}
    for overlap in setting.overlaps:
        say(f"{shape.tokens} tokens, batch {shape.batch}, overlap {overlap:g}")
        case = PrrCase(device, dataclasses.replace(shape, overlap=overlap))
        bench = _LayerBench(case, setting, gbps)
        whole = overlap == setting.overlaps[0]
        result["by_overlap"][str(overlap)] = bench.whole() if whole else bench.reused()
        del case, bench
        free_everything()
    first, *others = result["by_overlap"].values()
    for found in (first, *others):
        found["ablation"] = ablation(found, first["headline"]["median"])
    return result


class _LayerBench:
    """Programs of one case, compared and ready to be timed."""

    def __init__(self, case: PrrCase, setting: LayerSetting, gbps: float) -> None:
        self.case, self.setting, self.gbps = case, setting, gbps
        self.engine = engine_for(case.device)
        self.programs: dict[str, Run] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.first: list[Tensor] = []
        self.select = torch_selection(case)
        self.begin = in_row(case)
        layer = case.layers[0]
        self.exact = [self._exact(step, ids) for step, ids in enumerate(layer.ids)]
        for step, wanted in enumerate(layer.ids):
            found = self.select(layer, step).sort(-1).values
            if not torch.equal(found.int(), wanted):
                raise AssertionError("a selection does not follow its trace")

    def _exact(self, step: int, ids: Tensor) -> Tensor:
        layer = self.case.layers[0]
        return attend_exactly(layer.queries[step], layer.pages, ids, self.case.scale)

    def whole(self) -> dict[str, Any]:
        """Measure everything."""
        self._torch()
        self._offer("torch_flex", lambda: self._selected(_flex(self.case.scale)))
        if self.setting.compiles:
            self._compiled()
        for backend in BACKENDS:
            self._flashinfer(backend)
        self._ours("query", query_step(self.case))
        for budget in self.setting.budgets:
            for coverage in self.setting.coverages:
                self._speculate(budget, coverage)
        self._reuse_last()
        found = self._measured()
        found["headline"] = headline(found["programs"], self.setting.stated_budget)
        found["ladder"] = ladder(found, self._eager_us())
        return found

    def reused(self) -> dict[str, Any]:
        """Measure what depends on the overlap."""
        self._torch()
        self._ours("query", query_step(self.case))
        self._reuse_last()
        return self._measured()

    def _torch(self) -> None:
        case = self.case
        form, self.forms = best_sdpa(self._gathered())
        if form is None:
            raise RuntimeError(f"no form of SDPA runs: {self.forms}")
        self.attention = form[1]
        self._offer("torch_sdpa", lambda: self._selected(form[1]), form=form[0])
        if "torch_sdpa" in self.skipped:
            raise AssertionError(f"torch_sdpa cannot be compared with: {self.skipped}")

        def select(place: int, step: int) -> Tensor:
            return self.select(case.layers[place], step)

        self.programs["torch_select"] = every_step(case, select, self.engine)
        self.rows["torch_select"] = {}

    def _gathered(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return queries, keys and values of a step of some layers."""
        return [
            (layer.queries[0], *gather(layer.pages, self.begin, layer.ids[0].long()))
            for layer in self.case.layers[:_PROBED]
        ]

    def _compiled(self) -> None:
        select = torch_selection(self.case, compiled=True)
        self._offer("torch_compiled", lambda: self._selected(self.attention, select))

    def _selected(self, attention: Attention, select: Selection | None = None) -> Step:
        """Return a step of torch's operators."""
        choose = select or self.select

        def step(place: int, number: int) -> Tensor:
            layer = self.case.layers[place]
            ids = choose(layer, number)
            return attention(layer.queries[number], *gather(layer.pages, self.begin, ids))

        return step

    def _flashinfer(self, backend: str) -> None:
        name, case = f"flashinfer_{backend}", self.case

        def make() -> Step:
            sparse = BlockSparse(backend, case.device)
            planned = [
                [
                    sparse.planned(layer.queries[step], layer.pages, self.begin, ids)
                    for step, ids in enumerate(layer.ids)
                ]
                for layer in case.layers
            ]
            self.rows[name] = {"plan_us": sparse.mean_plan_us(), "version": sparse.version}

            def step(place: int, number: int) -> Tensor:
                self.select(case.layers[place], number)
                return planned[place][number]()

            return step

        self._offer(name, make)

    def _offer(self, name: str, make: Callable[[], Step], **facts: Any) -> None:
        """Add a program of others, or say why not."""
        try:
            run = every_step(self.case, make(), self.engine)
            outputs = run()
        except REFUSALS as refusal:
            reason = reason_of(refusal)
        else:
            error = self._error(outputs, self.exact)
            reason = "" if error < MOST_ERROR else f"its output is off by {error:.3g}"
            facts = {**facts, "error": error}
        if reason:
            self.rows.pop(name, None)
            self.skipped[name] = reason
            return
        self.programs[name] = run
        self.rows[name] = {**self.rows.get(name, {}), **facts}

    def _ours(
        self, name: str, step: Step, exact: Sequence[Tensor] | None = None, **facts: Any
    ) -> list[Tensor]:
        """Add a program of ours, which has to be right; return its outputs."""
        run = every_step(self.case, step, self.engine)
        outputs = run()
        error = self._error(outputs, exact or self.exact)
        if not error < MOST_ERROR:
            raise AssertionError(f"{name} is off by {error}")
        self.programs[name] = run
        self.rows[name] = {**facts, "error": error}
        return outputs

    @staticmethod
    def _error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        return max(error_of(out, each) for out, each in zip(outputs, exact, strict=True))

    def _speculate(self, budget: float, coverage: float) -> None:
        case = self.case
        width = round(budget * case.shape.selected)
        predicted = [
            [case.predict(layer, step, width, coverage) for step in range(case.shape.steps)]
            for layer in case.layers
        ]
        facts = {"budget": budget, "stated_coverage": coverage, **self._counts(predicted[0])}
        name = f"b{budget:g}_c{coverage:g}"
        setting = Speculation(predicted)
        self._same_bits(f"speculate_{name}", setting, facts)
        if coverage != self.setting.stated_coverage:
            return
        updating = dataclasses.replace(setting, updates=True)
        self._same_bits(f"speculate_{name}_update", updating, {**facts, "updates": True})
        layer, union = case.layers[0], dataclasses.replace(setting, union=True)
        exact = [
            self._exact(step, _united(reads, predicted[0][step], case.shape.current))
            for step, reads in enumerate(layer.reads)
        ]
        self._ours(f"union_{name}", speculating_step(case, union), exact, **facts, union=True)

    def _same_bits(self, name: str, setting: Speculation, facts: Mapping[str, Any]) -> None:
        """Add a program whose outputs should not depend on what was predicted, and say if not."""
        outputs = self._ours(name, speculating_step(self.case, setting), **facts)
        self.first = self.first or outputs
        self.rows[name]["same_bits"] = all(map(torch.equal, outputs, self.first))

    def _reuse_last(self) -> None:
        layers, steps = self.case.layers, range(self.case.shape.steps)
        predicted = [[listed(layer.last(step)) for step in steps] for layer in layers]
        pairs = [(layer.last(step), layer.reads[step]) for layer in layers for step in steps]
        unchanged = sum(torch.equal(*pair) for pair in pairs) / len(pairs)
        facts = {**self._counts(predicted[0]), "unchanged": unchanged}
        self._same_bits("reuse_last", Speculation(predicted), facts)

    def _counts(self, predicted: Sequence[Tensor]) -> dict[str, float]:
        """Return what a prediction of the first layer finds, of each sequence and KV head."""
        shape, ids = self.case.shape, self.case.layers[0].ids
        found = [
            torch.stack([(guess[..., None] == each[..., None, :]).sum((2, 3)), (guess >= 0).sum(2)])
            for guess, each in zip(predicted, ids, strict=True)
        ]
        # The current block is in both, and nobody attends to it early.
        hits, guessed = (torch.stack(found).float().mean((0, 2, 3)) - 1).tolist()
        return {
            "coverage": round(hits / (shape.selected - 1), 4),
            "missed": round(shape.selected - 1 - hits, 2),
            "wasted": round(guessed - hits, 2),
        }

    def _measured(self) -> dict[str, Any]:
        """Time all programs; return their rows."""
        shape = self.case.shape
        num_steps = shape.steps * len(self.case.layers)
        serial = shape.pooled_bytes + shape.selected * shape.block_bytes
        for name, times in graphs_us(self.programs, self.setting.rounds).items():
            row = self.rows[name]
            read = serial + row.get("wasted", 0) * shape.block_bytes
            if name == "torch_select":
                read = shape.pooled_bytes
            spread = Spread.of([us / num_steps for us in times])
            floor = round(read / self.gbps / 1e3, 3)
            self.rows[name] = {**spread.to_dict(), "floor_us": floor, **row}
        offers = [name for name in TORCH if name in self.programs]
        best = min(offers, key=lambda name: self.rows[name]["median"])
        for row in self.rows.values():
            row["over_torch"] = round(self.rows[best]["median"] / row["median"], 3)
            row["over_query"] = round(self.rows["query"]["median"] / row["median"], 3)
        return {
            "best_torch": best,
            "programs": self.rows,
            "sdpa_forms": self.forms,
            "skipped": self.skipped,
        }

    def _eager_us(self) -> float:
        """Return what torch's serial program takes without a CUDA graph."""
        run = self.programs["torch_sdpa"]
        num_steps = self.case.shape.steps * len(self.case.layers)
        return Spread.of(time_calls(run, 3)).median / num_steps


@functools.cache
def _flex(scale: float) -> Callable[..., Tensor]:
    return compiled_flex(scale)


def _united(reads: Tensor, predicted: Tensor, current: int) -> Tensor:
    """Return the blocks that are read or were attended to early, [B, G, n] int32."""
    wanted = torch.nn.functional.pad(reads, (0, 1))
    early = predicted.where((predicted >= 0) & (predicted != current), reads.shape[-1])
    wanted.scatter_(-1, early.long(), True)
    return listed(wanted[..., :-1])
