"""Collectives of a forward as ops: what DTensors do around embeddings and heads, sums in place."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.nn import functional as F

from sparda_compile.capture.causal_lm import WrappedCausalLM
from sparda_compile.capture.forward import capture
from sparda_compile.errors import CaptureError
from sparda_compile.graph.nodes import call_name, changes_in_place, fake_value
from sparda_compile.module.planned_ranks import as_first_rank
from sparda_compile.program.rank_order import collectives_of
from sparda_compile.ranks.shards import is_sharded
from sparda_compile.testing import build

WORLD = "world"


@pytest.fixture(scope="module")
def two_ranks():
    """The decode of a tiny model, as the first of two ranks has it."""
    with as_first_rank(build("llama"), 2) as model:
        yield model, capture(model, "decode", last_logits_only=True)


@pytest.fixture
def joined(two_ranks):
    """A process group of two, and the name of it."""
    return dist.group.WORLD


class Plain(nn.Module):
    """Does something to a token's row of a table."""

    def __init__(self, forward):
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.does = forward

    def forward(self, input_ids, position_ids):
        return self.does(self.table(input_ids) + position_ids.unsqueeze(-1))


def traced(forward):
    return capture(WrappedCausalLM(Plain(forward)), "prefill", last_logits_only=False)


def names(captured):
    return [
        call_name(node) for node in captured.graph_module.graph.nodes if node.op != "placeholder"
    ]


def test_a_step_sums_after_embedding_attention_and_mlp_and_gathers_logits(two_ranks):
    model, captured = two_ranks
    found = [text.split()[0] for text in collectives_of(captured.graph_module.graph)]
    table = is_sharded(model.model.embed_tokens.weight)  # as transformers does from 5.21 on
    sums = 2 * model.config.num_hidden_layers + table
    assert found == ["all_reduce"] * sums + ["all_gather"]


def test_weights_are_the_local_parts_under_their_own_names(two_ranks):
    model, captured = two_ranks
    whole = model.config
    name = "model_layers_0_self_attn_q_proj_weight"
    heads = whole.num_attention_heads // 2
    assert captured.weights[name].shape == (
        heads * model.model.layers[0].self_attn.head_dim,
        whole.hidden_size,
    )
    assert isinstance(captured.weights[name], nn.Parameter), "no proof takes it for a constant"
    assert captured.weights["lm_head_weight"].shape[0] == whole.vocab_size // 2


def test_no_view_comes_between_a_weight_and_its_linear(two_ranks):
    graph = two_ranks[1].graph_module.graph
    linears = [n for n in graph.nodes if call_name(n) == "linear"]
    assert linears
    assert all(node.args[1].op == "placeholder" for node in linears)


def test_nothing_of_a_program_changes_in_place(two_ranks):
    graph = two_ranks[1].graph_module.graph
    assert not [n for n in graph.nodes if changes_in_place(n)]


def test_logits_have_the_whole_vocabulary(two_ranks):
    model, captured = two_ranks
    output = next(iter(reversed(captured.graph_module.graph.nodes)))
    assert fake_value(output)[0].shape[-1] == model.config.vocab_size


def test_functional_collectives_are_the_same_ops(joined):
    def both(x):
        total = functional.all_reduce(x, "sum", joined)
        return functional.all_gather_tensor(total, 0, joined)[: x.shape[0]]

    found = names(traced(both))
    assert [n for n in found if n.startswith("sparda.")] == [
        "sparda.all_reduce",
        "sparda.all_gather",
    ]


def test_a_sum_in_place_is_a_new_value(joined):
    def summed(x):
        y = F.relu(x)
        dist.all_reduce(y, group=joined)
        return y + x

    captured = traced(summed)
    total = next(
        n for n in captured.graph_module.graph.nodes if call_name(n) == "sparda.all_reduce"
    )
    assert [call_name(user) for user in total.users] == ["add"]


def test_a_view_from_before_a_sum_in_place_is_refused(joined):
    def viewed(x):
        y = F.relu(x)
        view = y.view(-1, 4)
        dist.all_reduce(y, group=joined)
        return y + view.view_as(x)

    with pytest.raises(CaptureError, match="a view of a tensor that all_reduce changes in place"):
        traced(viewed)


def test_a_view_from_behind_it_is_not(joined):
    def viewed(x):
        y = F.relu(x)
        dist.all_reduce(y, group=joined)
        return y.transpose(0, 1).transpose(0, 1).reshape(-1, 4).view_as(x)

    assert "sparda.all_reduce" in names(traced(viewed))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, g: dist.all_reduce(x, dist.ReduceOp.MAX, g), "another operation than SUM"),
        (lambda x, g: dist.all_reduce(x, group=g, async_op=True), "or with async_op"),
        (lambda x, g: dist.broadcast(x, 0, g), "it calls broadcast of torch.distributed"),
        (lambda x, g: functional.all_reduce(x, "max", g), "it calls all_reduce of torch.distr"),
    ],
)
def test_other_collectives_are_refused(joined, call, words):
    def forward(x):
        call(x, joined)
        return x

    with pytest.raises(CaptureError, match=words):
        traced(forward)


def test_other_functions_of_a_dtensor_are_refused(two_ranks):
    weight = two_ranks[0].lm_head.weight

    def product(x):
        return x @ weight[:4, :4]

    with pytest.raises(CaptureError, match="it computes __getitem__ of a DTensor"):
        traced(product)
