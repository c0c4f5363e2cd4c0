"""What a selector is: a summary of the keys of every block, and a score against a query.

Dimensions: B batch, G groups (KV heads), H query heads, R = H / G, T new tokens, D head dim,
N blocks, W pooled windows.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from sparda_compile.registry import SELECTORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = [
    "Geometry",
    "Narrowing",
    "RowSummary",
    "Selector",
    "Summary",
    "empty_summary",
    "valid_tokens",
]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes that summaries and scores depend on.

    Attributes:
        num_blocks: N, blocks that the cache can hold.
        block_size: Tokens of one block.
        pool_size: Tokens averaged into one pooled key.
        pool_stride: Tokens between the starts of neighbouring pooled keys.
        short_list: Blocks that the query picks before something else ranks the rest; only a
            selector with a short list reads it and the two below.
        sink_blocks: First blocks, which are not on the short list.
        local_blocks: Blocks before the current one, which are not on the short list either.
    """

    num_blocks: int
    block_size: int
    pool_size: int
    pool_stride: int
    short_list: int = 0
    sink_blocks: int = 0
    local_blocks: int = 0

    @classmethod
    def of(cls, config: SpardaConfig, num_blocks: int) -> Geometry:
        """Return the sizes of a configuration for a cache of N blocks."""
        sizes = (num_blocks, config.block_size, config.pool_size, config.pool_stride)
        if not SELECTORS[config.selector].has_short_list:
            return cls(*sizes)
        return cls(*sizes, config.short_list, config.sink_blocks, config.local_blocks)

    @property
    def num_windows(self) -> int:
        """W, pooled keys that a full cache has."""
        tokens = self.num_blocks * self.block_size
        return max((tokens - self.pool_size) // self.pool_stride + 1, 1)

    @property
    def num_open_blocks(self) -> int:
        """Last full blocks of a sequence whose windows may reach into tokens to come; 1 or more."""
        return max(-(-(self.pool_size - self.pool_stride) // self.block_size), 1)


class Summary(Protocol):
    """Small tensors kept on the device that stand for all keys of a layer.

    Attributes:
        name: Its name.
        kernels: Triton kernels that take in a token in a decode step; empty where it has none.
        dtypes: Of tensors that have another dtype than the keys.
        uncounted: Tensors that scoring does not read as a whole; a plan does not count their bytes.
    """

    name: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[dict[str, torch.dtype]] = {}
    uncounted: ClassVar[frozenset[str]] = frozenset()

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor behind [B, G], by name."""

    def reset(self, tensors: Sequence[Tensor]) -> None:
        """Make the tensors stand for an empty cache."""

    def extend(
        self,
        tensors: Sequence[Tensor],
        k_BGTD: Tensor,
        lengths_B: Tensor,
        token_mask_BT: Tensor | None,
        geometry: Geometry,
    ) -> None:
        """Take in new keys, in place.

        Args:
            tensors: In the order of `shapes`; updated.
            k_BGTD: New keys, after rotation.
            lengths_B: Tokens before this step, int32.
            token_mask_BT: Which new tokens are real; None means all of them, and T is 1.
            geometry: Sizes.
        """


class RowSummary(Summary):
    """A summary that begins with zeros, and takes in a token of all sequences or a row of one."""

    def reset(self, tensors: Sequence[Tensor]) -> None:
        """Zero all; lengths say what is valid."""
        for tensor in tensors:
            tensor.zero_()

    def extend(
        self,
        tensors: Sequence[Tensor],
        k_BGTD: Tensor,
        lengths_B: Tensor,
        token_mask_BT: Tensor | None,
        geometry: Geometry,
    ) -> None:
        """Take in new keys, in place; see `Summary.extend`."""
        if token_mask_BT is None:
            self._append(tensors, k_BGTD, lengths_B, geometry)
            return
        for row, length in enumerate(lengths_B.tolist()):
            keys_GTD = valid_tokens(k_BGTD[row], token_mask_BT[row])
            self._extend_row([t[row] for t in tensors], keys_GTD, length, geometry)

    @abstractmethod
    def _append(
        self, tensors: Sequence[Tensor], k_BG1D: Tensor, lengths_B: Tensor, geometry: Geometry
    ) -> None:
        """Take in one key of each sequence."""

    @abstractmethod
    def _extend_row(
        self, tensors: Sequence[Tensor], k_GTD: Tensor, length: int, geometry: Geometry
    ) -> None:
        """Take in keys of one sequence; the tensors are its own."""


class Selector(Protocol):
    """Scores every block against a query.

    Attributes:
        name: Its name.
        kernels: Triton kernels that score in a decode step; empty where `score` itself runs.
        summary: What it scores with.
        forecast_selector: The selector that scores a Forecast of one head per group where this one
            scores a query; of more heads it is this one.
        has_short_list: Whether the query picks `SpardaConfig.short_list` blocks and something else
            ranks the rest.
        settles: Whether a block's score is made of its own windows alone, so that later keys leave
            it as it is.
        reads_retention: Whether it reads a retention score from the last channel of each key, as
            models for NOSA carry it.
        selects_prompts: Whether it selects for the tokens of a prompt on a GPU. Where it does not,
            `prefill="auto"` is dense there, and `prefill="sparse"` is refused.
        scores_tokens: Whether it multiplies a query with a key of each token, and not of windows.
        narrows: Whether it is a `Narrowing` one, and scores blocks alone that `forecast_selector`
            has proposed by the mean query of a group.
        is_comparable: Whether the scores of one step can be compared with those of another, and
            averaged; a prediction from past scores standardises others.
    """

    name: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]]
    summary: ClassVar[Summary]
    forecast_selector: ClassVar[str] = "forecast"
    has_short_list: ClassVar[bool] = False
    settles: ClassVar[bool] = False
    reads_retention: ClassVar[bool] = False
    selects_prompts: ClassVar[bool] = True
    scores_tokens: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    is_comparable: ClassVar[bool] = False

    @property
    def timed_as(self) -> str:
        """Name by which a machine knows how long its scores take."""
        return self.name

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32, higher is better, -inf for a block without a summary."""


class Narrowing(Selector, Protocol):
    """A selector that `narrows`."""

    narrows: ClassVar[bool] = True

    def score_among(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
        among_BGN: Tensor | None,
    ) -> Tensor:
        """Score some blocks as if there were no others.

        Args:
            query_BHTD: As for `score`, and so are the next ones.
            tensors: The summary.
            lengths_B: int32.
            scale: Factor on q . k.
            geometry: Sizes.
            among_BGN: bool, which blocks; None for all, which is `score`.

        Returns:
            [B, G, N] float32, -inf for other blocks, too.
        """


def empty_summary(summary: Summary, like_BGTD: Tensor, geometry: Geometry) -> list[Tensor]:
    """Return the tensors of a summary of no keys, [B, G, ...], of the dtype that such keys have."""
    batch, groups, _, dim = like_BGTD.shape
    tensors = [
        like_BGTD.new_empty(batch, groups, *shape, dtype=summary.dtypes.get(name, like_BGTD.dtype))
        for name, shape in summary.shapes(geometry, dim).items()
    ]
    summary.reset(tensors)
    return tensors


def valid_tokens(k_GTD: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return the real tokens of one sequence, [G, n, D]."""
    return k_GTD if mask_T is None else k_GTD[:, torch.where(mask_T)[0]]
