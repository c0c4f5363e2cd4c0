"""Elements and bytes of the values in a graph, at the sizes that it is planned for.

A prompt counts as an example of one, of `EXAMPLE_TOKENS`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.sizes import concrete

if TYPE_CHECKING:
    from sparda_compile.passes.base import PassContext

__all__ = ["EXAMPLE_TOKENS", "num_bytes", "numel"]

EXAMPLE_TOKENS: Final = 1024


def num_bytes(value: Any, ctx: PassContext) -> int:
    """Return the bytes of a fake value; 0 for what is no tensor."""
    if isinstance(value, (list, tuple)):
        return sum(num_bytes(v, ctx) for v in value)
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):  # a quantised weight
        names, _ = value.__tensor_flatten__()
        return sum(num_bytes(getattr(value, name), ctx) for name in names)
    return numel(value.shape, ctx) * value.dtype.itemsize


def numel(shape: tuple[int, ...], ctx: PassContext) -> int:
    """Return the elements of a shape."""
    return _product(shape, ctx.batch_size)


@functools.lru_cache(maxsize=1 << 14)
def _product(shape: tuple[int, ...], batch_size: int) -> int:
    return math.prod(concrete(shape, batch_size, EXAMPLE_TOKENS))
