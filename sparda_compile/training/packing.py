"""Documents as sequences of one length: some held out, the others end to end, in a random order.

    documents   a seed decides their order, and which are held out
    sequences   the documents one behind the other, cut into pieces of `length` tokens
    batches     the sequences in an order of the seed's, `batch_size` at a time

A sequence may hold the end of one document and the begin of another, with a separator between them;
attention sees across it. What does not fill the last sequence or batch is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["held_out_documents", "packed_batches"]


def held_out_documents(num_documents: int, share: float, seed: int) -> list[int]:
    """Return the numbers of the documents to hold out, ascending; one at least if a share is.

    Args:
        num_documents: How many there are.
        share: To hold out, from 0.0 on and less than 1.0.
        seed: Of the choice.

    Raises:
        ConfigError: If the share is not allowed, or no document would be left.
    """
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"held_out={share} is no share of documents; use 0.0 to less than 1.0.")
    count = max(round(share * num_documents), 1) if share else 0
    if count >= num_documents:
        raise ConfigError(
            f"held_out={share} of {num_documents} documents leaves none to learn from; pass more "
            "documents, or held_out=0."
        )
    order = torch.randperm(num_documents, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def packed_batches(
    documents: Sequence[Tensor],
    separator: Sequence[int],
    *,
    length: int,
    batch_size: int,
    seed: int,
) -> list[Tensor]:
    """Return documents as batches [B, T] int64.

    Args:
        documents: Token ids, [n] int64 each.
        separator: Tokens before each document; may be empty.
        length: Tokens of one sequence, T.
        batch_size: Sequences of one batch, B.
        seed: Of the orders.

    Raises:
        ConfigError: If they do not fill a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    before = torch.tensor(separator, dtype=torch.int64)
    order = torch.randperm(len(documents), generator=generator).tolist()
    pieces = [piece for number in order for piece in (before, documents[number])]
    flat = torch.cat(pieces) if pieces else before
    num_batches = len(flat) // (length * batch_size)
    if not num_batches:
        raise ConfigError(
            f"the documents have {len(flat)} tokens, but one batch of {batch_size} sequences of "
            f"{length} tokens needs {batch_size * length}; pass more documents, or lower length "
            "or batch."
        )
    sequences = flat[: len(flat) // length * length].view(-1, length)
    chosen = torch.randperm(len(sequences), generator=generator)[: num_batches * batch_size]
    return [sequences[rows] for rows in chosen.view(-1, batch_size)]
