"""Compile every kernel for an H200 as its Python wrapper would launch it, without a GPU.

Writes one line of JSON: by kernel, the most shared memory and the widest read and write of device
memory of its variants, in bytes, and the most reads of single bytes. Run as a program of its own,
since the tests' process has Triton's interpreter on.
"""

import collections
import dataclasses
import json
import re
import sys

import torch
from on_paper import compile_only

found = collections.defaultdict(list)


def widest(ptx, access):
    """Return the bytes of the widest access to global memory by one thread."""
    pattern = rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b"
    widths = [int(bits) // 8 * int(vector or 1) for vector, bits in re.findall(pattern, ptx)]
    if access == "ld":  # straight to shared memory
        sizes = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\b.*?\], (0x\w+|\d+)", ptx)
        widths += [int(size, 0) for size in sizes]
    return max(widths, default=0)


def note(name, built):
    ptx = built.asm["ptx"]
    single = len(re.findall(r"\bld\.global\S*\.b8\b", ptx))
    found[name].append((built.metadata.shared, widest(ptx, "ld"), widest(ptx, "st"), single))


compile_only(note)

from sparda_compile.bench.trace_kernel import raise_scores  # noqa: E402
from sparda_compile.config import SpardaConfig  # noqa: E402
from sparda_compile.kernels import workspace  # noqa: E402
from sparda_compile.kernels.gpu import (  # noqa: E402
    append,
    attend_tokens,
    attention,
    calibrate,
    copy,
    extend,
    extend_summary,
    low_bit_integers,
    packed,
    packed_store,
    partials,
    predict,
    prefill,
    score,
    select,
    select_tokens,
    speculation,
    stage,
)
from sparda_compile.kernels.paged import Stored  # noqa: E402
from sparda_compile.registry import KV_FORMATS  # noqa: E402
from sparda_compile.selectors import SELECTORS, Geometry, summary_named  # noqa: E402
from sparda_compile.selectors.base import empty_summary  # noqa: E402
from sparda_compile.training.mass_loss import backward_mass_loss  # noqa: E402
from sparda_compile.training.teacher_kernel import launch_aligned_teacher  # noqa: E402

