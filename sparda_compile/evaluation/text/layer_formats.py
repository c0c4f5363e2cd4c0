"""Which layer stands which format of full blocks: measured on texts, one layer at a time.

    cost(l, f) = mean KL of the model's predictions from those with the full blocks of layer l in f

The model itself reads a prompt, full blocks of its keys and values are rounded, and it predicts the
text that follows, all tokens in one call. Nothing is selected: this is what rounding costs alone.

A mix begins with all layers as the model's. Step by step one layer takes a smaller format, where
most bytes are saved for each nat that is added, as long as the costs add up to the limit. Costs of
layers are no sum, so the mix is measured as a whole; while that is above the limit, the layer with
the largest cost goes one step back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.scripts import Scored, dense_reading
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.evaluation.text.scripts import Reading, Script

__all__ = ["FormatMix", "FormatTrial", "MixCost", "choose"]


@dataclasses.dataclass(frozen=True)
class MixCost:
    """What some formats of layers cost.

    Attributes:
        kl: Mean divergence of a prediction from the model's own, nats.
        ratio: Perplexity of the text over that of the model itself.
        same: Share of predictions whose likeliest token is the model's.
    """

    kl: float
    ratio: float
    same: float


@dataclasses.dataclass(frozen=True)
class FormatMix:
    """What was found.

    Attributes:
        costs: Mean KL by layer and format, each alone.
        formats: Format of each layer; those that keep the model's are not named.
        cost: Of all of them together.
        bytes_share: Bytes of a block over those of the model's dtype, mean over layers.
    """

    costs: dict[int, dict[str, float]]
    formats: dict[int, str]
    cost: MixCost
    bytes_share: float


class FormatTrial:
    """Runs a model on texts whose past is rounded.

    Args:
        model: A causal LM of transformers in eval mode.
        scripts: Samples: a prompt, and tokens that are predicted behind it.
        block_size: P.
    """

    def __init__(self, model: Any, scripts: Sequence[Script], block_size: int) -> None:
        self._model, self._scripts, self._size = model, scripts, block_size
        self._readings: list[Reading] = [dense_reading(model, s.parts) for s in scripts]
        self._nll = self._sums({})[0]

    @property
    def layers(self) -> list[int]:
        """Layers that keep all tokens of a prompt, and so have blocks."""
        num_tokens = self._scripts[0].parts[0].ids_BT.shape[1]
        kept = enumerate(self._readings[0].keys_values)
        return [layer for layer, (keys, _) in kept if keys.shape[2] == num_tokens]

    def num_bytes(self, layer: int, kv_format: str) -> int:
        """Return the bytes of a block of a layer."""
        keys, _ = self._readings[0].keys_values[layer]
        return int(KV_FORMATS[kv_format].num_bytes(self._size, keys.shape[3], keys.dtype))

    def measure(self, formats: Mapping[int, str]) -> MixCost:
        """Return what formats of some layers cost; the others are as the model's."""
        nll, kl, same = self._sums(formats)
        return MixCost(kl, math.exp(nll - self._nll), same)

    @torch.no_grad()
    def _sums(self, formats: Mapping[int, str]) -> tuple[float, float, float]:
        """Return means over all predictions: their NLL, KL and share of equal choices."""
        scored = [
            each
            for script, reading in zip(self._scripts, self._readings, strict=True)
            for each in self._scored(script, reading, formats)
        ]
        total = sum(each.tokens for each in scored)
        sums = (sum(getattr(each, name) for each in scored) for name in ("nll", "kl", "same"))
        nll, kl, same = (each / total for each in sums)
        return nll, kl, same

    def _scored(self, script: Script, reading: Reading, formats: Mapping[int, str]) -> list[Scored]:
        steps = script.parts[1]
        assert steps.targets_BA is not None
        past = DynamicCache(
            [
                self._rounded(pair, formats.get(layer, "model"))
                for layer, pair in enumerate(reading.keys_values)
            ]
        )
        ids_BT, named = steps.ids_BT.to(self._model.device), {CACHE_NAME: past}
        count = steps.targets_BA.shape[1]
        logits = self._model(ids_BT, use_cache=True, logits_to_keep=count, **named).logits.float()
        return Scored.of(logits, reading.logits[0], steps.targets_BA.to(logits.device))

    def _rounded(self, pair: tuple[Tensor, Tensor], kv_format: str) -> tuple[Tensor, Tensor]:
        keys, values = (part.clone() for part in pair)
        full = keys.shape[2] // self._size * self._size
        if kv_format != "model" and full:
            parts = [part[:, :, :full].unflatten(2, (-1, self._size)) for part in (keys, values)]
            read = KV_FORMATS[kv_format].rounded(torch.stack(parts, 3))
            for part, new in zip((keys, values), read.unbind(3), strict=True):
                part[:, :, :full] = new.flatten(2, 3)
        return keys, values


