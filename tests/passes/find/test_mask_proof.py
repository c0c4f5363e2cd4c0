"""Masks that agree with causal attention for a few tokens, and no longer for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparda_compile.capture.causal_lm import as_causal_lm
from sparda_compile.config import SpardaConfig
from sparda_compile.errors import AttentionNotFoundError
from sparda_compile.graph.site import sites_of
from sparda_compile.module.captures_of import captures_of
from sparda_compile.program.captures import Captures
from sparda_compile.testing import PlainCausalLM, tiny_llama
from sparda_compile.testing.building import build_from_transformers
from sparda_compile.testing.plain import PlainAttention

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager")
INF = float("inf")


def rows_and_columns(size: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(size)
    return index[:, None], index


def distance(size: int) -> Tensor:
    row, column = rows_and_columns(size)
    return row - column


def causal(size: int) -> Tensor:
    return distance(size) >= 0


def thinned(size: int) -> Tensor:
    return causal(size) & ~((distance(size) > 30) & (distance(size) % 2 == 1))


def with_mask(mask: Callable[[int], Tensor], form: str = "sdpa") -> nn.Module:
    """Return a module whose attention has a mask [T, T], given T."""

    class Masked(PlainAttention):
        def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
            seen = mask(q_BHTD.shape[2])
            repeats = self.num_heads // self.num_groups
            keys, values = (x.repeat_interleave(repeats, 1) for x in (k_BGTD, v_BGTD))
            if form == "sdpa":
                return functional.scaled_dot_product_attention(q_BHTD, keys, values, seen)
            scores = q_BHTD @ keys.transpose(-1, -2) * self.head_dim**-0.5
            if seen.dtype == torch.bool:
                scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
            else:
                scores = scores + seen
            weights = scores.softmax(-1)
            if form == "cut":
                weights = weights * (distance(q_BHTD.shape[2]) < 300)
            return weights @ values

    class Model(PlainCausalLM):
        attention_class = Masked

    return Model()


def windows_of(model: nn.Module, windows: dict[int, int] | None = None) -> list[int]:
    """Return the window of each attention that is found, in a prefill."""
    captures = Captures(as_causal_lm(model), windows or {})
    return [s.window for s in sites_of(captures.sites("prefill", CONFIG).graph_module.graph)]


def refusal(model: nn.Module, windows: dict[int, int] | None = None) -> str:
    with pytest.raises(AttentionNotFoundError) as caught:
        windows_of(model, windows)
    return str(caught.value)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "mask",
    [
        causal,
        lambda n: torch.ones(n, n).tril().bool(),
        lambda n: torch.ones(n, n, dtype=torch.bool).tril(0)[None, None],
        lambda n: torch.full((n, n), -INF).triu(1),
        lambda n: torch.zeros(n, n).masked_fill(~causal(n), -INF),
        lambda n: torch.zeros(n, n).masked_fill_(torch.triu(torch.ones(n, n), 1) > 0, -1e9),
        lambda n: torch.where(causal(n), 0.0, -INF).unsqueeze(0).expand(2, 1, n, n)[:1],
        lambda n: torch.arange(7, n + 7)[:, None] >= torch.arange(n) + 7,
        lambda n: (torch.arange(n).view(1, 1, n, 1) - torch.arange(n)).clamp(min=-1).ge(0),
        lambda n: causal(n) & (distance(n) < n),
        lambda n: causal(n) | (distance(n) % 64 == 0) & causal(n),
    ],
)
def test_causal_masks_however_they_are_made_are_found(
    mask: Callable[[int], Tensor], form: str
) -> None:
    assert windows_of(with_mask(mask, form)) == [0, 0]


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda n: causal(n) & (distance(n) < 40), "position 40 does not see the one at 0"),
        (lambda n: causal(n) & (distance(n) < 5000), "position 5000 does not see the one at 0"),
        (lambda n: causal(n).tril(0).triu(-99), "position 100 does not see the one at 0"),
        (
            lambda n: causal(n) & (torch.arange(n)[:, None] // 64 == torch.arange(n) // 64),
            "does not see the one at",
        ),
        (lambda n: causal(n) & ((distance(n) < 25) | (distance(n) % 3 == 0)), "position 25"),
        (
            lambda n: causal(n) & ((distance(n) < 40) | (torch.arange(n) < 4)),
            "does not see the one at 4",
        ),
        (lambda n: causal(n) | (torch.arange(n) < 64) & (distance(n) > -30), "not causal"),
        (lambda n: causal(n) & (distance(n).float() + 1).log().lt(7.0), "does not see"),
        (lambda n: causal(n) & ~((distance(n) > 900_000) & (distance(n) < 900_400)), "not see"),
        (lambda n: causal(n) & (torch.arange(n) < 123_456), "does not see"),
        (lambda n: causal(n) | (torch.arange(n) == 77), "sees the one at 77"),
        (lambda n: causal(n) & (distance(n) != 1000), "does not see the one at"),
        (thinned, "does not see"),
    ],
)
def test_masks_that_leave_it_far_away_are_refused_by_position(
    mask: Callable[[int], Tensor], words: str, form: str
) -> None:
    message = refusal(with_mask(mask, form))
    assert words in message
    assert "layer 0" in message


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (
            lambda n: torch.ones(n).cumsum(0)[:, None] >= torch.ones(n).cumsum(0),
            "cumsum mixes tokens",
        ),
        (lambda n: causal(n).flip(0).flip(0), "flip mixes tokens"),
        (lambda n: torch.cat([causal(n)[:, :30], causal(n)[:, 30:]], 1), "cuts off tokens"),
    ],
)
def test_masks_that_cannot_be_computed_for_some_tokens_are_refused(
    mask: Callable[[int], Tensor], words: str
) -> None:
    assert words in refusal(with_mask(mask))


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_a_bias_that_begins_far_away_is_refused(form: str) -> None:
    def mask(n: int) -> Tensor:
        far = (distance(n) > 2000) * -0.5
        return torch.zeros(n, n).masked_fill(~causal(n), -INF) + far

    assert "bias" in refusal(with_mask(mask, form))


def test_weights_that_are_cut_behind_the_softmax_are_refused() -> None:
    assert "do not add up to 1" in refusal(with_mask(causal, "cut"))


@pytest.mark.parametrize("which", [1, 2, 3])
def test_what_changes_by_position_behind_the_cache_is_refused(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fading(*args: Any, **kwargs: Any) -> Any:
        given = list(args)  # module, query, key, value, ...
        index = torch.arange(given[which].shape[2])
        given[which] = given[which] * torch.where(index > 900, 0.5, 1.0)[:, None]
        return sdpa(*given, **kwargs)

    captures = captures_of(tiny_llama())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", fading)
    if which == 1:  # a part of how the query is made
        assert sites_of(captures.sites("prefill", CONFIG).graph_module.graph)
        return
    with pytest.raises(AttentionNotFoundError, match="positions behind the cache"):
        captures.sites("prefill", CONFIG)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [3, 40, 300, 70_000])
def test_a_declared_window_is_proved_at_its_edge(window: int, form: str) -> None:
    model = with_mask(lambda n: causal(n) & (distance(n) < window), form)
    assert windows_of(model, {0: window, 1: window}) == [window] * 2
    for claimed in (window - 1, window + 1):
        message = refusal(model, dict.fromkeys(range(2), claimed))
        assert f"window {claimed}" in message or f"window of {claimed} tokens" in message


def mistral(window: int, attn_implementation: str = "sdpa") -> nn.Module:
    fields = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": window,
    }  # fmt: skip
    return build_from_transformers(
        "MistralForCausalLM", "MistralConfig", fields, seed=0,
        attn_implementation=attn_implementation,
    )  # fmt: skip


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_windows_of_transformers_are_proved(attn_implementation: str) -> None:
    captures = captures_of(mistral(100, attn_implementation))
    found = sites_of(captures.sites("prefill", CONFIG).graph_module.graph)
    assert {site.window for site in found} == {100}
    captures.windows = dict.fromkeys(captures.windows, 101)
    captures._found.clear()
    captures._tagged.clear()
    with pytest.raises(AttentionNotFoundError, match="window of 101 tokens: the token at position"):
        captures.sites("prefill", CONFIG)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [4096, 5000])
def test_a_window_that_holds_all_positions_is_none_within_its_reach(
    window: int, attn_implementation: str
) -> None:
    captures = captures_of(mistral(window, attn_implementation))
    found = sites_of(captures.sites("prefill", CONFIG).graph_module.graph)
    assert {site.window for site in found} == {0}
    captures.reach += 1
    captures._found.clear()
    captures._tagged.clear()
    if attn_implementation == "eager":
        with pytest.raises(AttentionNotFoundError, match=f"position {window} does not see the one"):
            captures.sites("prefill", CONFIG)


def test_a_window_that_holds_all_positions_is_none() -> None:
    assert set(captures_of(mistral(4096)).windows.values()) == {0}
    assert set(captures_of(mistral(4095)).windows.values()) == {4095}


def test_layers_that_share_a_mask_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparda_compile.passes.find import mask_proof

    calls = []
    examine = mask_proof.MaskProof._examine
    monkeypatch.setattr(
        mask_proof.MaskProof, "_examine", lambda *args: calls.append(1) or examine(*args)
    )
    for attn_implementation in ("sdpa", "eager"):
        model = tiny_llama(num_hidden_layers=6, attn_implementation=attn_implementation)
        captures_of(model).sites("prefill", CONFIG)
    assert len(calls) == 2
