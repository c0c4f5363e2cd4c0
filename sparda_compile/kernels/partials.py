"""Partial results of attention, (O, log-sum-exp), and what can be done with them.

    attend    o_b, lse_b = softmax(q K_b^T * scale) V_b                  of each block alone
    merge     lse = logsumexp_s lse_s ;  o = sum_s exp(lse_s - lse) o_s
    remove    r = exp(lse_n - lse) ;  o' = (o - r o_n) / (1 - r) ;  lse' = lse + log(1 - r)

A partial of nothing is (0, -inf), and so are merges of such. All is fp32. Merging S partials in
another order changes the result by rounding alone: each order is within (S + 8) * 2^-23 of the
largest partial in a column. Removing multiplies the error of what it is given by 1 / (1 - r): it
is refused where r is more than a limit, and the caller attends again instead.

Source: PRR (arXiv 2606.30389) section 4.3, equations 6 to 8; removal is not in the paper. The ops
are public as `sparda_compile.partials`, which says what they take. On CUDA: `gpu/partials.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.isa.define import define
from sparda_compile.kernels.paged import read_pages

if TYPE_CHECKING:
    from sparda_compile.kernels.paged import Stored

__all__ = [
    "MOST_REMOVED",
    "attend_blocks",
    "block_partials",
    "group_partials",
    "merge",
    "merge_partials",
    "remove",
    "remove_partial",
]

MOST_REMOVED: Final = 0.5
"""Share of the mass that `remove` takes out at most; what is left has twice the error then."""
_LOWEST: Final = torch.finfo(torch.float32).min


def group_partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGSn: Tensor,
    block_ids_BGSn: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
    stored: Stored | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each group of blocks alone.

    Args:
        query_BH1D: Queries.
        pages: [B, G, C, 2, P, D], keys then values; or stored runs.
        page_ids_BGSn: Page of each block, int32; n blocks of each of S groups.
        block_ids_BGSn: Blocks, int32, -1 for none.
        lengths_B: Position of the query, int32; later keys are not seen.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        stored: What goes with pages of stored runs.

    Returns:
        [B, G, S, R, D] fp32 and [B, G, S, R] fp32; (0, -inf) where a group has no block.
    """
    groups = pages.shape[1]
    query_BGRD = query_BH1D[:, :, 0].unflatten(1, (groups, -1)).float()
    kv_BGSn2PD = read_pages(pages, page_ids_BGSn, block_ids_BGSn, lengths_B, stored).float()
    size = kv_BGSn2PD.shape[5]
    keys, values = (each.flatten(3, 4) for each in kv_BGSn2PD.unbind(4))
    scores = query_BGRD[:, :, None] @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    position = block_ids_BGSn[..., None].long() * size + torch.arange(size, device=pages.device)
    seen = position <= lengths_B.long()[:, None, None, None, None]
    seen = (seen & (block_ids_BGSn[..., None] >= 0)).flatten(3)
    scores = scores.masked_fill(~seen[..., None, :], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=_LOWEST)[..., None])
    # A page of a block that is not there may hold anything, NaN too: weight 0 must win.
    return weights @ values.masked_fill(~seen[..., None], 0.0), lse


def block_partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float = 0.0,
    stored: Stored | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to each block alone; see `group_partials`.

    Returns:
        [B, G, K, R, D] fp32 and [B, G, K, R] fp32; (0, -inf) where there is no block.
    """
    ids = (page_ids_BGK[..., None], block_ids_BGK[..., None])
    return group_partials(query_BH1D, pages, *ids, lengths_B, scale, softcap, stored)


def merge(out_SRD: Tensor, lse_SR: Tensor, keep_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge partials in their order.

    Args:
        out_SRD: [..., S, R, D] fp32.
        lse_SR: [..., S, R] fp32.
        keep_S: [..., S] bool, those that count; None for all.

    Returns:
        [..., R, D] fp32 and [..., R] fp32; (0, -inf) if nothing counts.
    """
    if keep_S is not None:
        lse_SR = lse_SR.masked_fill(~keep_S[..., None], float("-inf"))
    total = lse_SR.logsumexp(-2)
    weights = torch.exp(lse_SR - total.clamp(min=_LOWEST)[..., None, :])
    # A partial that does not count may hold anything.
    parts = out_SRD.masked_fill((weights == 0.0)[..., None], 0.0)
    # The weights add up to 1 but for the rounding of the log-sum-exp, which is all in their sum.
    sums = weights.sum(-2).clamp(min=torch.finfo(torch.float32).tiny)
    return (weights[..., None] * parts).sum(-3) / sums[..., None], total