BLOCKS, SELECTED, PAGES = 300, 20, 31
PACKED = ("int8", "fp8", "int4")
STAYING = ("values8", "values4")
# Of the formats, those with most to unpack: what the largest blocks are packed in.
LARGEST = ("int4", "values4")
BATCH, GROUPS, HEADS = 2, 2, 8


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def run_all(dtype, dim, size):
    """Launch each kernel once, and those with tiles of keys in both of their forms."""
    geometry = Geometry(BLOCKS, size, 32, 16)
    lengths, host = ints(BATCH), torch.zeros(BATCH, GROUPS, dtype=torch.int64)
    query = torch.zeros(BATCH, HEADS, 1, dim, dtype=dtype)
    k = torch.zeros(BATCH, GROUPS, 1, dim, dtype=dtype)
    pages = torch.zeros(BATCH, GROUPS, PAGES, 2, size, dim, dtype=dtype)
    ids, tail = ints(BATCH, GROUPS, SELECTED), ints(BATCH, GROUPS)
    is_miss = torch.zeros(ids.shape, dtype=torch.bool)
    counters = torch.zeros(5, dtype=torch.int64)
    scores = torch.zeros(BATCH, GROUPS, BLOCKS)

    append.append_kv(k, k, tail, lengths, pages)
    summaries = {}
    for name, kernel in append.SUMMARY_KERNELS.items():
        summaries[name] = empty_summary(summary_named(name), k, geometry)
        kernel(k, lengths, summaries[name], geometry)
    for name, kernel in score.SCORE_KERNELS.items():
        asked = k if name.endswith("forecast") else query
        kernel(asked, summaries[SELECTORS[name].summary.name], lengths, 1.0, geometry, scores)
    trace = torch.zeros(BATCH, GROUPS, 3, BLOCKS, dtype=torch.bool)
    raise_scores(trace, lengths, scores, 1e30)

    choice = select.Choice(SELECTED, size, 1, 4)
    select.select(scores, lengths, ids, choice)
    for budget in (None, ints(1)):
        for weights in (None, torch.zeros(BATCH, 3)):
            predict.predict(scores, scores, lengths, ids, choice, 0.5, budget, weights)
    for comparable in (True, False):
        for weights in (None, torch.zeros(BATCH, 3)):
            predict.update(
                scores[None], scores, scores, (0.4, 0.3), are_comparable=comparable,
                calibrated=weights,
            )  # fmt: skip
        rows = scores.repeat(64, 1, 1, 1), lengths[:, None].repeat(1, 64)
        calibrate.hit_rates(*rows, choice, torch.zeros(80, 3), are_comparable=comparable)
    by_query = ((name, query) for name in ("infllm2", "quest", "nosa", "lowbit2"))
    for name, asked in (*by_query, ("forecast", k), ("lowbit4_forecast", k)):
        tensors = summaries["pooled_keys" if name == "nosa" else SELECTORS[name].summary.name]
        keys = (asked, tensors, lengths[:, None], lengths)
        prompt = select_tokens.Asked(*keys, 9 * size, name, 1.0, geometry)
        select_tokens.select_tokens(prompt, choice, ids[:, :, None])
        if SELECTORS[name].narrows:
            behind = dataclasses.replace(prompt, num_past=(BLOCKS - 1) * size)
            select_tokens.select_tokens(behind, choice, ids[:, :, None], BLOCKS - 2)
        if SELECTORS[name].settles:
            near = (ids[:, :, None], scores[:, :, None, :SELECTED].contiguous())
            select_tokens.select_past(prompt, choice, *near)
            select_tokens.select_near(prompt, choice, near, ids[:, :, None])
    for num_pages in (PAGES, BLOCKS):
        owned = ints(BATCH, GROUPS, num_pages)
        tables = select.Tables(ints(BATCH, GROUPS, BLOCKS), owned, owned, counters)
        out = select.Planned(ids, is_miss.view(torch.int8), ids, ids, tail)
        select.plan(ids, lengths, tables, out, size, "fifo", is_hint=True)
        select.select_and_plan(scores, lengths, ids, tables, out, choice, "lru", is_hint=False)

    copy.gather(ids, ids, host, pages)
    copy.store_tail(tail, lengths, pages, host, counters)
    copy.copy_runs(host.flatten(), host.flatten(), pages[0, 0, 0].nbytes)

    for kv_format in PACKED:
        packed.gather_packed(ids, ids, host, pages, kv_format)
        packed_store.store_tail(tail, lengths, pages, host, counters, kv_format)
    packed_store.store_tail(tail, lengths, pages, host[:0], counters, "int8")
    for kv_format in STAYING:
        kept = summaries["lowbit4_keys"][:3]
        packed.gather_packed(ids, ids, host, pages, kv_format, kept)
        packed_store.store_tail(tail, lengths, pages, host, counters, kv_format)

    table = ints(BATCH, GROUPS, BLOCKS)
    for softcap, flags, late in ((0.0, None, False), (30.0, is_miss, True)):
        parts = attention.partials(
            query, pages, ids, ids, flags, lengths, 1.0, softcap, 3, missing=late
        )
        attention.merge(*parts, parts if late else None, dtype)
        attend_tokens.attend_tokens(
            query, (k, k), ids[:, :, None], (lengths[:, None], lengths[:, None], lengths), lengths,
            (pages, table), (pages, table), (1.0, softcap),
        )  # fmt: skip
    stage.stage(ids[:, :, None], lengths, (pages, host, table), pages, table, PAGES - 2)
    run_speculation(query, pages, table, ids, lengths)
    run_stored(query, k, ids, lengths, size)
    launch_aligned_teacher(
        torch.zeros(1, HEADS, 64, dim, dtype=dtype), torch.zeros(1, GROUPS, 40, dim, dtype=dtype),
        range(64), (32, 16), (1.0, 0.0), 5,
    )  # fmt: skip


def stored_pool(kv_format, dim, size, dtype):
    """Return pages of stored runs, and what goes with them."""
    run = KV_FORMATS[kv_format].num_bytes(size, dim, dtype)
    pages = torch.zeros(BATCH, GROUPS, PAGES, run, dtype=torch.uint8)
    return pages, Stored(torch.zeros(BATCH, GROUPS, 2, 2, size, dim, dtype=dtype), kv_format)


def run_stored(query, k, ids, lengths, size):
    """Launch the kernels of a decode step beside pages of stored runs."""
    dim, dtype = query.shape[-1], query.dtype
    host, table = torch.zeros(BATCH, GROUPS, dtype=torch.int64), ints(BATCH, GROUPS, BLOCKS)
    for kv_format in PACKED:
        pages, stored = stored_pool(kv_format, dim, size, dtype)
        append.append_kv(k, k, ids[..., 0].contiguous(), lengths, stored.tail, is_tail=True)
        copy.gather(ids, ids, host, pages)
        attention.partials(query, pages, ids, ids, None, lengths, 1.0, 0.0, 3, stored)
        tail, counter = ids[..., 0].contiguous(), torch.zeros(1, dtype=torch.int64)
        packed_store.store_tail(tail, lengths, pages, host, counter, kv_format, stored.tail)
    run_speculation(query, pages, table, ids, lengths, stored)


