"""What surrounds a call changes nothing inside it.

Programs, caches and steps are made for one dtype and device, outlive the call that made them, and
have no gradient. So inside of `neutral` there is no inference mode, no gradient, no autocast, and
no default dtype or device but torch's own; what the caller had is back behind it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_autocast", "neutral"]


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Run a block as if nothing surrounded it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def check_autocast(device_type: str, dtype: torch.dtype) -> None:
    """Refuse autocast to another dtype than the model's: it would change the model's own result.

    Raises:
        UnsupportedInputError: If autocast to another dtype is on for the device.
    """
    if not torch.is_autocast_enabled(device_type):
        return
    asked = torch.get_autocast_dtype(device_type)
    if asked != dtype:
        raise UnsupportedInputError(
            f"autocast to {asked} is on, and an optimized module computes in {dtype}, the dtype of "
            f"its weights. Leave autocast, or convert the model with .to({asked}) and optimize it "
            "again."
        )
