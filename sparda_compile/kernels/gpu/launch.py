"""What every Triton kernel of this folder shares: sizes of tiles, launches, the interpreter.

A kernel that is compiled in several forms whose results must be equal bit for bit is launched with
`as_written()`: else the compiler joins a product with one sum or another as each form suggests. Nor
may a tile of a dot be made of narrower numbers in one form than in another: see `tiles.py`.

Triton compiles a kernel where it is first launched, one after another. `compile_ahead` does it in
threads, for launches that were collected from a run on fake tensors; a launch waits for its kernel.
A kernel is compiled in as many forms as there are constants, dtypes and kinds of numbers that it is
launched with; the first that is collected is the first that is compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import enum
import functools
import inspect
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from torch import Tensor
from triton.runtime.jit import MockTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Launch",
    "address_of",
    "as_written",
    "collect_launches",
    "compile_ahead",
    "device_of",
    "interpreting",
    "launch",
    "power_of_two",
    "rows_of",
    "shared_bytes",
    "tokens_of",
]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that was collected.

    Attributes:
        kernel: The kernel.
        grid: Programs.
        args: Its arguments; tensors are fake.
        options: Launch options.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def form(self) -> tuple[Any, ...]:
        """What tells the compiled kernel from others of the same source."""
        kinds = _kinds_of(self.kernel)
        return (*map(_form, self.args, kinds), *self.options.items())


class _Kind(enum.Enum):
    """What becomes of a parameter when a kernel is compiled."""

    CONSTANT = enum.auto()
    SPECIALIZED = enum.auto()
    PLAIN = enum.auto()


@functools.cache
def _kinds_by_name(function: Callable[..., Any], plain: tuple[str, ...]) -> list[_Kind]:
    return [
        _Kind.CONSTANT
        if "constexpr" in str(parameter.annotation)
        else _Kind.PLAIN
        if name in plain
        else _Kind.SPECIALIZED
        for name, parameter in inspect.signature(function).parameters.items()
    ]


def _kinds_of(kernel: Any) -> list[_Kind]:
    options = kernel.kwargs if interpreting() else vars(kernel)
    return _kinds_by_name(kernel.fn, tuple(options.get("do_not_specialize") or ()))


def _form(argument: Any, kind: _Kind) -> Any:
    """Return what a kernel is compiled for, of an argument: see Triton's specialization."""
    if isinstance(argument, Tensor):
        # What is allocated begins at 512 bytes or more.
        return argument.dtype, argument.storage_offset() * argument.element_size() % 16 == 0
    if kind is _Kind.CONSTANT or argument is None:
        return type(argument), argument
    if type(argument) is not int:
        return type(argument)
    is_long = argument.bit_length() > 31
    return is_long if kind is _Kind.PLAIN else (argument == 1, argument % 16 == 0, is_long)


_collected: Final[contextvars.ContextVar[list[Launch] | None]] = contextvars.ContextVar(
    "sparda_launches", default=None
)
# Kernels that are being compiled: what a launch of each waits for.
# By the id of the kernel, whose hash is that of its source and takes milliseconds to make.
_PENDING: Final[dict[int, dict[Any, Future[None]]]] = {}


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return what launches a kernel, given its arguments; or notes that it would."""
    launches = _collected.get()
    if launches is not None:
        return lambda *args, **options: launches.append(Launch(kernel, grid, args, options))
    launcher: Callable[..., Any] = kernel[grid]
    if id(kernel) not in _PENDING:
        return launcher

    def launch_compiled(*args: Any, **options: Any) -> Any:
        _await(Launch(kernel, grid, args, options))
        return launcher(*args, **options)

    return launch_compiled


def _await(it: Launch) -> None:
    """Wait for a kernel that is being compiled in the form of a launch."""
    forms = _PENDING.get(id(it.kernel), {})
    future = forms.get(it.form)
    if future is not None:
        future.result()
    if all(future.done() for future in list(forms.values())):
        _PENDING.pop(id(it.kernel), None)


@contextlib.contextmanager
def collect_launches() -> Iterator[list[Launch]]:
    """Let nothing be launched in this thread; what would have been is in the list."""
    launches: list[Launch] = []
    token = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(token)


def compile_ahead(launches: list[Launch], device: torch.device) -> list[Future[None]]:
    """Compile the kernels of collected launches in threads, and go on meanwhile.

    One pool of half the cores does it for all programs, in the order in which it was asked to.

    Args:
        launches: What will be launched, soonest first.
        device: Where.

    Returns:
        What ends with each kernel.
    """
    futures = []
    for it in launches:
        forms = _PENDING.setdefault(id(it.kernel), {})
        if it.form not in forms:
            forms[it.form] = _workers().submit(_compile, it, device)
        futures.append(forms[it.form])
    return futures


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(os.cpu_count() or 1, 2) // 2, "sparda-kernels")


def _compile(it: Launch, device: torch.device) -> None:
    """Compile a kernel and load it; what fails is compiled again, and says why, at its launch."""
    args = [MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in it.args]
    try:
        with torch.cuda.device(device):
            compiled = it.kernel.warmup(*args, grid=it.grid, **it.options)
            compiled.run  # noqa: B018 - loads it, for which Triton compiles a launcher
    except Exception:  # noqa: BLE001
        _log.debug("%s was not compiled ahead", it.kernel, exc_info=True)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def as_written() -> dict[str, bool]:
    """Return the launch options of a kernel in which each product and sum rounds by itself."""
    return {} if interpreting() else {"enable_fp_fusion": False}


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of a tensor the one that is launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def address_of(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; 0 where launches are collected."""
    return 0 if _collected.get() is not None else tensor.data_ptr()


def power_of_two(size: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def rows_of(tensor_BH1D: Tensor) -> tuple[Tensor, int, int]:
    """Return one token's vectors with their strides by sequence and by head.

    The last dimension is made contiguous, which it is where nothing odd produced it.
    """
    if tensor_BH1D.stride(-1) != 1:
        tensor_BH1D = tensor_BH1D.contiguous()
    return tensor_BH1D, tensor_BH1D.stride(0), tensor_BH1D.stride(1)


def tokens_of(tensor_BHTD: Tensor) -> tuple[Tensor, int, int, int]:
    """Return many tokens' vectors with strides by sequence, head and token; see `rows_of`."""
    tensor, row, head = rows_of(tensor_BHTD)
    return tensor, row, head, tensor.stride(2)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may have."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
