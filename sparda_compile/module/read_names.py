"""What the code of a model's forward can read: names of attributes, functions, methods.

An attribute that no line of a model's code mentions changes nothing, whatever it is set to. So the
names in the code tell what of a model matters, whoever wrote it: those in its classes, but for what
only builds or prints them, and in the functions that these call, outside of torch and Python.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ReadNames"]

# Methods that only build, load, print or train a module.
_NOT_RUN: Final = frozenset(
    {
        "__init__",
        "__new__",
        "__repr__",
        "__init_subclass__",
        "__setstate__",
        "__getstate__",
        "extra_repr",
        "reset_parameters",
        "_init_weights",
        "_load_from_state_dict",
    }
)
# What is around a forward: loading, saving and the loop of `generate`, which follow the model.
_AROUND: Final = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.distributed",
    "transformers.utils.hub",
    "transformers.utils.output_capturing",
    "transformers.integrations.peft",
    "transformers.configuration_utils",
)
# Functions that a forward finds in a table, by the name of its attention implementation.
_IMPLEMENTATIONS: Final = ("sdpa", "eager")
_CALLS: Final = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"})
_NOT_FOLLOWED: Final = sys.stdlib_module_names | {"torch", "numpy", "sparda_compile", "triton"}


class ReadNames:
    """What forwards of some classes can read.

    Args:
        classes: Classes of modules.

    Attributes:
        names: Names of attributes that their code mentions.
        methods: What to watch of each class: names of its own functions.
        functions: What to watch of each file: its globals, and names of functions and classes.
        tables: Tables of functions, by the names under which code reads them.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        self.names: set[str] = {"forward", "training"}
        self.methods: dict[type, list[str]] = {}
        self.functions: dict[int, tuple[dict[str, Any], list[str]]] = {}
        self.tables: dict[str, Mapping[Any, Any]] = {}
        self._reads: dict[str, bool] = {}
        self._seen: set[types.CodeType] = set()
        for base in dict.fromkeys(base for cls in classes for base in cls.__mro__):
            self._class(base)

    def reads(self, name: str) -> bool:
        """Whether code may read an attribute; f"{kind}_scaling" is known by its end."""
        known = self._reads.get(name)
        if known is None:
            starts = [i for i, letter in enumerate(name) if letter == "_" or not i]
            known = self._reads[name] = any(name[i:] in self.names for i in starts)
        return known

    def add_properties(self, cls: type) -> None:
        """Take in what the properties of a plain class read, where they are read themselves."""
        for base in cls.__mro__:
            for name, value in vars(base).items():
                if isinstance(value, property) and name in self.names:
                    for function in _functions(value):
                        self._code(function.__code__, function.__globals__)
        self._reads.clear()

    def _class(self, cls: type) -> None:
        if cls is nn.Module:
            self.methods[cls] = [name for name in vars(cls) if name in _CALLS]
        if cls in (object, nn.Module) or cls.__module__.startswith(_AROUND):
            return
        names = self.methods.setdefault(cls, [])
        for name, value in list(vars(cls).items()):
            found = list(_functions(value))
            if not found or name in _NOT_RUN:
                continue
            names.append(name)
            for function in found:
                self._function(function)

    def _function(self, function: types.FunctionType) -> None:
        if function.__code__ in self._seen:
            return
        self._seen.add(function.__code__)
        # A wrapper goes by the name of what it wraps; where it was written, its globals know.
        if not str(function.__globals__.get("__name__")).startswith(_AROUND):
            self._code(function.__code__, function.__globals__)
        for cell in function.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:  # not set yet
                continue
            for other in _functions(inner):
                if _is_followed(other):
                    self._function(other)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        self._seen.add(code)
        self.names.update(code.co_names)
        for const in code.co_consts:
            if isinstance(const, str) and const.isidentifier():
                self.names.add(const)
            elif isinstance(const, tuple):
                self.names.update(c for c in const if isinstance(c, str) and c.isidentifier())
            elif isinstance(const, types.CodeType):
                self._code(const, names)
        for name in code.co_names:
            value = names.get(name)
            if isinstance(value, Mapping) and not isinstance(value, dict):
                self._table(name, value)
            is_class = isinstance(value, type) and issubclass(value, nn.Module)
            if not (is_class or isinstance(value, types.FunctionType)):
                continue
            watched = self.functions.setdefault(id(names), (names, []))[1]
            if name not in watched:
                watched.append(name)
            if isinstance(value, types.FunctionType) and _is_followed(value):
                self._function(value)

    def _table(self, name: str, table: Mapping[Any, Any]) -> None:
        self.tables[name] = table
        for key in _IMPLEMENTATIONS:
            value = table.get(key)
            if isinstance(value, types.FunctionType) and _is_followed(value):
                self._function(value)


def _is_followed(function: types.FunctionType) -> bool:
    name = function.__module__ or ""
    return name.partition(".")[0] not in _NOT_FOLLOWED and not name.startswith(_AROUND)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that an attribute of a class is made of."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        yield from (f for f in (value.fget,) if isinstance(f, types.FunctionType))
    elif isinstance(value, types.FunctionType):
        yield value
        inner = inspect.unwrap(value)
        if isinstance(inner, types.FunctionType) and inner is not value:
            yield inner
