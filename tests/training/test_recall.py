from __future__ import annotations

import torch

from sparda_compile import SpardaConfig
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.training.loss import pool_keys
from sparda_compile.training.recall import block_recall, first_choice

CONFIG = SpardaConfig(
    block_size=16, pool_size=8, pool_stride=4, sink_blocks=1, local_blocks=1, top_k=2
)


def draw(tokens=160, heads=4, groups=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, tokens, dim, generator=generator)
    key = torch.randn(1, groups, tokens, dim, generator=generator)
    return torch.randn(1, groups, tokens, dim, generator=generator), query, key


def test_it_is_what_the_deployed_selection_would_share():
    forecast, query, key = draw()
    first = first_choice(CONFIG)
    hits = total = 0
    for p in range(first, 160):
        geometry = Geometry(10, 16, 8, 4)
        lengths = torch.tensor([p], dtype=torch.int32)
        pooled = [pool_keys(key, CONFIG)]
        picked = []
        for name, heads in (("infllm2", query), ("forecast", forecast)):
            scored = SELECTORS[name].score(heads[:, :, p : p + 1], pooled, lengths, 0.3, geometry)
            ids = select_blocks_reference(scored, lengths, 5, 16, 1, 1)
            current = p // 16
            picked.append([{m for m in row if 1 <= m < current - 1} for row in ids[0].tolist()])
        for true, guess in zip(*picked, strict=True):
            assert len(true) == len(guess) == 2
            hits, total = hits + len(true & guess), total + 2
    recall = block_recall(forecast, query, key, CONFIG, 0.3, 1000)
    assert 0.0 < hits / total < 1.0
    torch.testing.assert_close(float(recall), hits / total)


def test_the_true_query_has_recall_one():
    _, query, key = draw(heads=2)
    assert block_recall(query, query, key, CONFIG, 0.3, 20) == 1.0


def test_fewer_queries_are_a_sample():
    forecast, query, key = draw(tokens=300)
    few = block_recall(forecast, query, key, CONFIG, 0.3, 40)
    every = block_recall(forecast, query, key, CONFIG, 0.3, 300)
    assert few != every
    assert abs(few - every) < 0.2


def test_recall_of_the_last_tokens_alone():
    _, query, key = draw(tokens=300)
    spoiled = torch.cat([-query[:, ::2, :250], query[:, ::2, 250:]], dim=2)
    query = query[:, ::2]
    assert block_recall(spoiled, query, key, CONFIG, 0.3, 40) < 1.0
    assert block_recall(spoiled, query, key, CONFIG, 0.3, 40, last_tokens=50) == 1.0


def test_no_choice_is_no_number():
    forecast, query, key = draw(tokens=first_choice(CONFIG))
    assert block_recall(forecast, query, key, CONFIG, 0.3, 8).isnan()
    assert block_recall(*draw(), CONFIG, 0.3, 0).isnan()
