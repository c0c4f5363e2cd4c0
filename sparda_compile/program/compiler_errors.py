"""Says in a sentence what a compiler lacks: Inductor and Triton say it in a long traceback.

Inductor's C++ needs a compiler and Python's headers, on a CPU; its kernels for a GPU need Triton,
which compiles a launcher in C.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from sparda_compile.errors import BackendUnavailableError, SpardaError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["compiler_errors"]

_EAGER: Final = 'or use lowering="eager", which compiles nothing'
_HEADERS: Final = "Python.h"


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Raise what says that a compiler is missing, or does not work, as an error with the remedy.

    Raises:
        BackendUnavailableError: If that is why the block failed; other errors pass.
    """
    try:
        yield
    except SpardaError:
        raise
    except Exception as error:
        for cause in _causes(error):
            text = _sentence(cause)
            if text is not None:
                raise BackendUnavailableError(text) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; Inductor keeps that as an attribute."""
    here: BaseException | None = error
    seen: set[int] = set()
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = getattr(here, "inner_exception", None) or here.__cause__


def _sentence(error: BaseException) -> str | None:
    """Return what is missing and what to do; None if the error says nothing of the kind.

    The classes are known by name: torch has not had them all in each version.
    """
    name, text = type(error).__name__, str(error)
    if name == "InvalidCxxCompiler":
        return (
            'lowering="inductor" needs a C++ compiler on a CPU, and none was found '
            f"({text.rstrip('.')}). Install one, such as g++, set the environment variable CXX to "
            f"one, {_EAGER}."
        )
    if name == "CppCompileError" and _HEADERS in text:
        return (
            f'lowering="inductor" needs Python\'s headers to compile C++, and {_HEADERS} was not '
            "found. Install them, such as the system's package python3-dev, for the Python that "
            f"runs this, {_EAGER}."
        )
    if name == "CppCompileError":
        output = getattr(error, "output", text).strip().splitlines()
        return (
            'lowering="inductor" needs a C++ compiler on a CPU, and the one that was found failed: '
            f"{' '.join(output[-1:]) or 'it said nothing'}. Install another, such as g++, set the "
            f"environment variable CXX to one, {_EAGER}."
        )
    if name == "TritonMissing":
        return (
            'lowering="inductor" needs Triton on a GPU, and no working one was found. Install it '
            f"with pip install 'sparda-compile[gpu]', {_EAGER}."
        )
    if "Failed to find C compiler" in text:
        return (
            "Triton needs a C compiler for the kernels of a GPU, and none was found. Install one, "
            "such as gcc, or set the environment variable CC to one."
        )
    return None
