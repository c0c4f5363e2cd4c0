"""What every command needs that measures a GPU: that there is one, and a lab of a shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.bench.lab import Lab

__all__ = ["make_lab", "require_gpu"]


def require_gpu(command: str) -> None:
    """Raise ConfigError if there is no CUDA GPU to measure."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"`{command}` measures a CUDA GPU, and torch {torch.__version__} sees none; run it on "
            "a machine with one, with a CUDA build of torch and the extra `gpu`."
        )


def make_lab(shape: str, say: Callable[[str], None], max_host_gib: float | None) -> Lab:
    """Return the lab of a shape.

    Args:
        shape: A key of `SHAPES`.
        say: Told what is going on.
        max_host_gib: Most CPU memory for KV, GiB; None is what is free.
    """
    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.memory import GIB

    limit = None if max_host_gib is None else round(max_host_gib * GIB)
    return Lab(shape, say, max_host_bytes=limit)
