"""What others offer for a decode step's selection and attention, on the data of `prr_case`.

    select       scores of pooled keys, softmax for each head, their sum over a group, max-pool to
                 blocks, `torch.topk`: operators of torch, each of them one or two kernels, or
                 what `torch.compile` makes of them
    gather       keys and values of the selected blocks in a row, by `index_select`
    sdpa         SDPA over these, by the kernel and the form that is fastest there
    flex         FlexAttention over these, compiled
    flashinfer   FlashInfer's block-sparse attention on the cache as it is. It is planned on the
                 CPU, so each step is planned before it is timed, and `plan_us` stands apart

A baseline has what is known on the CPU for nothing: how many pooled keys there are, and that no
token has to be masked.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparda_compile.bench.refusals import REFUSALS, reason_of
from sparda_compile.bench.timing import Spread, graphs_us, time_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sparda_compile.bench.prr_case import PrrCase, PrrLayer

    # Of queries [B, H, 1, D], keys and values [B, G, S, D]: [B, H, 1, D].
    Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = [
    "BACKENDS",
    "BlockSparse",
    "best_sdpa",
    "gather",
    "in_row",
    "torch_selection",
]

# Of FlashInfer: what it chooses by itself, and the one for GPUs of all kinds.
BACKENDS: Final = ("auto", "fa2")

_BACKENDS: Final = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PROBES: Final = 5
# Shapes that one process compiles a selection for; torch stops at eight.
_MOST_FORMS: Final = 64
_WORKSPACE_BYTES: Final = 128 << 20


def torch_selection(case: PrrCase, *, compiled: bool = False) -> Callable[[PrrLayer, int], Tensor]:
    """Return InfLLM-V2's selection by operators of torch: [B, G, K] int64, in any order.

    Args:
        case: What it selects from.
        compiled: Whether `torch.compile` may join what it can.
    """
    shape, geometry = case.shape, case.shape.geometry
    ratio = geometry.block_size // geometry.pool_stride
    overhang = geometry.pool_size // geometry.pool_stride - 1
    always = torch.zeros(shape.current + 1, device=case.device)
    always[: shape.sink] = always[shape.current - shape.local :] = float("inf")
    pairs = (shape.batch, shape.groups)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=case.device)

    def best(queries: Tensor, keys: Tensor) -> Tensor:
        logits = torch.baddbmm(nothing, queries, keys, beta=0, alpha=case.scale)
        weights = logits.softmax(-1, dtype=torch.float32).sum(1).unflatten(0, pairs)
        scores = F.max_pool1d(weights, ratio + overhang, ratio, overhang, ceil_mode=True)
        return (scores + always).topk(shape.selected, sorted=False).indices

    chosen = _compiled(best) if compiled else best

    def select(layer: PrrLayer, step: int) -> Tensor:
        keys = layer.pooled.flatten(0, 1)[:, : shape.num_windows].transpose(1, 2)
        queries = layer.queries[step].view(len(keys), -1, shape.dim)
        return chosen(queries, keys)

    return select


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*operands: Tensor) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MOST_FORMS):
            return compiled(*operands)

    return call


def in_row(case: PrrCase) -> Tensor:
    """Return where the blocks of each pair of sequence and KV head begin, [B, G, 1] int64."""
    shape = case.shape
    pairs = torch.arange(shape.batch * shape.groups, device=case.device)
    blocks = shape.tokens // shape.block
    return (pairs * 2 * blocks).view(shape.batch, shape.groups, 1)


def gather(pages: Tensor, begin: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of blocks in a row, [B, G, K * P, D] each.

    Args:
        pages: [B, G, N, 2, P, D].
        begin: From `in_row`.
        ids: [B, G, K] int64.
    """
    size, dim = pages.shape[4:]
    flat = pages.view(-1)
    place = torch.add(begin, ids, alpha=2).view(-1)
    keys, values = (
        part.view(-1, size * dim).index_select(0, place).view(*ids.shape[:2], -1, dim)
        for part in (flat, flat[size * dim :])
    )
    return keys, values


