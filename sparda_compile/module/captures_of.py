"""From what a user passes to the traced forwards of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from sparda_compile.program.captures import Captures

__all__ = ["captures_of"]


def captures_of(model: nn.Module) -> Captures:
    """Return the traced forwards of a model, or of what `optimize` returned.

    Raises:
        ModelChangedError: If the model was changed after it was optimized.
        UnsupportedInputError: If it is no module, in training mode, or no causal LM.
        AttentionNotFoundError: If it has layers that are not implemented.
    """
    from sparda_compile.capture.causal_lm import as_causal_lm, reach_of, sliding_windows
    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.program.captures import Captures

    if isinstance(model, OptimizedModule):
        model.version.check(thorough=True)
        return model.captures
    if not isinstance(model, nn.Module):
        raise UnsupportedInputError(
            f"model is a {type(model).__name__}; pass a torch.nn.Module, such as what "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    if model.training:
        raise UnsupportedInputError(
            f"{type(model).__name__} is in training mode; call model.eval() first. It stays as it "
            "is: nothing here trains its own weights."
        )
    _check_dropout(model)
    causal_lm = as_causal_lm(model)
    return Captures(causal_lm, sliding_windows(causal_lm), reach_of(causal_lm))


def _check_dropout(model: nn.Module) -> None:
    """Refuse a part that drops values at random, as an adapter does that was added last."""
    for path, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise UnsupportedInputError(
                f"{path} of {type(model).__name__} is in training mode and drops values at random; "
                "call model.eval() first. A new adapter begins in training mode."
            )
