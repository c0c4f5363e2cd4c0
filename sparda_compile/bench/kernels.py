"""Kernels alone: time, floor and what else could do the same, at 128K tokens.

    gather      8 MiB of 32 KiB blocks, drawn from up to 16 GiB, beside one memcpy of 8 MiB
    miss_list   from a Forecast to the list of misses: two launches
    attention   over 96 selected blocks, beside SDPA and FlexAttention over gathered KV
    beside      matrix products with a copy beside them: `interference.py`
    prompt      selection and attention of many new tokens: `prompt_kernels.py`

Each is timed in a CUDA graph over enough data sets that the L2 cache serves none of them. Results
are compared before anything is timed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sparda_compile.bench.interference import bench_interference
from sparda_compile.bench.memory import pinned_region_bytes
from sparda_compile.bench.prompt_kernels import bench_prompt
from sparda_compile.bench.prompt_others import compiled_flex
from sparda_compile.bench.timing import Spread, graph_us, time_calls
from sparda_compile.config import MIB
from sparda_compile.isa.counters import COUNTERS
from sparda_compile.kernels.gpu import attention, copy, score, select, speculation
from sparda_compile.kernels.sparse_attention import blocks_per_split
from sparda_compile.runtime.pinned import PinnedMemory
from sparda_compile.selectors import Geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    # Query, pages, page ids, block ids, lengths.
    AttentionInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

__all__ = ["bench_copy", "bench_gather", "bench_kernels", "bench_latencies"]

_SIZE, _DIM, _SELECTED, _TOKENS = 64, 128, 96, 131072
_BLOCKS = _TOKENS // _SIZE
_SCALE = _DIM**-0.5
_BLOCK_BYTES = 2 * _SIZE * _DIM * 2
_L2_BYTES = 160 << 20


def bench_kernels(say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every kernel; `say` is told what is being measured."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    say("device copy")
    result: dict[str, Any] = {"copy": bench_copy(device)}
    rate = result["copy"]["gbps"]
    say("gather")
    result["gather"] = bench_gather(device)
    for batch in (1, 4, 16):
        say(f"batch {batch}")
        result[f"miss_list_b{batch}"] = _miss_list(device, batch, rate)
        for heads, groups in ((32, 2), (32, 8)):
            name = f"attention_b{batch}_g{groups}"
            result[name] = _attention(device, batch, heads, groups, rate)
    say("copies beside compute")
    result["beside"] = bench_interference(device)
    result["prompt"] = bench_prompt(device, rate, say)
    return result


def bench_copy(device: torch.device) -> dict[str, Any]:
    """Measure a copy of 4 GiB on the device."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    us = Spread.of(time_calls(lambda: target.copy_(source), 10))
    return {"us": us.to_dict(), "gbps": round(2 * source.numel() / us.median / 1e3, 1)}


