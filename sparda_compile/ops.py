"""The instruction set `sparda::*`: what passes may emit, and what kernels and runtime implement.

    layer l-1   forecast_l = rope(linear(hidden, W))
                fork       = fork_stream(forecast_l, ...)                 select stream goes on
                scores     = score_blocks(forecast_l, summary_l)          [B, G, N]
                block_ids  = select_blocks(scores)                        [B, G, K]
                plan       = plan_pages(block_ids, tables_l)              hits, misses, pages
                (or both   = select_pages(scores, tables_l))
                ticket     = prefetch_blocks(misses, pages_l)             copy stream goes on
    layer l     wait_blocks(ticket, [pages_l], keepalive, q)          compute stream joins
                append_kv(k, v, pages_l)                                  the new token
                update_summary(k, summary_l)
                out        = sparse_attention(query, pages_l, block_ids)
                ticket     = offload_blocks(pages_l, host_l)              full blocks to the host
    end         wait_blocks(ticket, [host_l])
                advance_lengths(lengths)

This is the narrow waist: passes know these names and schemas, nothing behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sparda_compile.kernels.prefill_attention import prefill_attention
from sparda_compile.kernels.score_blocks import score_blocks
from sparda_compile.kernels.select_blocks import all_blocks, select_blocks
from sparda_compile.kernels.sparse_attention import (
    attend_missing,
    attend_resident,
    sparse_attention,
)
from sparda_compile.kernels.window_attention import window_attention
from sparda_compile.runtime.append import (
    advance_lengths,
    append_kv,
    extend_kv,
    recall_ids,
    remember_ids,
    update_summary,
)
from sparda_compile.runtime.block_table import plan_pages, select_pages
from sparda_compile.runtime.transfer import (
    fetch_blocks,
    fork_stream,
    offload_blocks,
    prefetch_blocks,
    store_blocks,
    wait_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INSTRUCTIONS", "implementation"]

INSTRUCTIONS: Final = {
    op._name.removeprefix("sparda::"): op
    for op in (
        score_blocks,
        select_blocks,
        all_blocks,
        plan_pages,
        select_pages,
        fork_stream,
        fetch_blocks,
        prefetch_blocks,
        wait_blocks,
        store_blocks,
        offload_blocks,
        append_kv,
        extend_kv,
        update_summary,
        remember_ids,
        recall_ids,
        advance_lengths,
        sparse_attention,
        attend_resident,
        attend_missing,
        prefill_attention,
        window_attention,
    )
}


def implementation(target: Any, device_type: str) -> Callable[..., Any]:
    """Return the Python function of an op on a device, which is what its dispatcher calls.

    The dispatcher takes about 0.1 ms a call, for autograd and for modes, which a step has not.

    Args:
        target: The op, as a graph has it.
        device_type: `cpu` or `cuda`.
    """
    op: Any = INSTRUCTIONS[target._schema.name.removeprefix("sparda::")]
    function: Callable[..., Any] = op._backend_fns.get(device_type) or op._init_fn
    return function
