"""The mathematics of block-selected decoding, written a second time: slow, plain, one token a time.

For the Llama architecture (`q_proj` .. `o_proj`, RMSNorm, SwiGLU, half-split RoPE; optional biases,
tied embeddings and query/key norms). Keys and values are Python lists, summaries are recomputed
at every step, and nothing of the library is used, so agreement with it means something. For NOSA
each token also has a retention score per group, which weighs it in attention as exp(score).

Legend: H query heads, G KV heads (groups), R = H / G, D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from sparda_compile.testing.reference_scores import (
    ReferenceMode,
    ReferenceSelector,
    Rules,
    block_scores,
    pooled_keys,
    window_to_block_scores,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["BlockIds", "ReferenceMode", "random_forecast", "reference_decode"]

BlockIds = list[list[list[int]]]
"""Ascending block ids of one decode step, by layer and group."""

_MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3", "nosa")


@dataclasses.dataclass
class _Memory:
    """Of one layer, for each group: keys and values, [D] per token, and retention scores, [].

    Without retention there are no scores.
    """

    keys: list[list[Tensor]]
    values: list[list[Tensor]]
    worths: list[list[Tensor]]


@torch.no_grad()
def reference_decode(
    model: Any,
    prompt_ids: Sequence[int] | Tensor,
    num_steps: int,
    *,
    mode: ReferenceMode = "dense",
    selector: ReferenceSelector = "infllm2",
    top_k: int | None = None,
    sink_blocks: int = 1,
    local_blocks: int = 32,
    block_size: int = 64,
    pool_size: int = 32,
    pool_stride: int = 16,
    short_list: int = 23,
    prefill: Literal["dense", "sparse"] = "dense",
    prefill_selector: ReferenceSelector | None = None,
    prefill_candidates: float | None = None,
    shared_tokens: int = 1,
    forecast: Mapping[int | str, Tensor] | None = None,
    trace: list[BlockIds] | None = None,
) -> tuple[list[int], list[Tensor]]:
    """Decode greedily, reading only the selected blocks of each layer and group.

    The prompt is dense, or each of its tokens is as one of a decode; its last logits give the first
    token. Every later token is a decode step at position p. It may read blocks
    0 .. p // block_size. The first `sink_blocks`, the current block and the `local_blocks` before
    it are always read; `top_k` more are picked by score, highest first, ties to the lower id.
    Scores know only the keys of earlier tokens;
    attention also reads the key of the token itself.

    Args:
        model: A `LlamaForCausalLM`, `MistralForCausalLM` without a window, `Qwen2ForCausalLM`,
            `Qwen3ForCausalLM` or `NosaForCausalLM`, in fp32.
        prompt_ids: Tokens of the prompt, one sequence: a list, or a tensor [T] or [1, T].
        num_steps: Tokens to make; the first needs no decode step.
        mode: Who scores: `query` (also under the names `exact` and `speculate`) the layer's
            own query, `forecast` the layer before, `dense` nobody, so every block is read.
        selector: How a query scores: `infllm2` by pooled keys, `quest` by bounds, `lowbit2` and
            `lowbit4` by keys in few bits; `nosa`, for a `NosaForCausalLM` alone: as `infllm2` or
            the forecast for `short_list` blocks, and the others by retention.
        top_k: Blocks beyond the forced ones; None reads every block.
        sink_blocks: First blocks that are always read.
        local_blocks: Blocks before the current one that are always read.
        block_size: Tokens of a block.
        pool_size: Tokens of a pooled key.
        pool_stride: Tokens between the starts of neighbouring pooled keys.
        short_list: For `nosa`: of the `top_k` blocks, those that the query or forecast picks.
        prefill: Whether tokens of the prompt read all earlier ones, or select blocks too.
        prefill_selector: How a query, or a forecast, scores for tokens of a sparse prompt; None is
            `selector`.
        prefill_candidates: Multiple of `top_k` blocks that a query scores for tokens of a sparse
            prompt, by keys in few bits: those that the mean of its heads scores best; None is all.
        shared_tokens: Tokens of the prompt that read what the first of them selects, from each
            multiple on; for a sparse prompt.
        forecast: For `forecast`: under the key l the projection [G * D, C] of layer l's
            attention input that selects for layer l + 1; under `bootstrap` the projection of
            layer 0's attention input that selects for layer 0.
        trace: A list to append the block ids of every decode step to, so `num_steps - 1` items.

    Returns:
        The tokens and, for each of them, the fp32 logits [V] it was the largest of.

    Raises:
        ValueError: If the model is of another architecture or the forecast is missing.
    """
    _check(model, mode, selector, forecast)
    rules = Rules(
        mode=mode,
        selector=selector,
        top_k=top_k,
        sink_blocks=sink_blocks,
        local_blocks=local_blocks,
        block_size=block_size,
        pool_size=pool_size,
        pool_stride=pool_stride,
        short_list=short_list,
        is_prompt_sparse=prefill == "sparse",
        shared_tokens=shared_tokens,
    )
    in_prompts = dataclasses.replace(
        rules, selector=prefill_selector or selector, candidates=prefill_candidates
    )
    decoder = _Decoder(model, in_prompts, forecast or {})
    lead_ids: BlockIds | None = None
    for token in torch.as_tensor(prompt_ids).reshape(-1).tolist():
        given = lead_ids if decoder.position % shared_tokens else None
        logits_V, lead_ids = decoder.forward(
            token, is_prefill=not rules.is_prompt_sparse, given=given
        )
    decoder.rules = rules
    tokens, logits = [int(logits_V.argmax())], [logits_V]
    while len(tokens) < num_steps:
        logits_V, block_ids = decoder.forward(tokens[-1], is_prefill=False)
        tokens.append(int(logits_V.argmax()))
        logits.append(logits_V)
        if trace is not None:
            trace.append(block_ids)
    return tokens, logits


def random_forecast(model: Any, *, seed: int = 0) -> dict[int | str, Tensor]:
    """Return untrained projections in the form that `reference_decode` takes.

    Args:
        model: Model whose sizes they fit.
        seed: Seed of the weights; the global random state is left alone.

    Returns:
        `bootstrap` and the layers 0 .. L - 2, each [G * D, C] fp32.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    num_rows = config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    names: list[int | str] = ["bootstrap", *range(config.num_hidden_layers - 1)]
    scale = config.hidden_size**-0.5
    return {
        name: torch.randn(num_rows, config.hidden_size, generator=generator) * scale
        for name in names
    }


