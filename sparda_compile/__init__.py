"""Long contexts on one GPU: sparse, offloaded, race-free decode for causal LMs you already have.

import sparda_compile
fast = sparda_compile.optimize(model)
out = fast.generate(**inputs, max_new_tokens=64)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sparda_compile.config import SpardaConfig
from sparda_compile.errors import SpardaError
from sparda_compile.logs import show_logs_from_environment

if TYPE_CHECKING:
    from sparda_compile.api import explain, optimize
    from sparda_compile.training.run import train_forecast

__all__ = ["SpardaConfig", "SpardaError", "__version__", "explain", "optimize", "train_forecast"]

try:
    __version__ = version("sparda-compile")
except PackageNotFoundError:
    __version__ = "0.0.0"

show_logs_from_environment()


def __getattr__(name: str) -> Any:
    # torch._dynamo, networkx and transformers take seconds to import; do it on first use.
    if name in ("explain", "optimize"):
        from sparda_compile import api

        return getattr(api, name)
    if name == "train_forecast":
        from sparda_compile.training import run

        return run.train_forecast
    raise AttributeError(f"module 'sparda_compile' has no attribute {name!r}")
