"""The part of a Forecast that one rank has: the rows of its own KV heads.

A file holds the projections of all KV heads, G*F*D rows each, those of one KV head together. Of N
ranks, rank r holds the KV heads from r*G/N on, as transformers shards keys by rows, so its part is
a cut through the rows: of W, or of U where W = U V. V is the same on all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.forecast.projection import Projection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparda_compile.forecast.projection import ProjectionShape
    from sparda_compile.ranks.agreement import Ranks

__all__ = ["parts_of"]


def parts_of(
    whole: Mapping[int, Projection], shapes: Mapping[int, ProjectionShape], ranks: Ranks
) -> dict[int, Projection]:
    """Return this rank's part of each projection; what has other rows is returned as it is.

    Args:
        whole: Projections by target layer, of all KV heads.
        shapes: Sizes that this rank's program has for each layer.
        ranks: That share the heads.
    """
    found = dict(whole)
    if ranks.is_alone:
        return found
    for layer, shape in shapes.items():
        projection = found.get(layer)
        if projection is None or projection.shape.rows != shape.rows * ranks.size:
            continue
        rows, *rest = projection.factors
        mine = Projection((rows.narrow(0, ranks.rank * shape.rows, shape.rows).clone(), *rest))
        # Two factors that were smaller than all rows may not be smaller than these few.
        found[layer] = Projection((mine.product(),)) if shape.rank is None else mine
    return found
