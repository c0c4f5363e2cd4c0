"""What times of one layer say: the way from torch's operators to speculation, and the bars to pass.

headline   speculation with the stated budget and coverage, and the next prediction beside it
ladder     torch without a CUDA graph, with one, our kernels, and speculation
ablation   the paper's own steps, over the best of torch
bars       over all shapes: the best ratio to torch and their mean, of speculation and of `query`,
           which runs where speculation does not pay; and the least ratio of speculation to `query`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["BARS", "PAPER_LADDER", "TORCH", "ablation", "bars", "headline", "ladder"]

# Programs of torch's operators, the faster of which is what others are compared with.
TORCH: Final = ("torch_sdpa", "torch_flex")
# PRR (arXiv 2606.30389), GLM-4 with InfLLM-V2: reuse the last step and recompute on any miss;
# kernel and repair; prediction by past scores.
PAPER_LADDER: Final = {"recompute": 1.01, "repair": 1.30, "ema": 1.56}
# The paper's best ratio and the mean of its tables' cells; speculation alone has never to lose.
BARS: Final = {
    "best_over_torch": 1.64,
    "mean_over_torch": 1.4,
    "best_query_over_torch": 1.64,
    "mean_query_over_torch": 1.4,
    "least_over_query": 1.0,
}


def headline(rows: Mapping[str, Mapping[str, Any]], budget: float) -> dict[str, Any]:
    """Return the row with an update and a budget, and the name of its program."""
    found = [n for n, row in rows.items() if row.get("updates") and row["budget"] == budget]
    return {"program": found[0], **rows[found[0]]}


def ladder(found: Mapping[str, Any], eager_us: float) -> dict[str, float]:
    """Return what each step of the way from torch to speculation takes, microseconds.

    Args:
        found: Results of one overlap.
        eager_us: Of `torch_sdpa` without a CUDA graph.
    """
    rows = found["programs"]
    return {
        "torch_sdpa_without_graph": round(eager_us, 3),
        "torch_sdpa": rows["torch_sdpa"]["median"],
        "query": rows["query"]["median"],
        "speculate": found["headline"]["median"],
    }


def ablation(found: Mapping[str, Any], headline_us: float) -> dict[str, Any]:
    """Return the paper's ablation: the best of torch over each step.

    Recomputing on any miss is not run. By the times of its parts it takes the longer of selection
    and attention, and attention once more in each step that changes a block of any sequence or KV
    head.

    Args:
        found: Results of one overlap.
        headline_us: Of the headline.
    """
    rows = found["programs"]
    base, select = rows[found["best_torch"]]["median"], rows["torch_select"]["median"]
    attend = max(base - select, 0.0)
    unchanged = rows["reuse_last"]["unchanged"]
    recompute = max(select, attend) + (1 - unchanged) * attend
    return {
        "recompute": round(base / recompute, 3),
        "kernels_alone": round(base / rows["query"]["median"], 3),
        "repair": round(base / rows["reuse_last"]["median"], 3),
        "ema": round(base / headline_us, 3),
        "unchanged": unchanged,
        "paper": PAPER_LADDER,
    }


def bars(results: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the ratios of all headlines and whether they pass; None if nothing was measured.

    Args:
        results: Of shapes, as `measure_layer` returns them; others are passed by.
    """
    firsts = [next(iter(r["by_overlap"].values())) for r in results if r.get("by_overlap")]
    lines = [first["headline"] for first in firsts]
    if not lines:
        return None
    torch = [line["over_torch"] for line in lines]
    serial = [first["programs"]["query"]["over_torch"] for first in firsts]
    found = {
        "best_over_torch": max(torch),
        "mean_over_torch": round(sum(torch) / len(torch), 3),
        "best_query_over_torch": max(serial),
        "mean_query_over_torch": round(sum(serial) / len(serial), 3),
        "least_over_query": min(line["over_query"] for line in lines),
    }
    passed = {name: value >= BARS[name] for name, value in found.items()}
    return {"shapes": len(lines), "found": found, "bars": BARS, "passed": passed}
