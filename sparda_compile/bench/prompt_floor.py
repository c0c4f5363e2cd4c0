"""What a prompt cannot be read faster than, and what a quadratic law says of longer ones.

    linear      2 FLOP for each weight of a linear layer and token, and the logits of one token
    attention   4 FLOP for each channel of a query head and key that it reads
    select      2 FLOP for each channel of a query head and pooled key, twice for a softmax; of a
                query head and the low-bit key of every token, once, or of those of candidates, and
                of a group's mean query and those of all; of that and the two bounds of a block
    d2h         the bytes of keys and values, which go to CPU memory once

The first three take turns on the same matrix units, so their times add up, at the rate of one large
matrix product. A copy runs beside them. So the floor is the longer of the sum and the copy. It
leaves out norms, rotations, the choice of blocks and all waits.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparda_compile.bench.decode import memcpy_gbps
from sparda_compile.bench.memory import dense_kv_bytes
from sparda_compile.bench.prompt_programs import BACKENDS, OURS
from sparda_compile.bench.timing import matmul_tflops
from sparda_compile.kernels.asked import SOFTMAX
from sparda_compile.registry import SELECTORS, forecast_rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from sparda_compile.bench.shapes import ModelShape
    from sparda_compile.config import SpardaConfig

__all__ = ["Rates", "fit_law", "prompt_floor"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """What this GPU does at best.

    Attributes:
        tflops: A large matrix product in bf16, 10^12 FLOP per second.
        d2h_gbps: One large copy to pinned memory, 10^9 bytes per second.
    """

    tflops: float
    d2h_gbps: float

    @classmethod
    def measure(cls, device: torch.device) -> Rates:
        """Measure a CUDA device."""
        return cls(matmul_tflops(device), round(memcpy_gbps(to_host=True), 2))


def prompt_floor(
    shape: ModelShape, name: str, config: SpardaConfig, num_tokens: int, rates: Rates
) -> dict[str, float]:
    """Return the seconds that reading a prompt takes at least.

    Args:
        shape: The model's sizes.
        name: A program of `OURS` or `BACKENDS`.
        config: Of ours; how many blocks a token reads, and who selects them.
        num_tokens: Of the prompt.
        rates: Of the GPU.

    Returns:
        `linear`, `attention`, `select`, `d2h`, and `total`.
    """
    is_sparse = name in OURS and OURS[name]["prefill"] == "sparse"
    begins = config.selection_starts_at if is_sparse else None
    heads = shape.num_heads * shape.head_dim
    keys = shape.num_groups * shape.head_dim
    per_layer = shape.hidden * (2 * heads + 2 * keys + 3 * shape.ffn)
    linear = 2.0 * (num_tokens * shape.num_layers * per_layer + shape.hidden * shape.vocabulary)
    most = num_tokens if begins is None else begins - 1
    attention = 4.0 * heads * shape.num_layers * _keys_read(num_tokens, most)
    flop = {"linear": linear, "attention": attention, "select": 0.0}
    if begins is not None and num_tokens >= begins:
        flop["select"] = shape.num_layers * num_tokens * _score_flop(shape, config, num_tokens / 2)
    seconds = {part: value / rates.tflops / 1e12 for part, value in flop.items()}
    compute = sum(seconds.values())
    stays = name in BACKENDS or config.offload == "never"
    num_bytes = 0 if stays else dense_kv_bytes(shape, 1, num_tokens)
    seconds["d2h"] = num_bytes / rates.d2h_gbps / 1e9
    return {**seconds, "total": max(compute, seconds["d2h"])}


def _score_flop(shape: ModelShape, config: SpardaConfig, seen: float) -> float:
    """Return the FLOP of one layer in which one token scores all that it has seen."""
    name, heads = config.prefill_selector or config.selector, shape.num_heads
    if config.mode == "forecast":
        name = forecast_rule(name, config.heads_of_forecast)
        heads = shape.num_groups * config.heads_of_forecast
    per_head = 2.0 * shape.head_dim * seen
    if SELECTORS[name].scores_tokens:
        share = config.num_candidates(1 << 62) * config.block_size / seen
        if 0 < share < 1:
            return (shape.num_groups + share * heads) * per_head
        return heads * per_head
    if name == "quest":
        return 2 * shape.num_groups * per_head / config.block_size
    return (2 if name in SOFTMAX else 1) * heads * per_head / config.pool_stride


def _keys_read(num_tokens: int, most: int) -> float:
    """Return the keys that all tokens of a prompt read, each those before it up to a number."""
    few = min(num_tokens, most)
    return few * (few + 1) / 2 + (num_tokens - few) * most


def fit_law(seconds: Mapping[int, float]) -> dict[str, Any] | None:
    """Fit seconds = linear * tokens + quadratic * tokens^2, neither below zero.

    Args:
        seconds: By tokens of a prompt, as measured. Least squares: the longest ones decide.

    Returns:
        `linear`, `quadratic` and the lengths that it was `fitted_to`; None for fewer than two.
    """
    if len(seconds) < 2:
        return None
    points = sorted(seconds.items())
    s2, s3, s4 = (sum(float(n) ** power for n, _ in points) for power in (2, 3, 4))
    t1, t2 = (sum(t * float(n) ** power for n, t in points) for power in (1, 2))
    determinant = s2 * s4 - s3 * s3
    linear = (t1 * s4 - t2 * s3) / determinant
    quadratic = (t2 * s2 - t1 * s3) / determinant
    if quadratic < 0:
        linear, quadratic = t1 / s2, 0.0
    elif linear < 0:
        linear, quadratic = 0.0, t2 / s4
    return {"linear": linear, "quadratic": quadratic, "fitted_to": [n for n, _ in points]}