def _sdpa_forms() -> Iterator[tuple[str, Attention]]:
    """Yield SDPA by each kernel: as it is, and with the heads of a group as tokens.

    The memory-efficient kernel would repeat keys and values for each head; it gets tokens alone.
    """

    def plain(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    def folded(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = query.view(*keys.shape[:2], -1, keys.shape[3])
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(heads, keys, values).reshape(query.shape)

    for name, backend in _BACKENDS.items():
        yield f"{name}_folded", partial(folded, backend)
        if name != "efficient":
            yield name, partial(plain, backend)


def best_sdpa(
    operands: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[tuple[str, Attention] | None, dict[str, float | str]]:
    """Return the fastest form of SDPA and its name, and the time of each, or why it has none.

    Args:
        operands: Queries [B, H, 1, D], keys and values [B, G, S, D], of several layers.
    """
    refused = {name: _refusal(form, operands[0]) for name, form in _sdpa_forms()}
    running = {name: form for name, form in _sdpa_forms() if refused[name] is None}
    found: dict[str, float | str] = {name: why for name, why in refused.items() if why is not None}

    def every(form: Attention) -> None:
        for each in operands:
            form(*each)

    programs = {name: partial(every, form) for name, form in running.items()}
    for name, times in graphs_us(programs, _PROBES).items():
        found[name] = round(Spread.of(times).median / len(operands), 3)
    best = min(running, key=lambda name: float(found[name]), default=None)
    return (None if best is None else (best, running[best])), found


def _refusal(form: Attention, operands: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Return why a form does not run, None if it does."""
    try:
        form(*operands)
    except REFUSALS as refusal:
        return reason_of(refusal)
    return None


class BlockSparse:
    """FlashInfer's block-sparse attention, planned for some sets of blocks.

    A pair of sequence and KV head is a row of blocks: its query heads are that row's tokens. Values
    lie a block behind their keys, so the same indices find both.

    Args:
        backend: One of `BACKENDS`.
        device: Where it runs.

    Attributes:
        plan_us: CPU time of each plan, microseconds.
        version: Of FlashInfer.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        # By name: it is measured where somebody has installed it, and nothing else needs it.
        flashinfer = importlib.import_module("flashinfer")
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._make = partial(flashinfer.BlockSparseAttentionWrapper, workspace, backend=backend)
        self.version = str(getattr(flashinfer, "__version__", "unknown"))
        self.plan_us: list[float] = []

    def planned(
        self, query: Tensor, pages: Tensor, begin: Tensor, ids: Tensor
    ) -> Callable[[], Tensor]:
        """Plan for selected blocks; return the attention to them, [B, H, 1, D].

        Args:
            query: [B, H, 1, D].
            pages: [B, G, N, 2, P, D].
            begin: From `in_row`.
            ids: [B, G, K].
        """
        size, dim = pages.shape[4:]
        indices = torch.add(begin, ids.long(), alpha=2).view(-1).int()
        pairs, selected = ids.shape[0] * ids.shape[1], ids.shape[2]
        indptr = torch.arange(pairs + 1, dtype=torch.int32, device=ids.device) * selected
        flat = pages.view(-1, 1, dim)
        keys, values = flat[:-size], flat[size:]
        rows = query.view(-1, 1, dim)
        wrapper: Any = self._make()
        sizes = (len(rows), len(keys), len(rows) // pairs, size, 1, 1, dim)
        kinds = {"q_data_type": query.dtype, "o_data_type": query.dtype}
        self.plan_us += time_calls(partial(wrapper.plan, indptr, indices, *sizes, **kinds), 1)

        def attend() -> Tensor:
            out: Tensor = wrapper.run(rows, keys, values)
            return out.view(query.shape)

        return attend

    def mean_plan_us(self) -> float:
        """Return the median time of a plan."""
        return round(Spread.of(self.plan_us).median, 1)
