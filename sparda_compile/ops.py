"""The instruction set `sparda::*`: what passes may emit, and what kernels and runtime implement.

    layer l-1   forecast_l = rope(linear(hidden, W))                      or run_piece(hidden, W)
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

This is the narrow waist: passes know these names and what `isa/table.py` says of them, nothing
behind them. Each op says what it is where it is defined; importing this module fills the table.
"""

from __future__ import annotations

from typing import Any, Final

from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels import (  # noqa: F401 - fills the table
    begin_prediction,
    mixture,
    number_tokens,
    partials,
    predict_blocks,
    prefill_attention,
    run_piece,
    score_blocks,
    select_blocks,
    select_tokens,
    sparse_attention,
    speculation,
    window_attention,
)
from sparda_compile.ranks import collectives  # noqa: F401 - fills the table
from sparda_compile.runtime import (  # noqa: F401 - fills the table
    append,
    block_table,
    staging,
    transfer,
)

__all__ = ["OPS"]

OPS: Final[dict[str, Any]] = {name: it.op for name, it in INSTRUCTIONS.items() if not it.is_marker}
"""What programs are made of: each op, as `torch.library` made it, by its name."""
