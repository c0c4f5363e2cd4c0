"""A padded batch without positions is numbered as the model itself numbers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.positions import counts_real_tokens, num_positions
from sparda_compile.testing import PlainCausalLM, build
from sparda_compile.testing.families import build_form

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager", max_tokens=256)
WIDTH, PADDING = 40, (0, 7, 22)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (len(PADDING), WIDTH + 6), generator=generator)
    mask = torch.stack([(torch.arange(WIDTH + 6) >= n).long() for n in PADDING])
    return ids, mask


def make(name: str) -> torch.nn.Module:
    return build(name) if name == "gpt2" else build_form(name)


@pytest.mark.parametrize("name", ["opt", "gpt2", "biogpt"])
@torch.no_grad()
def test_prompt_decode_and_second_turn_equal_the_model(name: str) -> None:
    model = make(name)
    fast = optimize(model, CONFIG)
    ids, mask = padded()
    ours, theirs = None, None
    for begin, end in ((0, WIDTH), (WIDTH, WIDTH + 1), (WIDTH + 1, WIDTH + 2), (WIDTH + 2, 46)):
        given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        got = fast(**given, past_key_values=ours)
        want = model(**given, past_key_values=theirs, use_cache=True)
        ours, theirs = got.past_key_values, want.past_key_values
        real = mask[:, begin:end].bool()
        torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-4, atol=1e-4)


def test_only_those_that_count_real_tokens_are_said_to() -> None:
    assert counts_real_tokens(build_form("opt"))
    for name in ("gpt2", "llama", "mixtral"):
        assert not counts_real_tokens(build(name))
    assert not counts_real_tokens(build_form("biogpt"))
    assert not counts_real_tokens(PlainCausalLM(positions="learned"))


def test_another_way_of_counting_is_refused() -> None:
    model: Any = build("gpt2")

    class Backwards(type(model)):  # type: ignore[misc]
        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            position_ids: Any = None,
            **given: Any,
        ) -> Any:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1]).flip(0)[None]
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                **given,
            )  # fmt: skip

    model.__class__ = Backwards
    fast = optimize(model, CONFIG)
    ids, mask = padded()
    with pytest.raises(UnsupportedInputError, match="in a way of its own; pass position_ids"):
        fast(ids, attention_mask=mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    fast(ids, attention_mask=mask, position_ids=positions)


def test_a_table_of_positions_ends_where_the_models_ends() -> None:
    for name, limit in (("opt", 4096), ("gpt2", 4096), ("biogpt", 4096), ("phi", None)):
        fast = optimize(make(name), CONFIG)
        assert num_positions(fast.captures.get("decode")) == limit
        if limit is None:
            continue
        ids, last = torch.ones(1, 2, dtype=torch.int64), torch.tensor([[limit - 2, limit - 1]])
        fast(ids, position_ids=last)
        for wrong in (last + 1, last - limit):
            with pytest.raises(UnsupportedInputError, match="a table of positions 0 to 4095"):
                fast(ids, position_ids=wrong)