def _check(
    model: Any, mode: str, selector: str, forecast: Mapping[int | str, Tensor] | None
) -> None:
    config = model.config
    if config.model_type not in _MODEL_TYPES or getattr(config, "sliding_window", None):
        raise ValueError(
            f"the reference knows {', '.join(_MODEL_TYPES)} without sliding windows, "
            f"not {type(model).__name__}."
        )
    if mode != "dense" and (config.model_type == "nosa") != (selector == "nosa"):
        raise ValueError(f"selector={selector!r} does not go with {type(model).__name__}.")
    if mode == "forecast" and forecast is None:
        raise ValueError("mode='forecast' needs the projections; pass forecast={...}.")


class _Decoder:
    """A model, the keys and values of the tokens it has seen, and how it selects."""

    def __init__(self, model: Any, rules: Rules, forecast: Mapping[int | str, Tensor]) -> None:
        self.model = model
        self.rules = rules
        self.forecast = forecast
        self.position = 0
        groups = range(model.config.num_key_value_heads)
        self.memories = [
            _Memory([[] for _ in groups], [[] for _ in groups], [[] for _ in groups])
            for _ in model.model.layers
        ]

    def forward(
        self, token: int, *, is_prefill: bool, given: BlockIds | None = None
    ) -> tuple[Tensor, BlockIds]:
        """Run one token; return its logits [V] and the block ids by layer and group.

        A token of a dense prompt reads all earlier ones and gives no ids. With `given` it reads
        those blocks.
        """
        x_C = self.model.model.embed_tokens.weight[token]
        previous_input_C: Tensor | None = None
        block_ids: BlockIds = []
        for layer_id, layer in enumerate(self.model.model.layers):
            input_C = _rms_norm(x_C, layer.input_layernorm)
            forecast_GD = self._forecast(layer_id, input_C, previous_input_C)
            q_GRD, k_GD, v_GD = self._project(layer.self_attn, input_C)
            worth_G = _retention(layer.self_attn, v_GD)
            outputs, ids_by_group = [], []
            for group, q_RD in enumerate(q_GRD):
                keys = self.memories[layer_id].keys[group]
                values = self.memories[layer_id].values[group]
                worths = self.memories[layer_id].worths[group]
                readable = list(range(self.position + 1))
                if not is_prefill:
                    f_D = None if forecast_GD is None else forecast_GD[group]
                    scale = layer.self_attn.scaling
                    ids = _select(q_RD, f_D, scale, keys, self.position, self.rules, worths)
                    ids = given[layer_id][group] if given else ids
                    readable = [t for t in readable if t // self.rules.block_size in ids]
                    ids_by_group.append(ids)
                keys.append(k_GD[group])
                values.append(v_GD[group])
                if worth_G is not None:
                    worths.append(worth_G[group])
                read = [[of[t] for t in readable] for of in (keys, values, worths) if of]
                outputs.append(_attend(q_RD, layer.self_attn.scaling, *read))
            block_ids.append(ids_by_group)
            x_C = x_C + _linear(torch.cat(outputs).flatten(), layer.self_attn.o_proj)
            x_C = x_C + _mlp(_rms_norm(x_C, layer.post_attention_layernorm), layer.mlp)
            previous_input_C = input_C
        self.position += 1
        logits_V = _linear(_rms_norm(x_C, self.model.model.norm), self.model.lm_head)
        return logits_V.float(), block_ids

    def _project(self, attention: Any, input_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rotated query [G, R, D], the rotated key [G, D] and the value [G, D]."""
        heads = (-1, attention.head_dim)
        q_HD = _linear(input_C, attention.q_proj).unflatten(0, heads)
        k_GD = _linear(input_C, attention.k_proj).unflatten(0, heads)
        v_GD = _linear(input_C, attention.v_proj).unflatten(0, heads)
        if hasattr(attention, "q_norm"):
            q_HD, k_GD = _rms_norm(q_HD, attention.q_norm), _rms_norm(k_GD, attention.k_norm)
        q_GRD = self._rotate(q_HD).unflatten(0, (k_GD.shape[0], -1))
        return q_GRD, self._rotate(k_GD), v_GD

    def _forecast(
        self, layer_id: int, input_C: Tensor, previous_input_C: Tensor | None
    ) -> Tensor | None:
        """Return the rotated forecast heads [G, D] that select for layer `layer_id`."""
        if self.rules.mode != "forecast":
            return None
        if previous_input_C is None:
            flat = self.forecast["bootstrap"] @ input_C
        else:
            flat = self.forecast[layer_id - 1] @ previous_input_C
        return self._rotate(flat.unflatten(0, (self.model.config.num_key_value_heads, -1)))

    def _rotate(self, x_ND: Tensor) -> Tensor:
        """Turn channel i with channel i + D/2 by the angle of the token's position."""
        rotary = self.model.model.rotary_emb
        angles = self.position * rotary.inv_freq.float()
        cos = angles.cos() * rotary.attention_scaling
        sin = angles.sin() * rotary.attention_scaling
        left, right = x_ND.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def _select(
    q_RD: Tensor,
    forecast_D: Tensor | None,
    scale: float,
    keys: list[Tensor],
    position: int,
    rules: Rules,
    worths: Sequence[Tensor] = (),
) -> list[int]:
    """Return the ascending ids of the blocks that one group reads at `position`.

    `keys` and `worths` hold the tokens before `position` only.
    """
    current = position // rules.block_size
    num_blocks = current + 1
    if rules.mode == "dense" or rules.top_k is None:
        return list(range(num_blocks))
    first_local = current - rules.local_blocks
    forced = [m for m in range(num_blocks) if m < rules.sink_blocks or m >= first_local]
    others = [m for m in range(num_blocks) if m not in forced]
    always = rules.sink_blocks + rules.local_blocks + 1
    among = None
    if rules.candidates is not None:
        look = block_scores(q_RD, q_RD.mean(0), scale, keys, num_blocks, rules)
        others.sort(key=lambda m: (-look[m], m))
        proposed = math.ceil(rules.candidates * rules.top_k)
        others = sorted(others[: always + proposed - len(forced)])
        among = forced + others
    scores = block_scores(q_RD, forecast_D, scale, keys, num_blocks, rules, among)
    others.sort(key=lambda m: (-scores[m], m))
    if rules.selector == "nosa":
        others = others[: rules.short_list] + _by_worth(others[rules.short_list :], worths, rules)
    return sorted(forced + others[: always + rules.top_k - len(forced)])


def _by_worth(blocks: list[int], worths: Sequence[Tensor], rules: Rules) -> list[int]:
    """Return blocks in falling order of their best window's mean retention score."""
    means = [float(mean) for mean in pooled_keys(list(worths), rules)]
    scores = window_to_block_scores(means, max(blocks, default=0) + 1, rules)
    return sorted(blocks, key=lambda m: (-scores[m], m))


def _retention(attention: Any, v_GD: Tensor) -> Tensor | None:
    """Return NOSA's retention score A * softplus(Delta v) of a token, [G]; None without one."""
    if not hasattr(attention, "delta"):
        return None
    raised_G = (1 + _linear(v_GD.flatten(), attention.delta).exp()).log()
    scores_G: Tensor = attention.amplitude * raised_G
    return scores_G


def _attend(
    q_RD: Tensor,
    scale: float,
    keys: list[Tensor],
    values: list[Tensor],
    worths: Sequence[Tensor] = (),
) -> Tensor:
    """Return exact attention [R, D] of the group's query heads over the given tokens."""
    weights_RT = (q_RD @ torch.stack(keys).T * scale).softmax(-1)
    if worths:
        weights_RT = weights_RT * torch.stack(list(worths)).exp()
        weights_RT = weights_RT / weights_RT.sum(-1, keepdim=True)
    return weights_RT @ torch.stack(values)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    out: Tensor = x / scale * norm.weight
    return out


def _mlp(x_C: Tensor, mlp: Any) -> Tensor:
    return _linear(
        functional.silu(_linear(x_C, mlp.gate_proj)) * _linear(x_C, mlp.up_proj), mlp.down_proj
    )


def _linear(x: Tensor, linear: Any) -> Tensor:
    return functional.linear(x, linear.weight, linear.bias)
