"""Triton's interpreter without what it works out anew for each operation: most of a test's time.

Kernels compute what they did: only types, which are the same each time, and functions that have
been looked up once are remembered. Products of float32 are summed in 64 bits: what a CPU's library
sums in 32 depends, on some CPUs, on how many columns stand beside, which no tensor core's sum does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import operator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IS_INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Let Triton's interpreter remember, for the session."""
    if not IS_INTERPRETED:
        yield
        return
    from triton.language import core
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    # Asserted with `debug` alone; else the sums are computed in 64 bits, compared, and forgotten.
    assert not options.debug
    unchecked = dataclasses.replace(options, sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "options", unchecked)
        patch.setattr(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))
        patch.setattr(interpreter, "_patch_attr", given_semantic(interpreter.interpreter_semantic))
        patch.setattr(interpreter, "_patch_lang", patching_once(interpreter._patch_lang))
        semantic = interpreter.interpreter_semantic
        patch.setattr(semantic, "cast", unless_of_that_type(semantic.cast))
        patch.setattr(semantic, "broadcast_impl_value", unless_alike(semantic.broadcast_impl_value))
        promote = by_names(semantic.computation_type_impl)
        patch.setattr(semantic, "computation_type_impl", promote)
        patch.setattr(core.block_type, "__init__", like_the_first(core.block_type.__init__))
        patch.setattr(core.tensor, "__init__", formed_as_the_first(core.tensor.__init__))
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "create_dot", summed_in_64_bits(builder.create_dot))
        yield


def summed_in_64_bits(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Let products of float32 have the same bits whatever stands beside their operands."""
    from triton.runtime.interpreter import TensorHandle

    def create(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not a.data.dtype == b.data.dtype == d.data.dtype == numpy.float32:
            return create_dot(builder, a, b, d, *rest)
        product = numpy.matmul(a.data, b.data, dtype=numpy.float64)
        return TensorHandle(product.astype(numpy.float32) + d.data, d.dtype.scalar)

    return create


def patching_once(patch_language: Callable[..., Any]) -> Callable[..., Any]:
    """Leave the interpreter's functions in `triton.language`.

    It looks through the whole language to set them whenever a kernel is launched, and again in
    each helper that one calls.
    """
    from triton import language

    known: set[frozenset[str]] = set()
    modules_of: dict[str, frozenset[str]] = {}
    nothing_to_restore = SimpleNamespace(restore=lambda: None)

    def patch_once(function: Callable[..., Any]) -> SimpleNamespace:
        file = function.__code__.co_filename
        if file not in modules_of:
            modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
            names = frozenset(m.__name__ for m in (language, language.core) if m in modules)
            modules_of[file] = names
        if modules_of[file] not in known:
            known.add(modules_of[file])
            patch_language(function)
        return nothing_to_restore

    return patch_once


def given_semantic(semantic: Any) -> Callable[..., None]:
    """Return what sets a function of the language, which is then called with the interpreter."""

    def set_function(obj: Any, name: str, member: Any, builder: Any, *scope: Any) -> None:
        # The wrapper only asks whether there is a `_semantic`.
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        if scope:
            scope[0].set_attr(obj, name, call)
        else:
            setattr(obj, name, call)

    return set_function


def by_name(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function of types that remembers its results; equal types have one name."""
    known: dict[str, Any] = {}

    def remembered(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = function(of)
        return known[of.name]

    return remembered


def unless_of_that_type(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Return a cast that leaves alone what has the type already: most operands do."""

    def cast_other(value: Any, dtype: Any, *rounding: Any) -> Any:
        return value if value.dtype.name == dtype.name else cast(value, dtype, *rounding)

    return cast_other


def unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Return a broadcast that leaves alone what has one type, and so one shape."""

    def broadcast_others(left: Any, right: Any) -> Any:
        same = left.type.name == right.type.name
        return (left, right) if same else broadcast(left, right)

    return broadcast_others


def by_names(promote: Callable[..., Any]) -> Callable[..., Any]:
    """Return a promotion of two types that remembers its results."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(left: Any, left_is_scalar: bool, right: Any, *rest: bool) -> Any:
        key = (left.name, left_is_scalar, right.name, *rest)
        if key not in known:
            known[key] = promote(left, left_is_scalar, right, *rest)
        return known[key]

    return remembered


def like_the_first(make: Callable[..., None]) -> Callable[..., None]:
    """Let a type of blocks have the fields of the first one of that element and shape."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(block: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(operator.index, shape))
        fields = known.get(key)
        if fields is None:
            make(block, element_ty, shape)
            known[key] = dict(vars(block))
        else:
            vars(block).update(fields)

    return init


def formed_as_the_first(make: Callable[..., None]) -> Callable[..., None]:
    """Let a tensor have shape and dtype of the first one of its type."""
    known: dict[str, dict[str, Any]] = {}

    def init(tensor: Any, handle: Any, type: Any) -> None:
        fields = known.get(type.name)
        if fields is None:
            make(tensor, handle, type)
            fields = known[type.name] = dict(vars(tensor))
        vars(tensor).update(fields, handle=handle, type=type)

    return init
