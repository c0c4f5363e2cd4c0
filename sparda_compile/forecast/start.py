"""Where a Forecast starts: one linear map that predicts the mean query of each group.

Of F heads per group, each predicts the mean over as many neighbouring heads of the group, R/F.

    Q(h)    a layer's queries before their rotation [H, D], as its nodes compute them from the input
            of its query projection
    g(h)    mean of Q over each run of R/F heads of a group, [G*F*D]
    W       c * mean over h of dg/dh at h,  h ~ N(0, I)                        [G*F*D, hidden]
    c       scale * sqrt(D) for F = 1, else 1

Where Q is affine, as in most models, one h gives the mean of those heads' rows of the query
projection, whatever nodes and fused weights it is made of: what active adapters add is in it, and
quantised weights count as what they stand for. A bias is left out, since a Forecast has none. With
a norm on the queries the mean over many h is the linear map of least squared error (Stein's lemma).
c is 1 for the usual scale: then the softmax that a Forecast is trained through is over the model's
own scores. Several heads are scored as query heads are, with the model's own scale.

W is derived from the input of the layer itself and reads that of the layer before, which the
residual stream changes little. Untrained it is the hint `next_query` with F heads per group: with F
= R that hint itself, where Q has neither a bias nor a norm and no projection is of low rank.

Source: the rehearsal of InfiniGen (arXiv 2406.19707), as in `hints/next_query.py`, on the mean
query of a group (PRR, arXiv 2606.30389, appendix A.1). Differs from SparDA (arXiv 2606.04511),
which starts from random weights; those are left for a layer whose Q has no derivative. A projection
of low rank starts from the closest one of that rank.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.forecast.projection import Projection
from sparda_compile.graph.evaluate import PROOF_BATCH, evaluate
from sparda_compile.graph.nodes import fake_value, tensor_shape
from sparda_compile.graph.site import forecast_dim
from sparda_compile.isa.table import instruction_of
from sparda_compile.ranks.agreement import ALONE
from sparda_compile.ranks.collectives import all_reduce
from sparda_compile.sizes import NUM_TOKENS, concrete

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from sparda_compile.capture.forward import CapturedGraph
    from sparda_compile.forecast.projection import ProjectionShape
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.ranks.agreement import Ranks

__all__ = ["initial_forecast"]

_NUM_SAMPLES: Final = 8
# Derivatives that are taken at once: each holds a gradient of all queries.
_NUM_ROWS: Final = 1024
# Of what a step changes; rounding is far below it, and a norm changes as much as there is.
_AFFINE_TOLERANCE: Final = 1e-2
_HALF: Final = (torch.float16, torch.bfloat16)


class _NoStartError(Exception):
    """A layer's queries give no start; the text says why."""


def initial_forecast(
    graph: fx.Graph,
    sites: Sequence[AttentionSite],
    shapes: Mapping[int, ProjectionShape],
    captured: CapturedGraph,
    dtype: torch.dtype,
) -> dict[int, Projection]:
    """Return the projections that nobody has trained, always the same ones.

    A warning names the layers whose queries give no start, and why; they start from random weights,
    U(-1/sqrt(hidden), 1/sqrt(hidden)). The global random state is as before.

    Args:
        graph: A graph that has the nodes of the sites' queries, by name: as captured, or any that
            still computes them.
        sites: Attentions of the model, those of `shapes` among them.
        shapes: Sizes of each projection, by target layer.
        captured: The forward that the graph comes from, with the values of its weights.
        dtype: Of the projections; they are computed in float32.

    Returns:
        Projections by target layer, on the model's device.
    """
    nodes = {node.name: node for node in graph.nodes}
    weights: dict[int, Projection] = {}
    reasons = {}
    for site in sites:
        if site.layer not in shapes:
            continue
        shape = shapes[site.layer]
        try:
            weight = _mean_query(site, nodes, shape, captured)
        except _NoStartError as error:
            reasons[site.layer] = str(error)
            weight = _random(site.layer, shape).to(captured.device)
        weights[site.layer] = Projection.truncated(weight, shape.rank).to(dtype)
    if reasons:
        first = next(iter(reasons.values()))
        warnings.warn(
            f"the Forecast of layers {', '.join(map(str, reasons))} starts from random weights, "
            f"which pick blocks close to random: their queries give no start ({first}). Train it, "
            "or use mode='query'.",
            stacklevel=4,
        )
    return weights


def _random(layer: int, shape: ProjectionShape) -> Tensor:
    bound = 1.0 / math.sqrt(shape.hidden)
    generator = torch.Generator().manual_seed(layer)
    weight = torch.empty(shape.rows, shape.hidden, device="cpu")
    return weight.uniform_(-bound, bound, generator=generator)


