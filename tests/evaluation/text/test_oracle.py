from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.metrics import kl_divergence
from sparda_compile.evaluation.text.oracle import ORACLE, Oracle, oracle_selector
from sparda_compile.evaluation.text.scripts import Part, dense_reading, module_logits
from sparda_compile.registry import SELECTORS
from sparda_compile.selectors.base import Geometry, empty_summary
from sparda_compile.testing import tiny_llama

GEOMETRY = Geometry(num_blocks=4, block_size=16, pool_size=32, pool_stride=16)


def summary_of(keys, lengths):
    """Return the oracle's summary of the first tokens of each row, made at once."""
    summary = Oracle.summary
    tensors = empty_summary(summary, keys, GEOMETRY)
    mask = torch.arange(keys.shape[2]) < lengths[:, None]
    summary.extend(tensors, keys, torch.zeros_like(lengths), mask, GEOMETRY)
    return tensors


def test_scores_are_the_mass_of_the_attention():
    torch.manual_seed(0)
    lengths = torch.tensor([40, 17], dtype=torch.int32)
    keys, query = torch.randn(2, 2, 40, 8), torch.randn(2, 6, 1, 8)
    scores = Oracle().score(query, summary_of(keys, lengths), lengths, 0.5, GEOMETRY)
    for row, length in enumerate(lengths.tolist()):
        for group in range(2):
            heads = query[row, 3 * group : 3 * group + 3, 0]
            weights = (heads @ keys[row, group, :length].T * 0.5).softmax(-1).sum(0)
            blocks = [block.sum() for block in weights.split(16)]
            torch.testing.assert_close(scores[row, group, : len(blocks)], torch.stack(blocks))
            assert (scores[row, group, len(blocks) :] == -torch.inf).all()


def test_a_summary_token_by_token_is_one_made_at_once():
    torch.manual_seed(0)
    keys, lengths = torch.randn(2, 2, 40, 8), torch.tensor([3, 17], dtype=torch.int32)
    grown = summary_of(keys, lengths)
    for _ in range(20):
        new = torch.stack([keys[row, :, length] for row, length in enumerate(lengths.tolist())])
        Oracle.summary.extend(grown, new[:, :, None], lengths, None, GEOMETRY)
        lengths = lengths + 1
    assert torch.equal(grown[0], summary_of(keys, lengths)[0])


def test_a_module_leaves_out_what_has_least_mass():
    torch.manual_seed(0)
    model, ids = tiny_llama(), torch.randint(0, 256, (1, 200))
    config = SpardaConfig(
        mode="query", selector="infllm2", block_size=16, top_k=2, local_blocks=1,
        lowering="eager", offload="never", progress=False,
    )  # fmt: skip
    part = Part(ids[:, :150]), Part(ids[:, 150:-1], ids[:, 151:])
    reading = dense_reading(model, part)
    with oracle_selector():
        mean_keys = optimize(model, config)
        oracle = optimize(mean_keys, config.replace(selector=ORACLE))
        every = optimize(mean_keys, config.replace(selector=ORACLE, top_k=None))
        kls = [
            float(kl_divergence(reading.logits[0], module_logits(fast, part, reading)[0]).mean())
            for fast in (mean_keys, oracle, every)
        ]
    assert kls[0] > kls[1] > 100 * kls[2]


def test_it_is_there_inside_the_block_alone():
    with oracle_selector():
        assert ORACLE in SELECTORS.choices()
        SpardaConfig(selector=ORACLE)
    assert ORACLE not in SELECTORS
    with pytest.raises(ConfigError, match="selector='oracle'"):
        SpardaConfig(selector=ORACLE)