def choose(
    trial: FormatTrial, names: Sequence[str], limit: float, say: Callable[[str], None]
) -> FormatMix:
    """Return the smallest mix of formats that costs no more than a limit.

    Args:
        trial: Where it is measured.
        names: Formats that round, to choose from.
        limit: Mean KL, nats.
        say: Told what is being done.

    Raises:
        ConfigError: If the limit is no positive number.
    """
    if not 0.0 < limit < math.inf:
        raise ConfigError(f"limit={limit} is no divergence to allow; use nats above 0, as 0.01.")
    layers, costs = trial.layers, dict[int, dict[str, float]]()
    for layer in layers:
        say(f"layer {layer} of {len(layers)}: {', '.join(names)}")
        costs[layer] = {name: trial.measure({layer: name}).kl for name in names}
    num_bytes = {
        layer: {name: trial.num_bytes(layer, name) for name in ("model", *names)}
        for layer in layers
    }
    formats = _smallest(costs, num_bytes, limit)
    cost = trial.measure(formats) if formats else MixCost(0.0, 1.0, 1.0)
    while formats and cost.kl > limit:
        say(f"{len(formats)} layers cost {cost.kl:.4f} nats together: one goes back")
        worst = max(formats, key=lambda layer: costs[layer][formats[layer]])
        _go_back(formats, worst, costs, num_bytes)
        cost = trial.measure(formats) if formats else MixCost(0.0, 1.0, 1.0)
    shares = [num_bytes[n][formats.get(n, "model")] / num_bytes[n]["model"] for n in layers]
    return FormatMix(costs, dict(sorted(formats.items())), cost, sum(shares) / len(shares))


def _smallest(
    costs: Mapping[int, Mapping[str, float]],
    num_bytes: Mapping[int, Mapping[str, int]],
    limit: float,
) -> dict[int, str]:
    formats: dict[int, str] = {}
    spent = 0.0
    while True:
        steps = []
        for layer, by_name in costs.items():
            now = formats.get(layer, "model")
            for name, cost in by_name.items():
                saved = num_bytes[layer][now] - num_bytes[layer][name]
                added = cost - by_name.get(now, 0.0)
                if saved > 0 and spent + added <= limit:
                    steps.append((saved / max(added, 1e-12), layer, name, added))
        if not steps:
            return formats
        _, layer, name, added = max(steps)
        formats[layer] = name
        spent += added


def _go_back(
    formats: dict[int, str],
    layer: int,
    costs: Mapping[int, Mapping[str, float]],
    num_bytes: Mapping[int, Mapping[str, int]],
) -> None:
    """Give a layer the next larger format that costs less, or the model's."""
    now = formats.pop(layer)
    larger = [
        name
        for name, cost in costs[layer].items()
        if cost < costs[layer][now] and num_bytes[layer][name] > num_bytes[layer][now]
    ]
    if larger:
        formats[layer] = min(larger, key=lambda name: num_bytes[layer][name])
