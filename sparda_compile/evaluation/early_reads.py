"""What mode `speculate` with `repair="union"` reads beside the blocks that its query selects.

    predicted   the blocks with the best level + damping * trend of the steps before, as many as the
                budget allows; the block that is being written is not among them
    levels      begin with the last tokens of the prompt, and take in the scores of each step

The same as `hints/speculation.py`, in plain PyTorch: there the attention to these blocks is kept,
whether they were selected or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.guesses import block_mask
from sparda_compile.kernels.predict_blocks import standardise, update_prediction_reference
from sparda_compile.selectors import SELECTORS

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["EarlyReads", "reads_early"]


def reads_early(config: SpardaConfig) -> bool:
    """Whether what is read depends on what was predicted.

    Raises:
        ConfigError: If it does and the prediction would be calibrated, which is not evaluated.
    """
    is_union = config.mode == "speculate" and config.repair == "union" and config.top_k is not None
    if is_union and config.ema_calibrate:
        raise ConfigError(
            "ema_calibrate=True with repair='union' is not evaluated; leave out one of the two."
        )
    return is_union


class EarlyReads:
    """Predicts the blocks of each layer, from step to step.

    Args:
        config: Of mode `speculate`.
        num_blocks: N, blocks of a sequence.
    """

    def __init__(self, config: SpardaConfig, num_blocks: int) -> None:
        self._config = config
        self._width = config.num_predicted(num_blocks)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, number: int, scores_BGN: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the blocks that a layer reads early, [B, G, N] bool, and take its scores in.

        Args:
            number: Of the layer.
            scores_BGN: Scores of its selection in this step, float32.
            lengths_B: Tokens before it, int32.
        """
        config = self._config
        never = torch.full_like(scores_BGN, float("-inf"))
        level, trend = self._kept.setdefault(number, (never, torch.zeros_like(never)))
        choice = (self._width, config.block_size, config.sink_blocks, config.local_blocks)
        best = level + config.ema_damping * trend
        block_N = torch.arange(scores_BGN.shape[-1], device=scores_BGN.device)
        current_B11 = (lengths_B.long() // config.block_size)[:, None, None]
        is_forced = (block_N < config.sink_blocks) | (block_N >= current_B11 - config.local_blocks)
        early = block_mask(best, lengths_B, choice) & (is_forced | (level > float("-inf")))
        early &= block_N < current_B11
        comparable = SELECTORS[config.selector].is_comparable
        new = scores_BGN if comparable else standardise(scores_BGN)
        update_prediction_reference(new, level, trend, (config.ema_level, config.ema_trend))
        return early