def bench_gather(device: torch.device) -> dict[str, Any]:
    """Compare and measure gathers of 8 MiB from pinned memory, and one memcpy of the same.

    `programs` are those of a decode step.
    """
    count = 8 * MIB // _BLOCK_BYTES
    region = PinnedMemory(pinned_region_bytes() // (2 * _BLOCK_BYTES) * 2 * _BLOCK_BYTES)
    host = region.tensor.view(torch.bfloat16)
    blocks = host.view(2, -1, 2, _SIZE, _DIM)
    addresses = torch.tensor([[blocks[g].data_ptr() for g in range(2)]], device=device)
    pages = torch.zeros(1, 2, count, 2, _SIZE, _DIM, dtype=torch.bfloat16, device=device)
    lists = [_random_misses(blocks.shape[1], count // 2, device) for _ in range(8)]
    for g in range(2):
        blocks[g].view(torch.int16)[lists[0][0, g].cpu().long()] = torch.randint(
            -9999, 9999, (count // 2, 2, _SIZE, _DIM), dtype=torch.int16
        )
    order = torch.arange(count // 2, dtype=torch.int32, device=device).expand(1, 2, -1).contiguous()
    copy.gather(lists[0], order, addresses, pages, 8)
    for g in range(2):
        wanted = blocks[g][lists[0][0, g].cpu().long()]
        got = pages[0, g, : count // 2].cpu()
        if not torch.equal(got.view(torch.int16), wanted.view(torch.int16)):  # NaN must match too
            raise AssertionError("gather copied something else")
    flat = host[: 8 * MIB // 2]
    room = torch.empty_like(flat, device=device)
    memcpy = graph_us([lambda: room.copy_(flat, non_blocking=True)] * 8)
    rows = {}
    for programs in (1, 2, 4, 6, 8, 16, 32, 64):

        def call(misses: Tensor, programs: int = programs) -> Callable[[], None]:
            return lambda: copy.gather(misses, order, addresses, pages, programs)

        us = graph_us([call(misses) for misses in lists])
        rows[programs] = {
            **us.to_dict(),
            "gbps": round(8 * MIB / us.median / 1e3, 2),
            "of_memcpy": round(memcpy.median / us.median, 3),
        }
    region.close()
    return {
        "programs": copy.GATHER_PROGRAMS,
        "memcpy": {**memcpy.to_dict(), "gbps": round(8 * MIB / memcpy.median / 1e3, 2)},
        "by_programs": rows,
    }


def _random_misses(num_blocks: int, count: int, device: torch.device) -> Tensor:
    picked = [torch.randperm(num_blocks, device=device)[:count].int() for _ in range(2)]
    return torch.stack(picked)[None].contiguous()


def _copies(num_bytes: int) -> int:
    return max(2, min(64, math.ceil(_L2_BYTES / num_bytes)))


def bench_latencies(device: torch.device, rate: float) -> dict[str, float]:
    """Measure what ops of a decode step take beside their bytes, at batch 1.

    Args:
        device: A CUDA device.
        rate: Its memory's bandwidth, 10^9 bytes per second.

    Returns:
        Microseconds by op, for `Machine.latency_us`.
    """
    calls, pooled_bytes = _selection(device, 1)
    data, kv_bytes = _attention_data(device, 1, 32, 2)
    blocks = blocks_per_split(2, _SELECTED, _SIZE)
    calls["attend_resident"] = [partial(_partials, *operands, blocks) for operands in data]
    calls["sparse_attention"] = [partial(_sparse, *operands, blocks) for operands in data]
    speculating = [_speculation(*operands) for operands in data]
    calls["attend_predicted"] = [attend for attend, _ in speculating]
    calls["repair_predicted"] = [repair for _, repair in speculating]
    partials = 4 * 32 * _SELECTED * (_DIM + 1)  # fp32 outputs and log-sum-exps of 32 query heads
    num_bytes = {
        "score_blocks": pooled_bytes,
        "attend_resident": kv_bytes,
        "sparse_attention": kv_bytes,
        "attend_predicted": kv_bytes + partials,
        "repair_predicted": kv_bytes // _SELECTED + partials,
    }
    latencies = {}
    for op, each in calls.items():
        us = graph_us(each).median - num_bytes.get(op, 0) / (rate * 1e3)
        latencies[op] = round(max(us, 0.0), 2)
    # The same two kernels.
    return {**latencies, "attend_missing": latencies["sparse_attention"]}


def _selection(
    device: torch.device, batch: int
) -> tuple[dict[str, list[Callable[[], object]]], int]:
    """Return calls of each op from a Forecast to a miss list, in order, and the bytes scored."""
    geometry = Geometry(_BLOCKS, _SIZE, 32, 16)
    groups, pages = 2, 144
    num_bytes = batch * groups * geometry.num_windows * _DIM * 2
    lengths = torch.full((batch,), _TOKENS - 100, dtype=torch.int32, device=device)
    choice = select.Choice(_SELECTED, _SIZE, 1, 32)
    calls: dict[str, list[Callable[[], object]]] = {}
    for _ in range(_copies(num_bytes)):
        pooled = torch.randn(
            batch, groups, geometry.num_windows, _DIM, dtype=torch.bfloat16, device=device
        )
        query = torch.randn(batch, groups, 1, _DIM, dtype=torch.bfloat16, device=device)
        scores = torch.empty(batch, groups, _BLOCKS, device=device)
        ids = torch.empty(batch, groups, _SELECTED, dtype=torch.int32, device=device)
        table = torch.full((batch, groups, _BLOCKS), -1, dtype=torch.int32, device=device)
        owner = torch.full((batch, groups, pages), -1, dtype=torch.int32, device=device)
        counters = torch.zeros(5, dtype=torch.int64, device=device)
        tables = select.Tables(table, owner, owner.clone(), counters)
        out = select.Planned(
            ids.clone(),
            torch.empty_like(ids, dtype=torch.bool),
            ids.clone(),
            ids.clone(),
            ids[:, :, 0].clone(),
        )
        picked, found = (scores, lengths, ids), (tables, out)
        new = {
            "score_blocks": partial(
                score.SCORE_KERNELS["forecast"], query, [pooled], lengths, 1.0, geometry, scores
            ),
            "select_blocks": partial(select.select, *picked, choice),
            "plan_pages": partial(select.plan, ids, lengths, *found, _SIZE, "lru", is_hint=False),
            "select_pages": partial(
                select.select_and_plan, *picked, *found, choice, "lru", is_hint=False
            ),
        }
        for op, call in new.items():
            calls.setdefault(op, []).append(call)
    return calls, num_bytes


def _miss_list(device: torch.device, batch: int, rate: float) -> dict[str, Any]:
    calls, num_bytes = _selection(device, batch)
    scoring, planning = calls["score_blocks"], calls["select_pages"]

    def chain(first: Callable[[], object], then: Callable[[], object]) -> None:
        first()
        then()

    us = graph_us([partial(chain, *pair) for pair in zip(scoring, planning, strict=True)])
    return {
        "chain": us.to_dict(),
        "score": graph_us(scoring).to_dict(),
        "select_and_plan": graph_us(planning).to_dict(),
        "launches": 2,
        "floor_us": round(num_bytes / rate / 1e3, 2),
    }


def _attention_data(
    device: torch.device, batch: int, heads: int, groups: int
) -> tuple[list[AttentionInputs], int]:
    """Return sets of inputs, and the bytes of keys and values that one of them reads."""
    kv_bytes = batch * groups * _SELECTED * _BLOCK_BYTES
    num_pages = _SELECTED * 3 // 2
    lengths = torch.full((batch,), _TOKENS - 1, dtype=torch.int32, device=device)
    data = []
    for _ in range(_copies(kv_bytes)):
        pages = torch.randn(
            batch, groups, num_pages, 2, _SIZE, _DIM, dtype=torch.bfloat16, device=device
        )
        query = torch.randn(batch, heads, 1, _DIM, dtype=torch.bfloat16, device=device)
        ids = torch.arange(_BLOCKS - _SELECTED, _BLOCKS, dtype=torch.int32, device=device)
        places = torch.rand(batch, groups, num_pages, device=device).argsort(-1)[..., :_SELECTED]
        ids = ids.expand(batch, groups, -1).contiguous()
        data.append((query, pages, places.int(), ids, lengths))
    return data, kv_bytes


def _partials(
    query: Tensor, pages: Tensor, places: Tensor, ids: Tensor, lengths: Tensor, blocks: int
) -> tuple[Tensor, Tensor]:
    return attention.partials(query, pages, places, ids, None, lengths, _SCALE, 0.0, blocks)


def _speculation(
    query: Tensor, pages: Tensor, places: Tensor, ids: Tensor, lengths: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return attention to predicted blocks, all but the current one, and the repair."""
    shape = (*ids.shape, query.shape[1] // pages.shape[1])
    partials = query.new_empty((*shape, _DIM), dtype=torch.float32)
    results = (partials, partials.new_empty(shape))
    table = ids.new_full((*ids.shape[:2], _BLOCKS), -1)
    table.scatter_(-1, ids.long(), places)
    counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=query.device)
    attend = partial(
        speculation.attend_predicted, query, pages, table, ids, lengths, _SCALE, 0.0, results
    )
    chosen, scaling = (places, ids, ids), (_SCALE, 0.0)
    operands = (query, pages, chosen, lengths, results, counters, scaling)
    repair = partial(speculation.repair_predicted, *operands, union=False)
    return attend, repair


def _sparse(
    query: Tensor, pages: Tensor, places: Tensor, ids: Tensor, lengths: Tensor, blocks: int
) -> Tensor:
    return attention.attend(query, pages, places, ids, lengths, _SCALE, 0.0, blocks)


def _attention(
    device: torch.device, batch: int, heads: int, groups: int, rate: float
) -> dict[str, Any]:
    data, kv_bytes = _attention_data(device, batch, heads, groups)
    chosen = blocks_per_split(batch * groups, _SELECTED, _SIZE)
    gathered = [_gathered(pages, places) for _, pages, places, *_ in data]
    ours = _sparse(*data[0], chosen)
    keys, values = (tensor.double() for tensor in gathered[0])
    exact = _sdpa(data[0][0].double(), keys, values, _SCALE)
    error = float((ours - exact).norm() / exact.norm())
    if not error < 5e-3:
        raise AssertionError(f"sparse attention is off by {error}")
    by_blocks = {}
    for blocks in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96, chosen}):
        calls = [partial(_sparse, *operands, blocks) for operands in data]
        by_blocks[blocks] = graph_us(calls).to_dict()
    us = by_blocks[chosen]["median"]
    result = {
        "relative_error": error,
        "blocks_per_split": chosen,
        "by_blocks_per_split": by_blocks,
        "floor_us": round(kv_bytes / (rate * 1e3), 2),
        "of_copy_bandwidth": round(kv_bytes / (rate * 1e3) / us, 3),
    }
    pairs_of = [(d[0], *kv) for d, kv in zip(data, gathered, strict=True)]
    result["sdpa_gathered"] = graph_us(
        [partial(_sdpa, *operands, _SCALE) for operands in pairs_of]
    ).to_dict()
    flex = compiled_flex(_SCALE)
    if float((flex(data[0][0], *gathered[0]) - exact).norm() / exact.norm()) < 5e-3:
        result["flex_gathered"] = graph_us(
            [partial(flex, *operands) for operands in pairs_of]
        ).to_dict()
    return result


def _gathered(pages: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    index = places.long()[..., None, None, None].expand(*places.shape, 2, _SIZE, _DIM)
    keys, values = pages.gather(2, index).unbind(3)
    return keys.flatten(2, 3).contiguous(), values.flatten(2, 3).contiguous()


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