def remove(
    out_RD: Tensor,
    lse_R: Tensor,
    part_out_RD: Tensor,
    part_lse_R: Tensor,
    limit: float = MOST_REMOVED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a partial out of a merged one that it is part of.

    Args:
        out_RD: [..., R, D] fp32, of all.
        lse_R: [..., R] fp32.
        part_out_RD: [..., R, D] fp32, of what goes.
        part_lse_R: [..., R] fp32.
        limit: Share of the mass that may go; the rest keeps its precision then.

    Returns:
        [..., R, D] and [..., R] of what is left, and [..., R] bool: whether it may be used. Where
        more than the limit went, what is there is (0, -inf).
    """
    share = torch.exp(part_lse_R - lse_R.clamp(min=_LOWEST))
    # A limit next to 1 is 1 in fp32, and of all of it nothing is left.
    fine = (share <= limit) & (share < 1.0)
    left = torch.where(fine, 1.0 - share, 1.0)
    # A partial of nothing may hold anything.
    part_out_RD = part_out_RD.masked_fill((share == 0.0)[..., None], 0.0)
    out = (out_RD - share[..., None] * part_out_RD) / left[..., None]
    out = torch.where(fine[..., None], out, 0.0)
    return out, torch.where(fine, lse_R + torch.log1p(left - 1.0), float("-inf")), fine


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: str) -> None:
    """Refuse a tensor of another shape or dtype; None is a size that may be any."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(w not in (None, g) for w, g in zip(shape, got, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise UnsupportedInputError(
            f"{name} has shape {list(got)}; with the other arguments it has to be [{sizes}]."
        )
    if str(tensor.dtype).removeprefix("torch.") not in dtypes.split():
        raise UnsupportedInputError(
            f"{name} is {tensor.dtype}; it has to be {' or '.join(dtypes.split())}."
        )


def _check_devices(arguments: Any) -> None:
    """Refuse tensors of several devices."""
    (first, wanted), *others = (
        (name, value.device) for name, value in vars(arguments).items() if isinstance(value, Tensor)
    )
    for name, device in others:
        if device != wanted:
            raise UnsupportedInputError(
                f"{name} is on {device}, and {first} on {wanted}; move all of them to one device."
            )


def _check_partial(names: tuple[str, str], out: Tensor, lse: Tensor, least: int) -> None:
    """Refuse what is not [..., R, D] and [..., R] in fp32, of `least` dimensions or more."""
    if lse.dim() < least:
        shape = "[..., S, R]" if least == 2 else "[..., R]"
        raise UnsupportedInputError(
            f"{names[1]} has shape {list(lse.shape)}; it has to be {shape}. Add the missing "
            "dimensions with unsqueeze."
        )
    _check(names[1], lse, tuple(lse.shape), "float32")
    _check(names[0], out, (*lse.shape, None), "float32")


