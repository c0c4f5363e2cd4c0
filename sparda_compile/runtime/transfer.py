"""Bytes between CPU and device: every copy, its start and its wait.

    fork_stream       a side stream may go on from here
    prefetch_blocks   H2D of the missed blocks, on the copy or repair stream; returns at once
    fetch_blocks      the same in line, on the compute stream
    offload_blocks    D2H of blocks that just became full, on the copy stream
    store_blocks      the same in line
    wait_blocks       a stream, mostly compute, goes on when a copy has ended
    record_event      marks the point that any stream has reached, for a wait

An async op names an event; its wait names the same one. The wait takes, as `keepalive`, every
temporary that a side stream still reads or writes and nobody uses later, or a compiler would
hand its memory to somebody else while the copy runs.

Host layout: one (sequence, KV head, block) is one contiguous run, K then V. On the CPU `host` is
the blocks themselves, [B, G, N, 2, P, D], or in a format that rounds [B, G, N, bytes] uint8. On
CUDA a CPU tensor cannot be part of a captured step, so `host` is [B, G] int64 on the device: where
each sequence's and head's blocks begin.

In a format that rounds, blocks that became full are rounded on their pages, too (`packed.py`), with
offload and without: so storing them writes `pages`. Pages that hold what CPU memory does are filled
as in the format `model`, run by run (`kernels/paged.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.isa.table import Part, Work
from sparda_compile.registry import KV_FORMATS
from sparda_compile.runtime import copied, packed

__all__ = [
    "fetch_blocks",
    "fork_stream",
    "offload_blocks",
    "prefetch_blocks",
    "record_event",
    "store_blocks",
    "wait_blocks",
]

# Copy kernels, as they move bytes, and as they pack or unpack them.
_GATHERS: Final = ("_gather", "_gather_packed")
_STORES: Final = ("_store_tail", "_store_tail_packed")
_PROMPT_STORES: Final = ("_store_prefix", "_store_prefix_packed")


def _fetch(
    miss_blocks: Tensor,
    miss_pages: Tensor,
    host: Tensor,
    pages: Tensor,
    kv_format: str,
    keys: Sequence[Tensor | None],
) -> None:
    if not host.numel():
        return
    found, kept = KV_FORMATS[kv_format], [each for each in keys if each is not None]
    if pages.is_cuda:
        if found.rounds:
            from sparda_compile.kernels.gpu.packed import gather_packed

            gather_packed(miss_blocks, miss_pages, host, pages, kv_format, kept)
            return
        from sparda_compile.kernels.gpu.copy import gather

        gather(miss_blocks, miss_pages, host, pages)
        return
    row, head, entry = torch.where(miss_blocks >= 0)
    block, page = miss_blocks[row, head, entry].long(), miss_pages[row, head, entry].long()
    stored, *mine = (each[row, head, block] for each in (host, *kept))
    if found.rounds:
        stored = found.read(stored, mine, *pages.shape[4:], pages.dtype)
    pages[row, head, page] = stored


def _store(
    new_kv: Sequence[Tensor],
    tail_page: Tensor | None,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor | None,
    pages: Tensor,
    host: Tensor,
    counters: Tensor,
    kv_format: str,
    tail: Tensor | None,
) -> None:
    if KV_FORMATS[kv_format].rounds:
        stored = (lengths, pages, host, counters)
        packed.store(new_kv, tail_page, tokens, block_table, stored, kv_format, tail)
    elif tail_page is not None:
        copied.store_tail(tail_page, lengths, pages, host, counters)
    elif block_table is not None:
        k, v = new_kv
        copied.store_prefix(k, v, tokens, lengths, block_table, pages, host, counters)


def _launched(name: str) -> Callable[[Mapping[str, Any], int], tuple[str, ...]]:
    """Return what says which form of a kernel an op launches, given its arguments."""

    def launched(arguments: Mapping[str, Any], batch_size: int) -> tuple[str, ...]:
        del batch_size
        return (f"{name}_packed" if KV_FORMATS[arguments["kv_format"]].rounds else name,)

    return launched


def _ticket(like: Tensor) -> Tensor:
    return like.new_empty(0)


@define(fake=lambda a: a.inputs[0].new_empty(0), forks=True, work=Work.NONE)
def fork_stream(inputs: Sequence[Tensor], event: int) -> Tensor:
    """Let a side stream go on from here, with everything that was computed so far.

    Args:
        inputs: What the side stream will use; keeps the fork behind its producers.
        event: Number of the event, unique in the graph.

    Returns:
        An empty tensor for the first op of the side stream's work.
    """
    return _ticket(inputs[0])


@define(
    mutates=("pages",),
    work=Work.TO_DEVICE,
    kernels=_GATHERS,
    launched=_launched("_gather"),
)
def fetch_blocks(
    miss_blocks: Tensor,
    miss_pages: Tensor,
    host: Tensor,
    pages: Tensor,
    kv_format: str = "model",
    key_codes: Tensor | None = None,
    key_span: Tensor | None = None,
    key_base: Tensor | None = None,
) -> None:
    """Copy the missed blocks from the host to their pages, in line.

    Args:
        miss_blocks: [B, G, K] int32, from `plan_pages`.
        miss_pages: [B, G, K] int32.
        host: [B, G, N, 2, P, D], or empty without offload.
        pages: [B, G, C, 2, P, D], updated.
        kv_format: How blocks in CPU memory are written; `model` where pages hold the same.
        key_codes: [B, G, N, C, D] uint8, by which keys that stay are read, like the next two.
        key_span: [B, G, N, D].
        key_base: [B, G, N, D].
    """
    args = (miss_blocks, miss_pages, host, pages, kv_format, (key_codes, key_span, key_base))
    current_engine().submit(COMPUTE, lambda: _fetch(*args))


@define(
    mutates=("pages",),
    fake=lambda a: a.pages.new_empty(0),
    starts=True,
    work=Work.TO_DEVICE,
    kernels=_GATHERS,
    launched=_launched("_gather"),
    parts=(Part("pages", "misses", by="miss_blocks"),),
)
def prefetch_blocks(
    miss_blocks: Tensor,
    miss_pages: Tensor,
    host: Tensor,
    pages: Tensor,
    event: int,
    after: Tensor | None = None,
    kv_format: str = "model",
    stream: int = COPY,
    key_codes: Tensor | None = None,
    key_span: Tensor | None = None,
    key_base: Tensor | None = None,
) -> Tensor:
    """Start the copy of the missed blocks to their pages, on a stream of copies.

    Args:
        miss_blocks: [B, G, K] int32, from `plan_pages`.
        miss_pages: [B, G, K] int32.
        host: [B, G, N, 2, P, D], or empty without offload.
        pages: [B, G, C, 2, P, D], updated when the wait for `event` has passed.
        event: Number of the event, unique in the graph.
        after: Result of the fork, if the misses were chosen on the compute stream. Otherwise the
            copy starts behind the selection.
        kv_format: As for `fetch_blocks`.
        stream: `COPY`, or `REPAIR` for what a guess has missed.
        key_codes: As for `fetch_blocks`, like the next two.
        key_span: [B, G, N, D].
        key_base: [B, G, N, D].

    Returns:
        A ticket for `wait_blocks`, an empty tensor.
    """
    del after
    args = (miss_blocks, miss_pages, host, pages, kv_format, (key_codes, key_span, key_base))
    engine = current_engine()
    engine.submit(stream, lambda: _fetch(*args))
    engine.record(event, stream)
    return _ticket(pages)


@define(mutates=("buffers",), waits=True, work=Work.NONE)
def wait_blocks(
    ticket: Tensor,
    buffers: Sequence[Tensor],
    keepalive: Sequence[Tensor],
    event: int,
    stream: int = COMPUTE,
) -> None:
    """Make a stream wait for what another one has started.

    Args:
        ticket: From the op that started it.
        buffers: What side streams have written or read: free to use from here on.
        keepalive: Temporaries that side streams use until here.
        event: Its event.
        stream: The stream that waits; 0 compute.
    """
    current_engine().wait(event, stream)


@define(fake=lambda a: a.inputs[0].new_empty(0), starts=True, work=Work.NONE)
def record_event(inputs: Sequence[Tensor], event: int, stream: int) -> Tensor:
    """Mark the point that a stream has reached, so that others can wait for it.

    Args:
        inputs: What the stream has made by then; keeps the mark behind what makes it.
        event: Number of the event, unique in the graph.
        stream: The stream.

    Returns:
        A ticket for `wait_blocks`, an empty tensor.
    """
    current_engine().record(event, stream)
    return _ticket(inputs[0])


@define(
    mutates=("pages", "host", "counters"),
    work=Work.TO_HOST,
    kernels=_STORES,
    prompt_copies=_PROMPT_STORES,
    launched=_launched("_store_tail"),
    behind=("sparse_attention", "repair_predicted"),
)
def store_blocks(
    new_kv: Sequence[Tensor],
    tail_page: Tensor | None,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor | None,
    pages: Tensor,
    host: Tensor,
    counters: Tensor,
    kv_format: str = "model",
    tail: Tensor | None = None,
) -> None:
    """Copy blocks that became full in this step to the host, in line.

    Args:
        new_kv: Prefill: the new keys and values [B, G, T, D]. Decode: empty.
        tail_page: Decode: [B, G] int32, page of the block that the new token went to.
        tokens: Prefill: the positions [B, T], columns [B, T] and totals [B], int32, of the new
            tokens, from `number_tokens`. Decode: empty.
        lengths: [B] int32, tokens before this step.
        block_table: Prefill: [B, G, N] int32.
        pages: [B, G, C, 2, P, D]; updated in a format that rounds.
        host: [B, G, N, 2, P, D], updated; empty without offload.
        counters: [6] int64, updated.
        kv_format: How blocks in CPU memory are written.
        tail: [B, G, 2, 2, P, D] beside pages of stored runs; has what is packed of older tokens.
    """
    stored = (lengths, block_table, pages, host, counters, kv_format, tail)
    current_engine().submit(COMPUTE, lambda: _store(new_kv, tail_page, tokens, *stored))


@define(
    mutates=("pages", "host", "counters"),
    fake=lambda a: a.pages.new_empty(0),
    stream=COPY,
    starts=True,
    work=Work.TO_HOST,
    kernels=_STORES,
    prompt_copies=_PROMPT_STORES,
    launched=_launched("_store_tail"),
    behind=("sparse_attention", "attend_missing"),
)
def offload_blocks(
    new_kv: Sequence[Tensor],
    tail_page: Tensor | None,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor | None,
    pages: Tensor,
    host: Tensor,
    counters: Tensor,
    event: int,
    after: Tensor | None = None,
    kv_format: str = "model",
    tail: Tensor | None = None,
) -> Tensor:
    """Start the copy of blocks that became full in this step, on the copy stream.

    Args:
        new_kv: Prefill: the new keys and values [B, G, T, D]. Decode: empty.
        tail_page: Decode: [B, G] int32, page of the block that the new token went to.
        tokens: Prefill: the positions [B, T], columns [B, T] and totals [B], int32, of the new
            tokens, from `number_tokens`. Decode: empty.
        lengths: [B] int32, tokens before this step.
        block_table: Prefill: [B, G, N] int32.
        pages: [B, G, C, 2, P, D]; updated with `host` in a format that rounds.
        host: [B, G, N, 2, P, D], updated when the wait for `event` has passed.
        counters: [6] int64, updated with it.
        event: Number of the event, unique in the graph.
        after: Result of the fork before it.
        kv_format: How blocks in CPU memory are written.
        tail: As for `store_blocks`.

    Returns:
        A ticket for `wait_blocks`, an empty tensor.
    """
    del after
    stored = (lengths, block_table, pages, host, counters, kv_format, tail)
    engine = current_engine()
    engine.submit(COPY, lambda: _store(new_kv, tail_page, tokens, *stored))
    engine.record(event, COPY)
    return _ticket(pages)
