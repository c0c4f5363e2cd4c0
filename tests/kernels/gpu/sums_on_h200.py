"""Compile attention to both kinds of pages for an H200, and say in which order it sums.

Writes one line of JSON: by kernel and block size, then by what pages hold, each dot with the
layouts of its operands and each sum with that of what is summed. An operand's `kWidth` says how
many neighbours of the summed dimension a thread has, and so which products an instruction of a
tensor core sums. Run as a program of its own, see `on_paper.py`.
"""

import collections
import json
import re
import sys

import torch
from on_paper import lay_out_only

text_by_name = {}
lay_out_only(text_by_name.__setitem__)

from sparda_compile.kernels.gpu import attention, speculation  # noqa: E402
from sparda_compile.kernels.paged import Stored  # noqa: E402
from sparda_compile.registry import KV_FORMATS  # noqa: E402

PAGES = ("model", "int8", "fp8", "int4")
BATCH, GROUPS, HEADS, SELECTED, NUM_PAGES, DIM = 2, 2, 8, 65, 91, 128


def spelled(text, layouts):
    """Return a type with the layouts that it names."""
    text = re.sub(r" loc\(.*", "", text).strip()
    for _ in range(3):  # layouts name others
        text = re.sub(r"#\w+\b(?!\.)", lambda name: layouts.get(name[0], name[0]), text)
    return text


def sums_of(ttgir):
    """Return the dots and sums of a kernel."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    dots = re.findall(r"= tt\.dot %[\w#]+, %[\w#]+, %(\w+)[^:]* : (.*)", ttgir)
    dots = [("zero" if start.startswith("cst") else "a sum", types) for start, types in dots]
    reduced = re.findall(r'"tt\.reduce"(.*?)\}\) : \((.*?)\) ->', ttgir, re.DOTALL)
    return [
        *(f"dot, from {start}: {spelled(types, layouts)}" for start, types in dots),
        *(f"sum of {spelled(of, layouts)}" for body, of in reduced if "arith.addf" in body),
    ]


def pool(held, size, dtype):
    """Return pages, and what goes with them."""
    shape = (BATCH, GROUPS, NUM_PAGES)
    if held == "model":
        return torch.zeros(*shape, 2, size, DIM, dtype=dtype), None
    run = KV_FORMATS[held].num_bytes(size, DIM, dtype)
    tail = torch.zeros(BATCH, GROUPS, 2, 2, size, DIM, dtype=dtype)
    return torch.zeros(*shape, run, dtype=torch.uint8), Stored(tail, held)


def attend(query, pages, ids, lengths, per_split, stored):
    attention.partials(query, pages, ids, ids, None, lengths, 1.0, 0.0, per_split, stored)


def speculate(query, pages, ids, lengths, stored):
    shape = (*ids.shape, HEADS // GROUPS)
    partial = torch.zeros(*shape, query.shape[-1]), torch.zeros(shape)
    speculation.attend_predicted(query, pages, ids, ids, lengths, 1.0, 0.0, partial, stored)
    counters = torch.zeros(6, dtype=torch.int64)
    chosen, rest = (ids, ids, ids), (lengths, partial, counters, (1.0, 0.0), stored)
    speculation.repair_predicted(query, pages, chosen, *rest, union=False)


def main():
    found = collections.defaultdict(dict)
    ids = torch.zeros(BATCH, GROUPS, SELECTED, dtype=torch.int32)
    lengths = torch.zeros(BATCH, dtype=torch.int32)
    # Tiles of many blocks, then of one.
    for size, per_split, dtype in ((16, 65, torch.bfloat16), (64, 8, torch.float16)):
        query = torch.zeros(BATCH, HEADS, 1, DIM, dtype=dtype)
        for held in PAGES:
            text_by_name.clear()
            pages, stored = pool(held, size, dtype)
            attend(query, pages, ids, lengths, per_split, stored)
            if size == 64:
                speculate(query, pages, ids, lengths, stored)
            for name, text in text_by_name.items():
                found[f"{name} {size}"][held] = sums_of(text)
    json.dump(found, sys.stdout)


main()
