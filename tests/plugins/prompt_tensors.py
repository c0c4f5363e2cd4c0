"""What ops of a prompt are given, as attributes, for what they take."""

from __future__ import annotations

from types import SimpleNamespace

import torch

BATCH, GROUPS, DIM, SIZE = 2, 2, 32, 16


def selected(tokens, blocks=16384):
    with torch.device("meta"):
        return SimpleNamespace(
            query=torch.empty(1, 32, tokens, 128, dtype=torch.bfloat16),
            block_ids=torch.empty(1, 2, tokens, 96, dtype=torch.int32),
            slots=torch.empty(1, 2, blocks, dtype=torch.int32),
            staging=torch.empty(1, 2, 1, 2, 64, 128, dtype=torch.bfloat16),
            summary=[torch.empty(1, 2, 4 * blocks, 128)],
            num_blocks=blocks,
            block_size=64,
            num_past=0,
            num_selected=96,
            selector="infllm2",
            near_ids=None,
            num_candidates=0,
            shared=1,
        )


def prompt_of(heads, tokens, dtype, num_past=0, blocks=64):
    """Return new tokens and a cache of so many blocks, as ops are given them."""
    query, k, v = (
        torch.zeros(BATCH, tokens, n, DIM, dtype=dtype).transpose(1, 2)
        for n in (heads, GROUPS, GROUPS)
    )
    numbers = torch.zeros(BATCH, GROUPS, blocks, dtype=torch.int32)
    return SimpleNamespace(
        query=query, k=k, v=v, lengths=torch.zeros(BATCH, dtype=torch.int32), slots=numbers,
        block_table=numbers.clone(), pages=torch.zeros(BATCH, GROUPS, 9, 2, SIZE, DIM, dtype=dtype),
        block_ids=torch.zeros(BATCH, GROUPS, tokens, 4, dtype=torch.int32), num_past=num_past,
        staging=torch.zeros(BATCH, GROUPS, 99, 2, SIZE, DIM, dtype=dtype), num_blocks=blocks,
        pooled=torch.zeros(BATCH, GROUPS, 4 * blocks, DIM, dtype=dtype), block_size=SIZE,
        bounds=torch.zeros(BATCH, GROUPS, blocks, 2, DIM, dtype=dtype), near_ids=None, shared=1,
        num_selected=4, num_candidates=0, tail=None,
    )  # fmt: skip


def low_bit_keys(given, bits):
    """Return the tensors of a summary of low-bit keys."""
    scales = given.bounds[:, :, :, 0].contiguous(), given.bounds[:, :, :, 1].contiguous()
    codes = torch.zeros(BATCH, GROUPS, given.num_blocks, bits * SIZE // 16, DIM).short()
    return [codes, *scales, given.k.new_zeros(BATCH, GROUPS, SIZE, DIM)]


def all_tensors(given, others):
    return [t for t in (*vars(given).values(), *others) if isinstance(t, torch.Tensor)]
