"""LongRoPE in a graph: which frequencies rotate is chosen by the positions, at every call.

A model with LongRoPE has two sets of frequencies: short ones while every position of a call is
within the length that it was first trained for, long ones beyond it. transformers changes the set
inside forward, as state of the module, which a graph does not have. For a trace the module's
forward is therefore its own, without that change, on frequencies that `torch.where` chooses.

Source: LongRoPE (arXiv 2402.13753); `modeling_rope_utils.py` of transformers says when it switches.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["check_ropes", "choosing_by_positions", "has_longrope", "long_frequencies"]


@contextlib.contextmanager
def choosing_by_positions(model: nn.Module) -> Iterator[None]:
    """Let a model's LongRoPE choose its frequencies without changing the model."""
    changed = [module for module in model.modules() if has_longrope(module)]
    for module in changed:
        module.__dict__["forward"] = _Chooser(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def check_ropes(model: nn.Module) -> None:
    """Refuse rotations that depend on texts of earlier calls.

    Raises:
        CaptureError: If a module has dynamic NTK rotations.
    """
    for path, module in model.named_modules():
        if "dynamic" in _kinds(module):
            raise CaptureError(
                f"{type(model).__name__}: cannot trace forward as one graph: {path} has the "
                "rope_type 'dynamic' (dynamic NTK), whose frequencies depend on the longest text "
                "that the module has seen so far, in earlier calls too. Use rope_type 'yarn', "
                "'linear' or 'longrope', which do not."
            )


def _kinds(module: nn.Module) -> tuple[Any, ...]:
    """Return the kinds of rotation that transformers switches in a module's forward."""
    kind = getattr(module, "rope_type", None)
    # What transformers decorates keeps the forward that it wraps.
    is_switched = hasattr(type(module).forward, "__wrapped__")
    if not is_switched:
        return ()
    return tuple(kind.values()) if isinstance(kind, dict) else (kind,)


def has_longrope(module: nn.Module) -> bool:
    """Whether a module's forward rotates by LongRoPE."""
    return "longrope" in _kinds(module) and "forward" not in module.__dict__


def long_frequencies(module: Any) -> dict[str, Tensor]:
    """Return the long frequencies of a module with LongRoPE, by the buffer they are copied to."""
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    return {
        _attribute("inv_freq", layer_type): _frequencies(module, layer_type)[1]
        for layer_type, kind in kinds.items()
        if kind == "longrope"
    }


class _Chooser:
    """Calls a rotary embedding's own forward with the frequencies that the positions ask for."""

    def __init__(self, module: Any) -> None:
        self._module = module
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        self._sets = {
            layer_type: _frequencies(module, layer_type)
            for layer_type, kind in kinds.items()
            if kind == "longrope"
        }

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        module = self._module
        inner = type(module).forward.__wrapped__
        if layer_type not in self._sets:
            return inner(module, x, position_ids, **_named(layer_type))
        short, long, limit = self._sets[layer_type]
        is_long = torch.max(position_ids) + 1 > limit
        view = _View(
            module, {_attribute("inv_freq", layer_type): torch.where(is_long, long, short)}
        )
        return inner(view, x, position_ids, **_named(layer_type))


def _frequencies(module: Any, layer_type: str | None) -> tuple[Tensor, Tensor, int]:
    """Return the short and the long frequencies, and the longest sequence for the short."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = module.config.rope_parameters
    rope = rope if layer_type is None else rope[layer_type]
    limit = int(rope["original_max_position_embeddings"])
    short = getattr(module, _attribute("original_inv_freq", layer_type))
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config, short.device, seq_len=limit + 1, **_named(layer_type)
    )
    return short, long.to(short.dtype), limit


def _named(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _attribute(name: str, layer_type: str | None) -> str:
    return name if layer_type is None else f"{layer_type}_{name}"


class _View:
    """A module seen with some other attributes."""

    def __init__(self, module: nn.Module, others: dict[str, Any]) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
