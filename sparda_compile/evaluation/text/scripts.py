"""Scripts: which tokens a module is fed, in which calls, and which of its predictions count.

    read   many tokens in one call, as a user's turn is; nothing that it predicts counts
    steps  one token a call, as an answer is written; the last predictions count

A script begins with a read part and may have any number of both. Steps are fed with the script's
own tokens whatever is predicted. So an answer counts as right if each of its tokens is the
likeliest where it stands, which is when greedy decoding would have written it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.config import round_up
from sparda_compile.evaluation.metrics import kl_divergence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.module.optimized import OptimizedModule

__all__ = ["Part", "Reading", "Scored", "Script", "dense_reading", "module_logits", "stack"]


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens of one script or of several alike.

    Attributes:
        ids_BT: [B, T] int64 tokens to feed.
        targets_BA: [B, A] int64: what the last A steps are to predict; None for a read part.
    """

    ids_BT: Tensor
    targets_BA: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Script:
    """What one sample makes a module do.

    Attributes:
        name: Of the sample: a document, a trial or a conversation.
        parts: In order; the first one is a read part.
        labels: What each steps part is about: a depth, a question.
    """

    name: str
    parts: tuple[Part, ...]
    labels: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts."""
        return sum(part.ids_BT.shape[1] for part in self.parts)

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """Fed and scored tokens of each part; scripts of one shape can run side by side."""
        scored = [0 if p.targets_BA is None else p.targets_BA.shape[1] for p in self.parts]
        return tuple((p.ids_BT.shape[1], n) for p, n in zip(self.parts, scored, strict=True))

    @property
    def digest(self) -> str:
        """Return what tells it from other scripts: a hash of all tokens."""
        found = hashlib.sha256()
        for part in self.parts:
            targets = [] if part.targets_BA is None else part.targets_BA.tolist()
            found.update(f"{part.ids_BT.tolist()} {targets}\n".encode())
        return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the model itself made of a script.

    Attributes:
        keys_values: Of the first part, [B, G, T, D] each, by layer.
        logits: [B, A, vocabulary] float32 of each steps part: those that count.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    logits: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Sums over the predictions of one steps part of one sample.

    Attributes:
        tokens: Predictions.
        nll: Negative log-likelihood of the right tokens, nats.
        kl: KL divergence of the dense model's prediction from this one, nats.
        same: Predictions whose likeliest token is the dense model's.
        is_right: Whether the likeliest tokens are all right.
    """

    tokens: int
    nll: float
    kl: float
    same: int
    is_right: bool

    @classmethod
    def of(cls, logits_BAV: Tensor, dense_BAV: Tensor, targets_BA: Tensor) -> list[Scored]:
        """Score predictions against what is right and what the dense model predicts, by sample."""
        logs_BAV = logits_BAV.float().log_softmax(-1)
        nll_B = -logs_BAV.gather(-1, targets_BA[..., None])[..., 0].double().sum(1)
        kl_B = kl_divergence(dense_BAV, logits_BAV).double().sum(1)
        best_BA = logits_BAV.argmax(-1)
        same_B = (best_BA == dense_BAV.argmax(-1)).sum(1)
        right_B = (best_BA == targets_BA).all(1)
        rows = zip(nll_B.tolist(), kl_B.tolist(), same_B.tolist(), right_B.tolist(), strict=True)
        return [cls(targets_BA.shape[1], *row) for row in rows]


def stack(scripts: Sequence[Script]) -> tuple[Part, ...]:
    """Return the parts of scripts of one shape, side by side."""
    parts = []
    for same in zip(*(script.parts for script in scripts), strict=True):
        targets = [part.targets_BA for part in same if part.targets_BA is not None]
        ids_BT = torch.cat([part.ids_BT for part in same])
        parts.append(Part(ids_BT, torch.cat(targets) if targets else None))
    return tuple(parts)


@torch.no_grad()
def dense_reading(model: Any, parts: Sequence[Part]) -> Reading:
    """Run parts through the model itself; steps are one call, as their tokens are known.

    Args:
        model: A causal LM of transformers.
        parts: On any device.
    """
    device = next(model.parameters()).device
    past: Any = DynamicCache()
    logits = []
    named: dict[str, Any] = {CACHE_NAME: past}
    keys_values: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        count = 1 if part.targets_BA is None else part.targets_BA.shape[1]
        out = model(part.ids_BT.to(device), use_cache=True, logits_to_keep=count, **named)
        if not keys_values:
            keys_values = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
        if part.targets_BA is not None:
            logits.append(out.logits.float())
    return Reading(keys_values, logits)


@torch.no_grad()
def module_logits(
    module: OptimizedModule, parts: Sequence[Part], reading: Reading | None
) -> list[Tensor]:
    """Run parts through an optimized module, on one cache.

    Args:
        module: What `optimize` returned.
        parts: On any device.
        reading: What the model made of them: the first part is not read again. None lets the
            module read it, as a sparse prompt needs it.

    Returns:
        [B, A, vocabulary] float32 of each steps part: those that count.
    """
    device = module.device
    size = module.sparda_config.block_size
    room = round_up(sum(part.ids_BT.shape[1] for part in parts), size)
    past = None
    if reading is not None:
        past = DynamicCache(
            [(keys.clone(), values.clone()) for keys, values in reading.keys_values]
        )
    named: dict[str, Any] = {CACHE_NAME: module.new_cache(room, past=past)}
    logits = []
    for part in parts[0 if reading is None else 1 :]:
        ids_BT = part.ids_BT.to(device)
        if part.targets_BA is None:
            module(ids_BT, logits_to_keep=1, **named)
            continue
        steps = [module(ids_B1, **named).logits[:, -1].float() for ids_B1 in ids_BT.split(1, dim=1)]
        logits.append(torch.stack(steps[-part.targets_BA.shape[1] :], dim=1))
    return logits