def _check_blocks(a: Any) -> tuple[int, ...]:
    """Refuse arguments of `attend_blocks` that do not fit; return [B, G, K, R, D]."""
    _check_devices(a)
    _check("pages", a.pages, (None, None, None, 2, None, None), "float32 float16 bfloat16")
    batch, groups, _, _, _, dim = a.pages.shape
    _check("query", a.query, (batch, None, 1, dim), str(a.pages.dtype).removeprefix("torch."))
    heads = int(a.query.shape[1])
    if not heads or heads % groups:
        raise UnsupportedInputError(
            f"query has {heads} heads, and pages have {groups} KV heads; the first has to be a "
            "multiple of the second."
        )
    _check("block_ids", a.block_ids, (batch, groups, None), "int32")
    _check("page_ids", a.page_ids, tuple(a.block_ids.shape), "int32")
    _check("lengths", a.lengths, (batch,), "int32")
    if not a.pages.is_contiguous():
        raise UnsupportedInputError(
            "pages is not contiguous, and a copy of a whole cache would be made in silence; pass "
            "pages.contiguous() if that is meant."
        )
    return (*a.block_ids.shape, heads // groups, dim)


def _fake_blocks(a: Any) -> tuple[Tensor, Tensor]:
    shape = _check_blocks(a)
    out = a.query.new_empty(shape, dtype=torch.float32)
    return out, a.query.new_empty(shape[:-1], dtype=torch.float32)


@define(
    fake=_fake_blocks,
    results=("partial_out", "partial_lse"),
    kernels=("_attend_blocks",),
    is_free=True,
)
def attend_blocks(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend to each block alone; see `sparda_compile.partials.attend_blocks`."""
    tensors = SimpleNamespace(
        query=query, pages=pages, page_ids=page_ids, block_ids=block_ids, lengths=lengths
    )
    if not query.is_cuda:
        _check_blocks(tensors)
        return block_partials(query, pages, page_ids, block_ids, lengths, scale, softcap)
    from sparda_compile.kernels.gpu import partials

    results = _fake_blocks(tensors)
    ids = (page_ids.contiguous(), block_ids.contiguous(), lengths.contiguous())
    partials.attend_blocks(query, pages, *ids, scale, softcap, results, early=False)
    return results


def _fake_merge(a: Any) -> tuple[Tensor, Tensor]:
    _check_devices(a)
    _check_partial(("partial_out", "partial_lse"), a.partial_out, a.partial_lse, 2)
    if a.keep is not None:
        _check("keep", a.keep, tuple(a.partial_lse.shape[:-1]), "bool")
    shape = (*a.partial_lse.shape[:-2], *a.partial_out.shape[-2:])
    return a.partial_out.new_empty(shape), a.partial_lse.new_empty(shape[:-1])


@define(fake=_fake_merge, results=("out", "lse"), kernels=("_merge_partials",), is_free=True)
def merge_partials(
    partial_out: Tensor, partial_lse: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partials in their order; see `sparda_compile.partials.merge_partials`."""
    results = _fake_merge(
        SimpleNamespace(partial_out=partial_out, partial_lse=partial_lse, keep=keep)
    )
    if not partial_out.is_cuda:
        return merge(partial_out.contiguous(), partial_lse.contiguous(), keep)
    from sparda_compile.kernels.gpu import partials

    partials.merge(partial_out, partial_lse, keep, results)
    return results


def _fake_removal(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(a)
    _check_partial(("out", "lse"), a.out, a.lse, 1)
    _check("part_lse", a.part_lse, tuple(a.lse.shape), "float32")
    _check("part_out", a.part_out, tuple(a.out.shape), "float32")
    if not 0.0 <= a.limit < 1.0:
        raise UnsupportedInputError(
            f"limit={a.limit} is no share that leaves something; use 0.0 or more, less than 1.0."
        )
    lse = a.lse.new_empty(a.lse.shape)
    return a.out.new_empty(a.out.shape), lse, lse.new_empty(lse.shape, dtype=torch.bool)


@define(
    fake=_fake_removal,
    results=("out", "lse", "is_usable"),
    kernels=("_remove_partial",),
    is_free=True,
)
def remove_partial(
    out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, limit: float = MOST_REMOVED
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a partial out of a merged one; see `sparda_compile.partials.remove_partial`."""
    results = _fake_removal(
        SimpleNamespace(out=out, lse=lse, part_out=part_out, part_lse=part_lse, limit=limit)
    )
    if not out.is_cuda:
        part = (part_out.contiguous(), part_lse.contiguous())
        return remove(out.contiguous(), lse.contiguous(), *part, limit)
    from sparda_compile.kernels.gpu import partials

    partials.remove((out, lse), (part_out, part_lse), limit, results)
    return results
