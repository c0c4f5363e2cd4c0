"""What neighbouring tokens of a prompt share of their blocks, seen where attention unites them.

A tile of R tokens that read K blocks each walks a union of U; if each token keeps a share s of the
blocks of the one before it and takes others instead that nobody else has,

    U = K * (1 + (R - 1) * (1 - s))

so `shared` is the s of the unions that were counted.

Of random weights neighbours share little, whatever the text: from layer to layer less of the
residual stream is what the token says. `louder_tokens` makes it most of the stream, so that equal
tokens in a row select alike in every layer, as neighbours do in trained models.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["LOUDER", "Sharing", "count_unions", "louder_tokens"]

# A power of two, so that no bit is lost. At 1, four neighbours among ten equal tokens read 120
# different blocks in the first layer and 230 in the last.
LOUDER: Final = 256.0


class Sharing:
    """Counts of the tiles of every attention that was watched."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._tokens = 0

    def add(self, counts: Tensor, block_ids: Tensor, tokens: int, first_tile: int) -> None:
        """Take in some tiles, of an attention that really runs; nothing waits for the GPU.

        Args:
            counts: [B * G, tiles] int32, blocks of each tile's union.
            block_ids: [B, G, T, K] int32, -1 for none; of all tiles of the call.
            tokens: R, of one tile.
            first_tile: The first one counted.
        """
        if isinstance(counts, FakeTensor):
            return
        begin = first_tile * tokens
        ids = block_ids[:, :, begin : begin + counts.shape[1] * tokens]
        read = (ids >= 0).sum()
        self._counts.append(torch.stack([counts.sum(), read, read * 0 + counts.numel()]))
        self._tokens = tokens

    def row(self) -> dict[str, Any] | None:
        """Return the means, None if nothing was counted."""
        if not self._counts:
            return None
        united, read, tiles = torch.stack(self._counts).sum(0).tolist()
        row: dict[str, Any] = {"tokens": self._tokens, "union": round(united / tiles, 1)}
        row["selected"] = round(read / tiles / self._tokens, 1)
        if self._tokens > 1:
            new = (united * self._tokens / read - 1) / (self._tokens - 1)
            row["shared"] = round(1 - new, 3)
        return row


@contextmanager
def count_unions(device: torch.device) -> Iterator[Sharing]:
    """Count the unions of all attention of prompts on a GPU meanwhile."""
    sharing = Sharing()
    if device.type != "cuda":
        yield sharing
        return
    from sparda_compile.kernels.gpu import attend_tokens

    kernels: Any = attend_tokens
    plain = kernels.unions

    def counted(prompt: Any, ids: Tensor, tokens: int, first: int, tiles: int) -> Any:
        union = plain(prompt, ids, tokens, first, tiles)
        assert union.counts is not None
        sharing.add(union.counts, ids, tokens, first)
        return union

    kernels.unions = counted
    try:
        yield sharing
    finally:
        kernels.unions = plain


@contextmanager
def louder_tokens(model: nn.Module) -> Iterator[None]:
    """Let a model's token embedding be `LOUDER` times as large meanwhile, in place."""
    embedding: Any = model
    weight = embedding.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(LOUDER)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.div_(LOUDER)
