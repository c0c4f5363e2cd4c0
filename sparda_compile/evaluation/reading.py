"""Reading the haystack before a decode: densely, or each token by the blocks that it selects.

For models built like Llama, on any device; nothing is captured or compiled.

Legend: B sequences, H query heads, G groups, D head dim, C hidden size, T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from sparda_compile.capture.cache_name import cache_of
from sparda_compile.config import round_up
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.weights import following_weights, projections_of
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.prefill_attention import attend_tokens
from sparda_compile.kernels.select_tokens import select_tokens
from sparda_compile.registry import forecast_rule
from sparda_compile.runtime.staging import empty_staging
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.base import empty_summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = [
    "Reading",
    "heads_of",
    "read",
    "read_ahead",
    "read_selected",
    "rotate",
    "rotated",
    "widened",
]

_PARTS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class Reading:
    """A haystack that was read: keys and values by layer, [B, G, T, D] each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """T, tokens that were read."""
        return self.keys[0].shape[2]

    def before(self, num_tokens: int) -> Reading:
        """Return the reading of the first tokens alone; nothing is copied."""
        keys, values = (
            tuple(each[:, :, :num_tokens] for each in part) for part in (self.keys, self.values)
        )
        return Reading(keys, values)

    @classmethod
    def of(cls, past: Any) -> Reading:
        """Return what a DynamicCache of transformers holds; nothing is copied."""
        return cls(tuple(x.keys for x in past.layers), tuple(x.values for x in past.layers))


@torch.no_grad()
def read(model: Any, ids_BT: Tensor) -> Reading:
    """Read tokens densely.

    Args:
        model: A causal LM of transformers built like Llama, Mistral without a window, Qwen2 or
            Qwen3, in eval mode, on any device.
        ids_BT: [B, T] int64 tokens without padding.

    Raises:
        UnsupportedInputError: If the model is not built like Llama.
    """
    _check_model(model)
    return Reading.of(cache_of(model.model(ids_BT, use_cache=True)))


@torch.no_grad()
def read_ahead(model: Any, ids_BT: Tensor, length: int) -> tuple[Reading, Tensor]:
    """Read all tokens densely, and keep what `read` keeps of the first ones.

    Args:
        model: As for `read`.
        ids_BT: [B, T] int64 tokens without padding.
        length: Tokens to keep, fewer than T.

    Returns:
        The reading, and the logits [B, T - length, vocabulary] of the others, float32.

    Raises:
        UnsupportedInputError: If the model is not built like Llama.
    """
    _check_model(model)
    output = model(ids_BT, use_cache=True, logits_to_keep=ids_BT.shape[1] - length)
    reading = Reading.of(cache_of(output))
    parts = ([part[:, :, :length] for part in parts] for parts in (reading.keys, reading.values))
    return Reading(*map(tuple, parts)), output.logits.float()


@torch.no_grad()
def read_selected(
    model: Any,
    ids_BT: Tensor,
    config: SpardaConfig,
    *,
    forecast: Mapping[int, Tensor] | None = None,
) -> Reading:
    """Read tokens as a sparse prefill does: each by the blocks that it selects.

    Args:
        model: As for `read`.
        ids_BT: [B, T] int64 tokens without padding.
        config: Mode, selector, budget and sizes; not mode `dense`.
        forecast: By target layer, as for `optimize`; mode `forecast` needs it.

    Raises:
        UnsupportedInputError: If the model is not built like Llama.
    """
    _check_model(model)
    reader = _Reader(ids_BT, config, forecast or {})
    body = model.model
    x_BTC = body.embed_tokens(ids_BT)
    position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
    rotation = body.rotary_emb(x_BTC, position_BT)
    keys_values: list[tuple[Tensor, Tensor]] = []
    before_BTC: Tensor | None = None
    for number, layer in enumerate(body.layers):
        hidden_BTC = layer.input_layernorm(x_BTC)
        attention = layer.self_attn
        made = _keys_values(attention, hidden_BTC, rotation)
        keys_values.append(made)
        out_BTC = reader.attend(number, attention, hidden_BTC, before_BTC, rotation, made)
        x_BTC = x_BTC + attention.o_proj(out_BTC)
        x_BTC = x_BTC + layer.mlp(layer.post_attention_layernorm(x_BTC))
        before_BTC = hidden_BTC
    return Reading(*(tuple(parts) for parts in zip(*keys_values, strict=True)))


