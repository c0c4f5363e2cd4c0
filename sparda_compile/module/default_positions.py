"""How a model numbers tokens when its caller gives a mask with padding and no positions.

Most count columns, padding too; a few (OPT) count real tokens. No config says which, so the model
is asked: six tokens, three of them padding, run without positions and with each way of counting.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DefaultPositions", "counts_real_tokens"]

_NUM_PADDING: Final = 3
_NUM_REAL: Final = 3
# Of the spread of the logits; rotations by other positions round otherwise.
_SAME: Final = 1e-2


@torch.no_grad()
def counts_real_tokens(model: nn.Module) -> bool:
    """Whether a model without positions counts real tokens, and not columns.

    Where both give the same logits, as with rotations, the answer is columns.

    Args:
        model: A causal LM of transformers; a module that takes no mask counts columns.

    Raises:
        UnsupportedInputError: If it does neither.
    """
    accepted = inspect.signature(type(model).forward).parameters
    if not {"attention_mask", "position_ids"} <= accepted.keys():
        return False
    device = next(model.parameters()).device
    columns = torch.arange(_NUM_PADDING + _NUM_REAL, device=device)[None]
    mask = (columns >= _NUM_PADDING).long()
    real = (columns - _NUM_PADDING).clamp(min=0)

    def logits(**positions: Any) -> Tensor:
        ids = torch.ones_like(columns)
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
        found: Tensor = out.logits[:, _NUM_PADDING:].float()
        return found

    own = logits()
    by_columns, by_real = (logits(position_ids=ids) for ids in (columns, real))
    limit = _SAME * float(own.max() - own.min())
    far_columns, far_real = (float((own - other).abs().max()) for other in (by_columns, by_real))
    if min(far_columns, far_real) > limit:
        raise UnsupportedInputError(
            f"{type(model).__name__} numbers the tokens of a padded batch in a way of its own; "
            "pass position_ids, or sequences of one length."
        )
    return far_real < far_columns and far_columns > limit


class DefaultPositions:
    """The positions of tokens whose caller gives none; the model is asked when it matters first.

    Args:
        model: As for `counts_real_tokens`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts_real: bool | None = None

    def of(self, mask: Tensor, num_columns: int, lengths: Tensor | None) -> Tensor:
        """Return the position of each new token, [B, T] int64.

        Args:
            mask: [B, T] bool, which tokens are real.
            num_columns: Columns that earlier calls have passed.
            lengths: [B], real tokens of earlier calls; None where no token is padding, so that
                both ways of counting agree.
        """
        if lengths is not None and self._counts_real is None:
            self._counts_real = counts_real_tokens(self._model)
        if lengths is not None and self._counts_real:
            counted = mask.long().cumsum(1) - 1 + lengths.long()[:, None]
            return torch.where(mask, counted, 0)
        columns = torch.arange(num_columns, num_columns + mask.shape[1], device=mask.device)
        return columns.expand(mask.shape).contiguous()
