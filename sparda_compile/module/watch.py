"""A quick look at whether anything in a model is another object than it was.

Thousands of entries are compared by functions written in C, in some tens of nanoseconds each. The
answer may be a false alarm: an equal value in another object. Whoever asks then looks closer.
"""

from __future__ import annotations

import copy
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from sparda_compile.module.description import (
    HOOKS,
    address_of,
    attributes_of,
    fields_of,
    global_hooks,
    is_plain_object,
    version_of,
)
from sparda_compile.ranks.shards import local_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sparda_compile.module.read_names import ReadNames

__all__ = ["Watch", "plain_objects"]

_TABLES: Final = ("_modules", "_parameters", "_buffers")


class Watch:
    """What is in a model now, by identity.

    Args:
        model: The model.
        code: What its forward reads.
        shared: Ids of the tensors that the programs share.

    Attributes:
        copied: Path, kind, name and tensor of what the programs have a copy of.
    """

    def __init__(self, model: nn.Module, code: ReadNames, shared: Collection[int]) -> None:
        named = list(model.named_modules())
        self._modules = [module for _, module in named]
        self._types = [type(module) for module in self._modules]
        self._dicts = [vars(module) for module in self._modules]
        objects = list(plain_objects(model, code))
        self._dicts += [vars(value) for value in objects]
        self._lengths = [len(table) for table in self._dicts]

        self._tables = [vars(module)[name] for module in self._modules for name in _TABLES]
        self._hooks = [vars(module)[name] for module in self._modules for name in HOOKS]
        self._hooks += global_hooks()
        self._full = [table for table in self._tables if table]
        self._empty = [table for table in self._tables if not table]
        self._held = list(chain.from_iterable(map(_values, self._full)))
        self._no_hooks = [table for table in self._hooks if not table]
        self._some_hooks = [(table, list(table.items())) for table in self._hooks if table]

        tensors = {id(v): v for v in self._held if isinstance(v, Tensor)}.values()
        self._shared = [tensor for tensor in tensors if id(tensor) in shared]
        self._placed = [local_of(tensor) for tensor in self._shared if address_of(tensor)]
        self._addresses = [address_of(tensor) for tensor in self._placed]
        self._forms = self._forms_now()
        self.copied = list(_copied(named, code, shared))
        self._versions = [version_of(tensor) for *_, tensor in self.copied]
        self._cells = list(self._cells_of(objects, code))
        self._values = [_kept(getter(table)) for getter, table in self._cells]

    def _cells_of(
        self, objects: Iterable[Any], code: ReadNames
    ) -> Iterator[tuple[itemgetter[Any], Any]]:
        """Yield where Python values stand that code may read."""
        for module in self._modules:
            names = sorted({*attributes_of(module, code), *_own_forward(module)})
            yield itemgetter("training", *names), vars(module)
        for value in objects:
            names = list(fields_of(value, code))
            if names:
                yield itemgetter(*names), vars(value)
        for cls, names in code.methods.items():
            if names:
                yield itemgetter(*names), vars(cls)
        for file, names in code.functions.values():
            yield itemgetter(*names), file

    def is_same(self) -> bool:
        """Whether nothing is another object, at another address or of another version."""
        try:
            return (
                not any(self._empty)
                and list(map(type, self._modules)) == self._types
                and list(map(len, self._dicts)) == self._lengths
                and _are(list(chain.from_iterable(map(_values, self._full))), self._held)
                and self.has_same_hooks()
                and list(map(Tensor.data_ptr, self._placed)) == self._addresses
                and [version_of(tensor) for *_, tensor in self.copied] == self._versions
                and [getter(table) for getter, table in self._cells] == self._values
            )
        except Exception:  # noqa: BLE001 - what cannot be compared this way is looked at closely
            return False

    def has_same_hooks(self) -> bool:
        """Whether the hooks of all modules are those that they were."""
        if any(self._no_hooks):
            return False
        return all(list(table.items()) == held for table, held in self._some_hooks)

    def is_in_place(self) -> bool:
        """Whether tensors and tables are themselves where they were; slower than `is_same`."""
        own = [vars(module) for module in self._modules]
        tables = list(chain.from_iterable(map(itemgetter(*_TABLES), own)))
        hooks = list(chain.from_iterable(map(itemgetter(*HOOKS), own)))
        return (
            _are(tables, self._tables)
            and _are(hooks, self._hooks[: len(hooks)])
            and self._forms_now() == self._forms
        )

    def _forms_now(self) -> list[Any]:
        return [
            *map(attrgetter("dtype", "shape"), self._shared),
            *map(Tensor.stride, self._placed),
        ]


_values = dict.values


def _are(now: list[Any], held: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(now) == len(held) and all(map(is_, now, held))


def _own_forward(module: nn.Module) -> list[str]:
    return ["forward"] if "forward" in vars(module) else []


def _kept(value: Any) -> Any:
    """Return a value whose lists, dicts and sets do not follow those of the model."""
    if isinstance(value, (list, tuple, set, dict)):
        value = copy.copy(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_kept, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        for key in value:
            value[key] = _kept(value[key])
    return value


def _copied(
    named: Iterable[tuple[str, nn.Module]], code: ReadNames, shared: Collection[int]
) -> Iterator[tuple[str, str, str, Tensor]]:
    for path, module in named:
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in shared:
                yield path, "buffer", name, buffer
        for name in attributes_of(module, code):
            value = vars(module)[name]
            if isinstance(value, Tensor):
                yield path, "attribute", name, value


def plain_objects(model: nn.Module, code: ReadNames) -> Iterator[Any]:
    """Yield configs and the like that code may reach from a model's modules, each once."""
    seen: set[int] = set()
    waiting: list[Any] = []
    for module in model.modules():
        waiting += [vars(module)[name] for name in attributes_of(module, code)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, bytes, int, float, type(None), Tensor)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif is_plain_object(value):
            yield value
            waiting += [vars(value).get(name) for name in fields_of(value, code)]
