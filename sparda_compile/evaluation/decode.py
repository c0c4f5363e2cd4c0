"""Decoding as the modes define it, in plain PyTorch, with everything on record that they decide.

The haystack was read before (`reading.py`). Each later token is a decode step: every layer
picks its blocks by the configuration's mode and selector and attends to those alone. What other
predictors would have picked, and where the layer's attention really goes, is recorded beside it.
In a `kv_format` that rounds, a block is rounded when it is full, and read exactly until then; what
chooses blocks has its keys unrounded.

For models built like Llama, on any device; their keys may carry a retention score, as selector
`nosa` needs: then they are wider than a head, and `self_attn.retention(values)` gives the score.
Nothing is captured or compiled: this says what is computed, not how fast.

Legend: B sequences, S steps, H query heads, G groups, E heads of a Forecast, D head dim, N blocks,
T tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from sparda_compile.config import round_up
from sparda_compile.errors import ConfigError, UnsupportedInputError
from sparda_compile.evaluation.early_reads import EarlyReads, reads_early
from sparda_compile.evaluation.guesses import block_mask
from sparda_compile.evaluation.reading import Reading, heads_of, rotate, rotated, widened
from sparda_compile.forecast.weights import following_weights, projections_of
from sparda_compile.formats.base import format_of
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.base import empty_summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparda_compile.config import SpardaConfig
    from sparda_compile.evaluation.guesses import GuessSums

__all__ = ["PREDICTORS", "Decoded", "LayerRecord", "decode"]

PREDICTORS: Final = ("forecast", "previous_layer", "previous_step", "next_query")


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What one layer did in one step. All are [B, G, N], masks are bool.

    Attributes:
        mass_BGN: Share of the layer's attention that falls on each block if all are read, mean of
            the group's heads, float32.
        forced_BGN: Sink, local and current blocks: read whatever the scores are.
        read_BGN: Blocks that the layer read.
        chosen: By `query` and the predictors that had something to go by: the blocks that each
            would read at the budget of the configuration, forced ones included.
    """

    mass_BGN: Tensor
    forced_BGN: Tensor
    read_BGN: Tensor
    chosen: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Logits [B, S, vocabulary] float32 of the steps, and records by step and layer."""

    logits_BSV: Tensor
    records: list[list[LayerRecord]]


@torch.no_grad()
def decode(
    model: Any,
    reading: Reading,
    ids_BS: Tensor,
    config: SpardaConfig,
    *,
    forecast: Mapping[int, Tensor] | None = None,
    guesses: GuessSums | None = None,
    num_ahead: int = 0,
) -> Decoded:
    """Feed tokens one by one behind a reading, as a mode does.

    Args:
        model: The model of the reading.
        reading: What `read` returned; it is left as it is.
        ids_BS: [B, S] int64 tokens, one for each step.
        config: Mode, selector, budget and sizes; `exact` and `speculate` decide what `query` does,
            but for `repair="union"`, which reads what was predicted too.
        forecast: By target layer, as for `optimize`. Mode `forecast` needs it; given in other modes
            it is recorded as a predictor.
        guesses: Counts what predictors guess of each step.
        num_ahead: Steps that read all blocks and are not returned: the last tokens of a dense
            prompt, with which predictions begin.

    Raises:
        ConfigError: If there is no step, or the Forecast is needed and missing.
        UnsupportedInputError: If selector `nosa` is given a model without retention scores.
    """
    if ids_BS.shape[1] <= num_ahead:
        raise ConfigError("there is no token to decode; pass one for each step.")
    if config.mode == "forecast" and not forecast:
        raise ConfigError(
            "mode='forecast' needs Forecast weights; pass forecast, or use mode='query'."
        )
    _check_retention(model, reading, config)
    config = following_weights(config, forecast)
    decoder = _Decoder(model, reading, ids_BS.shape[1], config, forecast or {}, guesses)
    logits, records = [], []
    for number, ids_B1 in enumerate(ids_BS.split(1, dim=1)):
        logits_BV, layers = decoder.step(ids_B1, reads_all=number < num_ahead)
        if number >= num_ahead:
            logits.append(logits_BV)
            records.append(layers)
    return Decoded(torch.stack(logits, dim=1), records)


def _check_retention(model: Any, reading: Reading, config: SpardaConfig) -> None:
    attention = model.model.layers[0].self_attn
    is_wider = reading.keys[0].shape[-1] > attention.head_dim
    if is_wider != hasattr(attention, "retention"):
        raise UnsupportedInputError(
            f"{type(model).__name__} cannot be evaluated offline: keys wider than a head and "
            "self_attn.retention, which gives their last channel, go together. Run it through "
            "optimize() instead."
        )
    if config.selector == "nosa" and not is_wider:
        raise UnsupportedInputError(
            f"selector='nosa' needs keys that carry a retention score, and those of "
            f"{type(model).__name__} do not; use selector='infllm2' or 'quest'."
        )


class _Decoder:
    """A model, the keys and values that it has seen, and the choices of the step before."""

    def __init__(
        self,
        model: Any,
        reading: Reading,
        num_steps: int,
        config: SpardaConfig,
        forecast: Mapping[int, Tensor],
        guesses: GuessSums | None,
    ) -> None:
        self.model, self.config = model, config
        self.guesses = guesses
        if guesses is not None:
            guesses.begin()
        self.forecast = projections_of(forecast)
        capacity = round_up(reading.length + num_steps, config.block_size)
        self.geometry = Geometry.of(config, capacity // config.block_size)
        self.width = reading.keys[0].shape[-1]
        self.budget = config.replace(mode="query").num_selected(self.geometry.num_blocks)
        self.length = reading.length
        room = (0, 0, 0, capacity - reading.length)
        self.keys = [F.pad(keys, room) for keys in reading.keys]
        self.values = [F.pad(values, room) for values in reading.values]
        self.summaries = [self._summarize(keys) for keys in reading.keys]
        self._round(0, reading.length // config.block_size)
        self.last_choice: dict[int, Tensor] = {}
        is_early = reads_early(config)
        # By layer: queries of steps that read everything, and the tokens before each.
        self.asked: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.early = EarlyReads(config, self.geometry.num_blocks) if is_early else None

    def step(self, ids_B1: Tensor, *, reads_all: bool = False) -> tuple[Tensor, list[LayerRecord]]:
        """Run one token; return its logits [B, vocabulary] and the record of each layer."""
        body = self.model.model
        x_B1C = body.embed_tokens(ids_B1)
        rotation = body.rotary_emb(x_B1C, torch.full_like(ids_B1, self.length))
        before: tuple[Tensor, Tensor] | None = None
        records = []
        for number, layer in enumerate(body.layers):
            hidden_B1C = layer.input_layernorm(x_B1C)
            attention = layer.self_attn
            q_BH1D = widened(self.width, rotated(attention, "q", hidden_B1C, rotation), 1.0)
            chosen = self._choices(number, q_BH1D, hidden_B1C, rotation, before)
            early_BGN = None
            if reads_all:
                self.asked.setdefault(number, []).append((q_BH1D, self._lengths(q_BH1D)))
            elif self.early is not None:
                early_BGN = self._early(number, q_BH1D, attention.scaling)
            # Scores know the keys of earlier tokens only; attention also reads the token's own.
            v_BG1D = heads_of(attention, attention.v_proj(hidden_B1C))
            k_BG1D = rotated(attention, "k", hidden_B1C, rotation)
            if self.width > k_BG1D.shape[-1]:
                retention_BG11 = attention.retention(v_BG1D)[..., None]
                k_BG1D = widened(self.width, k_BG1D, retention_BG11 / attention.scaling)
            self._append(number, k_BG1D, widened(self.width, v_BG1D, 0.0))
            exists_N, forced_N = self._existing()
            shape = chosen["query"].shape
            read_BGN = exists_N.expand(shape)
            if self.config.mode != "dense" and not reads_all:
                read_BGN = chosen["forecast" if self.config.mode == "forecast" else "query"]
            if early_BGN is not None:
                read_BGN = read_BGN | early_BGN
            out_BH1D, mass_BGN = self._attend(number, q_BH1D, read_BGN, attention.scaling)
            records.append(LayerRecord(mass_BGN, forced_N.expand(shape), read_BGN, chosen))
            out_BH1D = out_BH1D[..., : attention.head_dim]
            x_B1C = x_B1C + attention.o_proj(out_BH1D.transpose(1, 2).flatten(2))
            x_B1C = x_B1C + layer.mlp(layer.post_attention_layernorm(x_B1C))
            before = hidden_B1C, chosen["query"]
        full = self.length // self.config.block_size
        self.length += 1
        self._round(full, self.length // self.config.block_size)
        logits: Tensor = self.model.lm_head(body.norm(x_B1C))[:, 0].float()
        return logits, records

    def _choices(
        self,
        number: int,
        q_BH1D: Tensor,
        hidden_B1C: Tensor,
        rotation: tuple[Tensor, Tensor],
        before: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Return the blocks that the query and each predictor choose for a layer, [B, G, N]."""
        attention = self.model.model.layers[number].self_attn
        scale = attention.scaling
        scores = {"query": self._score(number, self.config.selector, q_BH1D, scale)}
        source_B1C = hidden_B1C if before is None else before[0]
        if number in self.forecast:
            projection = self.forecast[number].to(source_B1C)
            f_BE1D = rotate(heads_of(attention, projection(source_B1C)), rotation)
            rule = self.config.forecast_selector
            scores["forecast"] = self._score(number, rule, widened(self.width, f_BE1D, 1.0), scale)
        if before is not None:
            next_BH1D = widened(self.width, rotated(attention, "q", source_B1C, rotation), 1.0)
            scores["next_query"] = self._score(number, self.config.selector, next_BH1D, scale)
        lengths_B = self._lengths(q_BH1D)
        config = self.config
        choice = (self.budget, config.block_size, config.sink_blocks, config.local_blocks)
        chosen = {name: block_mask(each, lengths_B, choice) for name, each in scores.items()}
        if before is not None and before[1].shape == chosen["query"].shape:
            chosen["previous_layer"] = before[1]
        if number in self.last_choice:
            # A block may have begun since: it is forced, and so is what the window still holds.
            chosen["previous_step"] = self.last_choice[number] | self._existing()[1]
        self.last_choice[number] = chosen["query"]
        if self.guesses is not None:
            self.guesses.add(number, scores, chosen["query"], lengths_B)
        return chosen

    def _early(self, number: int, q_BH1D: Tensor, scale: float) -> Tensor:
        """Return the blocks that a layer reads early, by its steps before and the prompt's end."""
        assert self.early is not None
        # Tokens of a prompt score what the summary holds when all of them are in it.
        for query, before_B in self.asked.pop(number, ()):
            scores = self._score(number, self.config.selector, query, scale, before_B)
            self.early.of(number, scores, before_B)
        lengths_B = self._lengths(q_BH1D)
        scores = self._score(number, self.config.selector, q_BH1D, scale, lengths_B)
        return self.early.of(number, scores, lengths_B)

    def _score(
        self,
        number: int,
        selector: str,
        query: Tensor,
        scale: float,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        rule = SELECTORS[selector]
        tensors = self.summaries[number][rule.summary.name]
        before_B = self._lengths(query) if lengths_B is None else lengths_B
        scores: Tensor = rule.score(query, tensors, before_B, scale, self.geometry)
        return scores

    def _existing(self) -> tuple[Tensor, Tensor]:
        """Return which blocks exist and which of them are forced, [N] each."""
        current = self.length // self.config.block_size
        block_N = torch.arange(self.geometry.num_blocks, device=self.keys[0].device)
        exists_N = block_N <= current
        is_local = block_N >= current - self.config.local_blocks
        return exists_N, exists_N & (is_local | (block_N < self.config.sink_blocks))

    def _attend(
        self, number: int, q_BH1D: Tensor, read_BGN: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, H, 1, D] over the blocks read, and the mass of all blocks."""
        keys_BGTD, values_BGTD = self.keys[number], self.values[number]
        q_BGRD = q_BH1D[:, :, 0].unflatten(1, (keys_BGTD.shape[1], -1)).float()
        logits_BGRT = q_BGRD @ keys_BGTD.float().mT * scale
        unseen_T = torch.arange(keys_BGTD.shape[2], device=keys_BGTD.device) > self.length
        logits_BGRT = logits_BGRT.masked_fill(unseen_T, float("-inf"))
        size = self.config.block_size
        mass_BGN = logits_BGRT.softmax(-1).mean(2).unflatten(-1, (-1, size)).sum(-1)
        skipped_BGT = ~read_BGN.repeat_interleave(size, dim=-1)
        weights = logits_BGRT.masked_fill(skipped_BGT[:, :, None], float("-inf")).softmax(-1)
        out_BGRD = (weights @ values_BGTD.float()).to(q_BH1D.dtype)
        return out_BGRD.flatten(1, 2)[:, :, None], mass_BGN

    def _append(self, number: int, k_BG1D: Tensor, v_BG1D: Tensor) -> None:
        self.keys[number][:, :, self.length] = k_BG1D[:, :, 0]
        self.values[number][:, :, self.length] = v_BG1D[:, :, 0]
        lengths_B = self._lengths(k_BG1D)
        for name, tensors in self.summaries[number].items():
            summary = self._rules()[name]
            summary.extend(tensors, k_BG1D, lengths_B, None, self.geometry)

    def _round(self, first: int, end: int) -> None:
        """Let some full blocks of all layers be what is read back of them."""
        size = self.config.block_size
        span = slice(first * size, end * size)
        for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            found = format_of(self.config, number)
            if first == end or not found.rounds:
                continue
            parts = [part[:, :, span].unflatten(2, (-1, size)) for part in (keys, values)]
            blocks = torch.stack(parts, 3)
            blocks = found.unpack(found.pack(blocks), size, blocks.shape[-1], blocks.dtype)
            keys[:, :, span], values[:, :, span] = (each.flatten(2, 3) for each in blocks.unbind(3))

    def _summarize(self, keys_BGTD: Tensor) -> dict[str, list[Tensor]]:
        """Return the tensors of each summary that a choice needs, for the keys of one layer."""
        batch, _, num_tokens, _ = keys_BGTD.shape
        every = torch.ones(batch, num_tokens, dtype=torch.bool, device=keys_BGTD.device)
        summaries = {}
        for name, summary in self._rules().items():
            tensors = empty_summary(summary, keys_BGTD, self.geometry)
            start_B = torch.zeros(batch, dtype=torch.int32, device=keys_BGTD.device)
            summary.extend(tensors, keys_BGTD, start_B, every, self.geometry)
            summaries[name] = tensors
        return summaries

    def _rules(self) -> dict[str, Any]:
        names = (self.config.selector, self.config.forecast_selector)
        return {SELECTORS[name].summary.name: SELECTORS[name].summary for name in names}

    def _lengths(self, like: Tensor) -> Tensor:
        return torch.full((like.shape[0],), self.length, dtype=torch.int32, device=like.device)
