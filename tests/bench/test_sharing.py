from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparda_compile.bench.shapes import SHAPES, build_model
from sparda_compile.bench.sharing import Sharing, count_unions, louder_tokens


def test_shared_is_what_a_token_keeps_of_the_one_before_it():
    """Four tokens of ten blocks; each keeps eight and takes two that nobody else has."""
    sharing = Sharing()
    assert sharing.row() is None
    ids = torch.zeros(1, 1, 8, 12, dtype=torch.int32)
    ids[..., 10:] = -1
    sharing.add(torch.tensor([[16]], dtype=torch.int32), ids, 4, 0)
    sharing.add(torch.tensor([[16]], dtype=torch.int32), ids, 4, 1)
    assert sharing.row() == {"tokens": 4, "union": 16.0, "selected": 10.0, "shared": 0.8}


def test_tiles_of_one_token_share_nothing():
    sharing = Sharing()
    sharing.add(torch.tensor([[3, 3]], dtype=torch.int32), torch.zeros(1, 1, 2, 3).int(), 1, 0)
    assert sharing.row() == {"tokens": 1, "union": 3.0, "selected": 3.0}


def test_what_is_only_traced_is_not_counted():
    sharing = Sharing()
    with FakeTensorMode():
        sharing.add(torch.empty(1, 2, dtype=torch.int32), torch.empty(1, 1, 2, 3).int(), 1, 0)
    assert sharing.row() is None


def test_unions_of_real_attention_are_counted():
    kernels = pytest.importorskip("sparda_compile.bench.prompt_case")
    shape = kernels.Shape(tokens=8, past=64, heads=2, block=16, dim=16, sink=1, local=1, scored=1)
    case = kernels.Case(torch.device("cpu"), shape, 1)
    with count_unions(torch.device("cuda")) as sharing:
        case.stage()
        case.attend()
    row = sharing.row()
    # One tile has room for more tokens than there are.
    assert row["tokens"] >= shape.tokens
    row["selected"] *= row["tokens"] / shape.tokens
    assert row["selected"] == float((case.ids >= 0).sum() / 8)
    want = len(set(case.ids[0, 0].flatten().tolist()))
    assert row["union"] == want
    case.attend()
    assert sharing.row()["union"] == row["union"]


def test_tokens_are_louder_for_a_while_and_no_bit_is_lost():
    model = build_model(SHAPES["tiny"], torch.device("cpu"), torch.bfloat16)
    weight = model.get_input_embeddings().weight
    before = weight.clone()
    with louder_tokens(model):
        assert torch.equal(weight, before * 256)
    assert torch.equal(weight, before)