class _Reader:
    """What selects, and attends to, the blocks of all tokens of a layer."""

    def __init__(
        self, ids_BT: Tensor, config: SpardaConfig, forecast: Mapping[int, Tensor]
    ) -> None:
        self.config = following_weights(config, forecast)
        self.forecast = projections_of(forecast)
        blocks = round_up(ids_BT.shape[1], config.block_size) // config.block_size
        self.geometry = Geometry.of(config, blocks)
        self.mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        self.none_B = torch.zeros(len(ids_BT), dtype=torch.int32, device=ids_BT.device)
        self.tokens = number_tokens(self.mask_BT, self.none_B)

    def attend(
        self,
        number: int,
        attention: Any,
        hidden_BTC: Tensor,
        before_BTC: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        keys_values: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the output of a layer's attention, [B, T, H * D]."""
        k_BGTD, v_BGTD = keys_values
        width = k_BGTD.shape[-1]
        q_BHTD = widened(width, rotated(attention, "q", hidden_BTC, rotation), 1.0)
        query, selector = q_BHTD, self.config.prefill_selector or self.config.selector
        if self.config.mode == "forecast":
            source_BTC = hidden_BTC if before_BTC is None else before_BTC
            projected = self.forecast[number].to(source_BTC)(source_BTC)
            query = widened(width, rotate(heads_of(attention, projected), rotation), 1.0)
            selector = forecast_rule(selector, self.config.heads_of_forecast)
        ids_BGTK = self._select(query, k_BGTD, selector, attention.scaling)
        out_BHTD = self._attend(q_BHTD, k_BGTD, v_BGTD, ids_BGTK, attention.scaling)
        return out_BHTD[..., : attention.head_dim].transpose(1, 2).flatten(2)

    def _attend(
        self, query: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, ids_BGTK: Tensor, scale: float
    ) -> Tensor:
        """Attend as a prompt's program does behind an empty cache, which has no page."""
        batch, groups, _, dim = k_BGTD.shape
        size, blocks = self.geometry.block_size, self.geometry.num_blocks
        pages = k_BGTD.new_zeros(batch, groups, 1, 2, size, dim)
        table_BGN = ids_BGTK.new_full((batch, groups, blocks), -1)
        staging, slots = empty_staging(ids_BGTK, pages, table_BGN, 0)
        out_BHTD: Tensor = attend_tokens(
            query,
            k_BGTD,
            v_BGTD,
            ids_BGTK,
            self.tokens,
            self.none_B,
            staging,
            slots,
            pages,
            table_BGN,
            scale,
            0.0,
        )
        return out_BHTD

    def _select(self, query: Tensor, k_BGTD: Tensor, selector: str, scale: float) -> Tensor:
        geometry, config = self.geometry, self.config
        summary = SELECTORS[selector].summary
        tensors = empty_summary(summary, k_BGTD, geometry)
        summary.extend(tensors, k_BGTD, self.none_B, self.mask_BT, geometry)
        ids_BGTK: Tensor = select_tokens(
            query,
            tensors,
            self.tokens[0],
            self.none_B,
            0,
            selector,
            scale,
            geometry.num_blocks,
            geometry.block_size,
            geometry.pool_size,
            geometry.pool_stride,
            config.num_selected(geometry.num_blocks),
            config.sink_blocks,
            config.local_blocks,
            geometry.short_list,
            num_candidates=config.num_candidates(geometry.num_blocks),
        )
        return ids_BGTK


def _keys_values(
    attention: Any, hidden_BTC: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return keys and values as a cache holds them, with a retention score if there is one."""
    v_BGTD = heads_of(attention, attention.v_proj(hidden_BTC))
    k_BGTD = rotated(attention, "k", hidden_BTC, rotation)
    if not hasattr(attention, "retention"):
        return k_BGTD, v_BGTD
    retention_BGT1 = attention.retention(v_BGTD)[..., None]
    width = k_BGTD.shape[-1] + 1
    return widened(width, k_BGTD, retention_BGT1 / attention.scaling), widened(width, v_BGTD, 0.0)


def _check_model(model: Any) -> None:
    layers = getattr(getattr(model, "model", None), "layers", None)
    attention = getattr(layers[0], "self_attn", None) if layers is not None else None
    windowed = getattr(getattr(model, "config", None), "sliding_window", None)
    if attention is None or windowed or not all(hasattr(attention, part) for part in _PARTS):
        raise UnsupportedInputError(
            f"{type(model).__name__} cannot be evaluated offline: that takes a model with "
            "model.layers, separate q_proj, k_proj, v_proj and o_proj, and no sliding window, "
            "such as Llama, Qwen2 or Qwen3. Run it through optimize() instead."
        )


def widened(width: int, heads_BHTD: Tensor, last: Tensor | float) -> Tensor:
    """Return heads in the width of the model's keys, with `last` in the last channel."""
    missing = width - heads_BHTD.shape[-1]
    if not missing:
        return heads_BHTD
    wide = F.pad(heads_BHTD, (0, missing))
    wide[..., -1:] = last
    return wide


def heads_of(attention: Any, projected_BTC: Tensor) -> Tensor:
    """Return [B, heads, T, D]."""
    heads: Tensor = projected_BTC.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return heads


def rotated(
    attention: Any, part: str, hidden_BTC: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the query or the key as attention sees it, [B, heads, T, D]."""
    heads = heads_of(attention, getattr(attention, f"{part}_proj")(hidden_BTC))
    norm = getattr(attention, f"{part}_norm", None)
    return rotate(heads if norm is None else norm(heads), rotation)


def rotate(heads_BHTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Return heads turned by the angles of their positions, [B, heads, T, D]."""
    cos_BTD, sin_BTD = rotation
    left, right = heads_BHTD.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    rotated: Tensor = heads_BHTD * cos_BTD[:, None] + turned * sin_BTD[:, None]
    return rotated
