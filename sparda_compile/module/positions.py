"""The positions of new tokens: those given, or as the model numbers them.

A caller may give a mask with padding and no positions. Most models count columns then, padding too;
a few (OPT) count real tokens. No config says which, so the model is asked: six tokens,
three of them padding, run without positions and with each way of counting.

A model with a table of positions has no number for those beyond its end.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.graph.nodes import call_name
from sparda_compile.module.inputs import given_positions
from sparda_compile.state.layout import LENGTHS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparda_compile.capture.forward import CapturedGraph
    from sparda_compile.module.cache import SpardaCache
    from sparda_compile.program.captures import Captures

__all__ = ["Positions", "counts_real_tokens", "num_positions"]

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


def num_positions(captured: CapturedGraph) -> int | None:
    """Return how many positions a model has a table of; None where it computes them."""
    for node in captured.graph_module.graph.nodes:
        if node.op != "call_function" or call_name(node) != "embedding":
            continue
        offset, index = 0, node.args[0]
        while isinstance(index, fx.Node) and index.op != "placeholder":
            others = index.args[1:]
            offset += sum(n for n in others if type(n) is int and call_name(index) == "add")
            index = index.args[0]
        table = captured.weights.get(getattr(node.args[1], "name", ""))
        name = index.name if isinstance(index, fx.Node) else ""
        if table is not None and captured.inputs.get(name) == "position_ids":
            return int(table.shape[0]) - offset
    return None


class Positions:
    """Where new tokens stand; the model is asked how it counts when that matters first.

    Args:
        captures: Traced forwards of the model.
    """

    def __init__(self, captures: Captures) -> None:
        self._captures = captures
        self._counts_real: bool | None = None
        self._limit: int | None = None
        self._is_limit_known = False

    def of(self, given: Tensor | None, mask: Tensor, cache: SpardaCache, *, hides: bool) -> Tensor:
        """Return the position of each new token, [B, T] int64.

        Args:
            given: [B, T] or [1, T], what the caller says; None leaves it to the model.
            mask: [B, T] bool, which tokens are real.
            cache: What holds the tokens of earlier calls.
            hides: Whether the mask hides some.

        Raises:
            UnsupportedInputError: If they are no positions, or beyond the model's table.
        """
        kv = cache.kv
        assert kv is not None
        if given is not None:
            positions = given_positions(given, mask)
        elif cache.has_padding or hides:
            positions = self._padded(mask, kv.num_columns, kv.state[LENGTHS])
        else:
            positions = _columns(mask, kv.num_columns)
        self._check_limit(positions, kv.longest)
        return positions

    def _padded(self, mask: Tensor, num_columns: int, lengths: Tensor) -> Tensor:
        if self._counts_real is None:
            self._counts_real = counts_real_tokens(self._captures.model)
        if not self._counts_real:
            return _columns(mask, num_columns)
        counted = mask.long().cumsum(1) - 1 + lengths.long()[:, None]
        return torch.where(mask, counted, 0)

    def _check_limit(self, positions: Tensor, longest: int) -> None:
        if not self._is_limit_known:
            self._limit = num_positions(self._captures.get("decode"))
            self._is_limit_known = True
        if self._limit is None:
            return
        if positions.is_cuda and positions.shape[1] == 1:
            low, high = 0, longest  # a decode step does not wait for the device
        else:
            low, high = (int(n) for n in torch.aminmax(positions))
        if low < 0 or high >= self._limit:
            raise UnsupportedInputError(
                f"a token stands at position {low if low < 0 else high}; this model has a table "
                f"of positions 0 to {self._limit - 1}. Pass a shorter text, or positions in it."
            )


def _columns(mask: Tensor, num_columns: int) -> Tensor:
    columns = torch.arange(num_columns, num_columns + mask.shape[1], device=mask.device)
    return columns.expand(mask.shape).contiguous()