def run_speculation(query, pages, table, ids, lengths, stored=None):
    """Attend to predicted blocks or to blocks alone, and repair, in both forms."""
    shape = (*ids.shape, HEADS // GROUPS)
    partial = torch.zeros(*shape, query.shape[-1]), torch.zeros(shape)
    counters = torch.zeros(6, dtype=torch.int64)
    for softcap, union in ((0.0, False), (30.0, True)):
        # Predicted or not, a block is scored by the same lines: each with one form.
        scored = (query, pages, table, ids, lengths, 1.0, softcap, partial, stored)
        partials.attend_blocks(*scored, early=not union)
        chosen, scaling = (ids, ids, ids), (1.0, softcap)
        speculation.repair_predicted(
            query, pages, chosen, lengths, partial, counters, scaling, stored, union=union
        )
    merged = partial[0][:, :, 0], partial[1][:, :, 0]
    is_usable = torch.zeros(merged[1].shape, dtype=torch.bool)
    for keep in (None, ids != 0):
        partials.merge(*partial, keep, merged)
    many = torch.zeros(BATCH, GROUPS, 200, *merged[0].shape[2:])  # more than a tile of them
    partials.merge(many, many[..., 0].contiguous(), None, merged)
    partials.remove(merged, merged, 0.5, (*merged, is_usable))


def run_prompt(dtype, dim, size, formats):
    """Launch the kernels of a prompt, with and without pages for all blocks."""
    geometry, num_tokens = Geometry(BLOCKS, size, 32, 16), 1000
    lengths, mask = ints(BATCH), torch.ones(BATCH, num_tokens, dtype=torch.bool)
    numbered = extend.number_tokens(mask, lengths)
    k = torch.zeros(BATCH, num_tokens, GROUPS, dim, dtype=dtype).transpose(1, 2)
    ids = ints(BATCH, GROUPS, num_tokens, SELECTED)
    for num_pages in (PAGES, BLOCKS):
        pages = torch.zeros(BATCH, GROUPS, num_pages, 2, size, dim, dtype=dtype)
        owned = ints(BATCH, GROUPS, num_pages)
        tables = (ints(BATCH, GROUPS, BLOCKS), owned, owned)
        for chosen, eviction in ((ids, "lru"), (None, "fifo")):
            resident = extend.Resident(chosen, 1, 4, eviction)
            extend.extend_kv(k, k, numbered, lengths, pages, tables, resident)
        host, counter = torch.zeros(BATCH, GROUPS, dtype=torch.int64), ints(2).long()
        prefill.store_prefix(k, k, numbered, lengths, tables[0], pages, host, counter)
    for kv_format in formats:
        stored = (tables[0], pages, host, counter, kv_format)
        packed_store.store_prefix(k, k, numbered, lengths, *stored)
        past = (pages, host, tables[0])
        found = KV_FORMATS[kv_format].summary
        kept = empty_summary(summary_named(found), k, geometry)[:3] if found else ()
        stage.stage(ids, lengths, past, pages, tables[0], BLOCKS - 2, kv_format, kept)
    for kv_format in set(formats) & set(PACKED):
        runs, (tail, _) = stored_pool(kv_format, dim, size, dtype)
        resident, owned = extend.Resident(None, 1, 4, "lru"), ints(BATCH, GROUPS, PAGES)
        tables = (ints(BATCH, GROUPS, BLOCKS), owned, owned)
        extend.extend_kv(k, k, numbered, lengths, tail, tables, resident, is_tail=True)
        stored = (tables[0], runs, host, counter, kv_format, tail)
        packed_store.store_prefix(k, k, numbered, lengths, *stored)
        past = (runs, host, tables[0])
        stage.stage(ids, lengths, past, pages, tables[0], BLOCKS - 2, kv_format, (), tail)
    for name, kernel in extend_summary.PROMPT_SUMMARY_KERNELS.items():
        kernel(k, numbered, lengths, empty_summary(summary_named(name), k, geometry), geometry)


def run_mass_loss(dtype, dim, size, softcap, heads=1):
    """Launch the loss on low-bit keys and its gradient."""
    config = SpardaConfig(selector="lowbit2", block_size=size, local_blocks=1)
    forecast = torch.zeros(1, GROUPS * heads, 10 * size, dim, dtype=dtype, requires_grad=True)
    query = torch.zeros(1, HEADS, 10 * size, dim, dtype=dtype)
    k = torch.zeros(1, GROUPS, 10 * size, dim, dtype=dtype)
    backward_mass_loss(forecast, query, k, config, 1.0, softcap=softcap, backend="triton")


def run_largest(dtype, dim, size):
    """Launch those whose tiles of keys fill shared memory."""
    geometry = Geometry(BLOCKS, size, 32, 16)
    query = torch.zeros(BATCH, HEADS, 1, dim, dtype=dtype)
    pooled = torch.zeros(BATCH, GROUPS, geometry.num_windows, dim, dtype=dtype)
    scores = torch.zeros(BATCH, GROUPS, BLOCKS)
    score.SCORE_KERNELS["infllm2"](query, [pooled], ints(BATCH), 1.0, geometry, scores)
    choice = select.Choice(SELECTED, 128, 1, 4)
    low_bit = empty_summary(summary_named("lowbit4_keys"), query[:, :GROUPS], geometry)
    for name, tensors in (("infllm2", [pooled]), ("lowbit4", low_bit)):
        asked = (query, tensors, ints(BATCH, 1), ints(BATCH), 0, name, 1.0, geometry)
        select_tokens.select_tokens(
            select_tokens.Asked(*asked), choice, ints(BATCH, GROUPS, 1, SELECTED)
        )
    behind = select_tokens.Asked(*asked[:4], (BLOCKS - 1) * size, *asked[5:])
    select_tokens.select_tokens(behind, choice, ints(BATCH, GROUPS, 1, SELECTED), BLOCKS - 2)
    pages = torch.zeros(BATCH, GROUPS, PAGES, 2, size, dim, dtype=dtype)
    ids = ints(BATCH, GROUPS, SELECTED)
    attention.partials(query, pages, ids, ids, None, ints(BATCH), 1.0, 0.0, 16)
    run_speculation(query, pages, ids, ids, ints(BATCH))
    runs, stored = stored_pool("int4", dim, size, dtype)
    attention.partials(query, runs, ids, ids, None, ints(BATCH), 1.0, 0.0, 16, stored)
    new, staged = (query[:, :GROUPS],) * 2, (pages, ints(BATCH, GROUPS, BLOCKS))
    numbered = (ints(BATCH, 1), ints(BATCH, 1), ints(BATCH))
    attend_tokens.attend_tokens(
        query, new, ids[:, :, None], numbered, ints(BATCH), staged, staged, (1.0, 0.0)
    )


def run_halves(dim, softcap):
    """Attend as a Hopper GPU does for many heads of a group."""
    query, k = torch.zeros(1, 32, 16, dim).half(), torch.zeros(1, 2, 16, dim).half()
    pages, table = torch.zeros(1, 2, 4, 2, 64, dim).half(), ints(1, 2, 4)
    workspace._is_hopper = lambda device: True
    attend_tokens.attend_tokens(
        query, (k, k), ints(1, 2, 16, 8), (ints(1, 16), ints(1, 16), ints(1)), ints(1),
        (pages, table), (pages, table), (1.0, softcap),
    )  # fmt: skip


def run_integers(dtype, dim, size):
    """Score by low-bit keys as a GPU does that multiplies integers, for one head and for many."""
    lengths, out = ints(BATCH), torch.zeros(BATCH, GROUPS, BLOCKS)
    for bits in (2, 4):
        tensors = empty_summary(
            summary_named(f"lowbit{bits}_keys"), torch.zeros(BATCH, GROUPS, 1, dim, dtype=dtype),
            Geometry(BLOCKS, size, 32, 16),
        )  # fmt: skip
        for heads in (1, 16):
            query = torch.zeros(BATCH, GROUPS * heads, 1, dim, dtype=dtype)
            low_bit_integers.integer_masses(
                query, tensors, lengths, 1.0, (out, out, out), softmax=heads > 1
            )


run_all(torch.bfloat16, 128, 64)
run_largest(torch.float32, 256, 128)
run_prompt(torch.bfloat16, 128, 64, (*PACKED, *STAYING))
run_prompt(torch.float32, 256, 128, LARGEST)
run_mass_loss(torch.bfloat16, 64, 64, 0.0)
run_mass_loss(torch.bfloat16, 256, 128, 30.0)
run_mass_loss(torch.float16, 80, 16, 0.0)
run_mass_loss(torch.bfloat16, 128, 64, 0.0, HEADS // GROUPS)
run_integers(torch.bfloat16, 128, 64)
run_integers(torch.float16, 80, 16)
run_halves(128, 0.0)
run_halves(64, 30.0)
most = {name: [max(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
json.dump(most, sys.stdout)
