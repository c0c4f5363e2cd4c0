from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile import SpardaConfig, explain
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.capture.forward import capture
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.graph.nodes import fake_value
from sparda_compile.module.planned_ranks import as_first_rank
from sparda_compile.ranks.shards import is_sharded
from sparda_compile.testing import build, build_form, tiny_llama

CONFIG = SpardaConfig(
    mode="forecast", block_size=16, top_k=2, local_blocks=2, max_tokens=256, offload="always",
    pool_size=8, pool_stride=4, machine="h200",
)  # fmt: skip


def is_sharded_by_vocabulary(model):
    """Whether transformers shards the embedding, too; before 5.21 it did not."""
    with as_first_rank(model, 2) as sharded:
        return is_sharded(sharded.model.embed_tokens.weight)


def test_two_ranks_have_half_of_the_cache_each_and_all_of_the_model_between_them():
    model = build("llama")
    one, two = (explain(model, CONFIG, batch_size=3, tp=n) for n in (1, 2))
    assert not two.error
    assert [site.num_groups * 2 for site in two.sites] == [site.num_groups for site in one.sites]
    assert two.host_bytes * 2 == one.host_bytes
    assert one.weight_bytes / 2 < two.weight_bytes < one.weight_bytes
    assert two.model_parameters == one.model_parameters
    assert (one.num_ranks, one.collectives) == (1, "")
    assert two.num_ranks == 2
    sums = 4 + is_sharded_by_vocabulary(model)
    assert two.collectives == f"{sums} all_reduce, 1 all_gather"
    assert f"Each of 2 ranks: 1 KV heads of a layer; a step has {sums} all_reduce, 1" in str(two)
    assert "ranks" not in str(one)
    assert {s.machine for s in two.schedules} == {"h200"}


def test_it_may_be_asked_again_and_leaves_nothing_behind():
    hook, model = sys.excepthook, build("llama")
    weight = model.lm_head.weight
    first, second = (explain(model, CONFIG, tp=2) for _ in range(2))
    assert first.collectives == second.collectives
    assert model.lm_head.weight is weight
    assert sys.excepthook is hook
    assert not dist.is_initialized()


def test_heads_that_ranks_cannot_share_are_said_in_the_report():
    error = explain(build("llama"), CONFIG, tp=4).error
    assert "4 query heads and 2 KV heads, which 4 ranks cannot share equally; use 1, 2" in error


def test_heads_that_a_plan_gathers_are_on_all_ranks_and_counted():
    model = build_form("olmo2")
    one, four = (explain(model, CONFIG, tp=n) for n in (1, 4))
    assert not four.error
    assert [site.num_groups for site in four.sites] == [site.num_groups for site in one.sites]
    assert (one.kv_copies, one.replicated_bytes) == (1, 0)
    assert four.kv_copies == 4
    assert four.host_bytes == one.host_bytes > 0
    assert four.replicated_bytes == 3 * (one.host_bytes + one.device_bytes)
    assert four.to_dict()["replicated_bytes"] == four.replicated_bytes
    assert "the same on every rank, as its plan gathers them: 4 times the KV cache" in str(four)
    assert "replicated" not in str(explain(build("llama"), CONFIG, tp=2))


@pytest.mark.parametrize("tp", [0, -1, 1.5, "auto"])
def test_other_numbers_are_refused(tp):
    with pytest.raises(ConfigError, match="is no number of ranks; use 1 or more"):
        explain(build("llama"), CONFIG, tp=tp)


def test_a_module_without_a_plan_is_refused():
    with pytest.raises(UnsupportedInputError, match="has no plan for tensor parallelism"):
        explain(torch.nn.Linear(2, 2), CONFIG, tp=2)


def test_inside_of_a_process_group_the_sharded_model_is_asked():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedInputError, match="call explain on the model that transf"):
            explain(tiny_llama(), CONFIG, tp=2)
    finally:
        dist.destroy_process_group()


def test_a_copy_has_no_memory():
    with as_first_rank(build("llama"), 2) as model:
        assert all(p.to_local().is_meta for p in [model.lm_head.weight])


UNEVEN = pytest.mark.skipif(
    CACHE_NAME != "cache",
    reason="transformers 5.17 itself refuses a head whose rows ranks cannot divide, with an error "
    "that says so; transformers 5.24 runs this test",
)


@pytest.mark.parametrize("vocabulary", [250, pytest.param(251, marks=UNEVEN)])
def test_a_vocabulary_that_ranks_cannot_divide_is_filled_up(vocabulary):
    config = build("llama").config.to_dict() | {"vocab_size": vocabulary}
    with as_first_rank(LlamaForCausalLM(LlamaConfig(**config)).eval(), 2) as model:
        captured = capture(model, "decode", last_logits_only=True)
        output = next(iter(reversed(captured.graph_module.graph.nodes)))
        assert fake_value(output)[0].shape[-1] == vocabulary