def _mean_query(
    site: AttentionSite,
    nodes: Mapping[str, fx.Node],
    shape: ProjectionShape,
    captured: CapturedGraph,
) -> Tensor:
    """Return W of a site, float32.

    Raises:
        _NoStartError: If there is none of this shape.
    """
    hidden, query = nodes[site.hidden.name], nodes[site.rotation_input.name]
    batch, _, width = concrete(tensor_shape(hidden), PROOF_BATCH, 1)
    if width != shape.hidden:
        raise _NoStartError(
            f"they are made of {width} channels, the layer before has {shape.hidden}"
        )
    dim = forecast_dim(site)
    try:
        # Weights may have been loaded in inference mode; autograd keeps none of those.
        with torch.inference_mode(False), torch.enable_grad():
            known, is_gathered = _inputs(query, hidden, captured)

            def group_means(sample: Tensor) -> Tensor:
                known[hidden] = sample.expand(batch, 1, width)
                heads: Tensor = evaluate(query, known, {}, 1, _full)[0]
                heads = heads.float().reshape(site.num_heads, dim)
                return heads.view(shape.rows // dim, -1, dim).mean(1).flatten()

            ranks = captured.ranks if is_gathered else ALONE
            weight = _mean_jacobian(group_means, width, captured.device, ranks)
    except _NoStartError:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise _NoStartError(f"{type(error).__name__}: {line}") from error
    if shape.rows == site.num_groups * dim:
        weight = weight * (site.scale * math.sqrt(dim))
    if not weight.isfinite().all():
        raise _NoStartError("their derivative is not finite")
    return weight


def _inputs(
    query: fx.Node, hidden: fx.Node, captured: CapturedGraph
) -> tuple[dict[fx.Node, Any], bool]:
    """Return the values of the graph's inputs that make a query of `hidden`, float32.

    Returns:
        The values, and whether other ranks have a part in the query.

    Raises:
        _NoStartError: If the query also depends on the tokens in another way.
    """
    values: dict[fx.Node, Any] = {}
    is_gathered = False
    seen = {hidden}
    stack = [query]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += node.all_input_nodes
        instruction = instruction_of(node.target)
        is_gathered |= instruction is not None and instruction.is_collective
        if node.op != "placeholder":
            continue
        if node.name in captured.weights:
            weight = captured.weights[node.name].detach()
            if is_traceable_wrapper_subclass(weight):  # quantised
                weight = weight.dequantize()
            full = torch.float32 if weight.is_floating_point() else weight.dtype
            values[node] = weight.to(full, copy=True)
        elif isinstance(fake_value(node), Tensor):
            raise _NoStartError(f"they depend on {node.name} besides the layer's input")
        else:
            values[node] = 1 if node.name == NUM_TOKENS else PROOF_BATCH
    return values, is_gathered


def _full(argument: Any) -> Any:
    """Return an argument of a node, float32 for a dtype of half precision."""
    return torch.float32 if argument in _HALF else argument


def _mean_jacobian(
    function: Callable[[Tensor], Tensor], width: int, device: torch.device, ranks: Ranks
) -> Tensor:
    """Return the mean derivative [outputs, width] of a function of h [width], h ~ N(0, I)."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(_NUM_SAMPLES, width, generator=generator, device="cpu").to(device)
    first = _jacobian(function, samples[0], ranks)
    step = samples[1] - samples[0]
    with torch.no_grad():
        change = function(samples[1]) - function(samples[0])
        if not change.isfinite().all():
            raise _NoStartError("they are not finite")
        is_affine = (change - first @ step).norm() <= _AFFINE_TOLERANCE * change.norm()
    if is_affine:
        return first
    total = first
    for sample in samples[1:]:
        total = total + _jacobian(function, sample, ranks)
    return total / _NUM_SAMPLES


def _jacobian(function: Callable[[Tensor], Tensor], sample: Tensor, ranks: Ranks) -> Tensor:
    """Return the derivative [outputs, width] of a function at a point [width].

    Args:
        function: Of all ranks together, each of which derives the part that is its own.
        sample: The point, the same on all of them.
        ranks: They.
    """
    leaf = sample.clone().requires_grad_()
    out = function(leaf)
    directions = torch.eye(len(out), dtype=out.dtype, device=out.device)
    parts = [
        torch.autograd.grad(out, leaf, rows, retain_graph=True, is_grads_batched=True)[0]
        for rows in directions.split(_NUM_ROWS)
    ]
    mine = torch.cat(parts)
    return mine if ranks.is_alone else all_reduce(mine, ranks.size, ranks.group)
