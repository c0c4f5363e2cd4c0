"""What the modules of a model hold, before and after a run on fake tensors.

A forward that counts its calls, keeps its last result or appends to a list does so each time it
runs. A program that was made of one run would not: so such a change is found, undone and refused.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ModuleState"]

_PLACES: Final = ("__dict__", "_parameters", "_buffers", "_modules")
_PLAIN: Final = (int, float, complex, str, bytes, type(None), tuple, Tensor)
_HOLDERS: Final = (list, dict, set, collections.deque)
# What nn.Module itself keeps in these is compared by name, or is none of a forward's business.
_OF_TORCH: Final = frozenset(vars(nn.Module()))
_GONE: Final = object()


class ModuleState:
    """Every number, text, tensor and container that the modules hold, as it is now.

    Args:
        model: Whose modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = dict(self._present())
        holders = {key: _holder_of(value) for key, value in self._values.items()}
        self._contents = {
            key: (holder, holder.copy()) for key, holder in holders.items() if holder is not None
        }

    def restore(self) -> str:
        """Undo what a forward did to the modules since then; returns what that was, in words.

        A flag that is set once would do no harm, a counter or a buffer that is replaced would;
        nobody can tell which it is, and a program that ran on would never do either again.
        """
        changed = [*self._restore_values(), *self._restore_contents()]
        if not changed:
            return ""
        path, name = changed[0]
        return (
            f"it changes {path + '.' if path else ''}{name} of its module, which a compiled "
            "program would not do again. Keep such state outside of the module, or derive it from "
            "the arguments"
        )

    def _present(self) -> Iterator[tuple[tuple[str, str, str], Any]]:
        for path, module in self._model.named_modules():
            for place in _PLACES:
                for name, value in getattr(module, place).items():
                    if place != "__dict__" or name not in _OF_TORCH or isinstance(value, bool):
                        yield (path, place, name), value

    def _restore_values(self) -> Iterator[tuple[str, str]]:
        modules = dict(self._model.named_modules())
        before, after = self._values, dict(self._present())
        for key in {**before, **after}:
            old, new = before.get(key, _GONE), after.get(key, _GONE)
            path, place, name = key
            if old is new or path not in modules or not _differs(old, new):
                continue
            holder = getattr(modules[path], place)
            if old is _GONE:
                del holder[name]
            else:
                holder[name] = old
            yield path, name

    def _restore_contents(self) -> Iterator[tuple[str, str]]:
        for (path, _, name), (holder, was) in self._contents.items():
            if not _same_items(holder, was):
                holder.clear()
                holder.update(was) if isinstance(holder, (dict, set)) else holder.extend(was)
                yield path, name


def _holder_of(value: Any) -> Any:
    """Return the container that a value is or has; None for one without."""
    if isinstance(value, _HOLDERS):
        return value
    is_plain = isinstance(value, (*_PLAIN, nn.Module, type)) or callable(value)
    return None if is_plain else getattr(value, "__dict__", None)


def _differs(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return True
    is_compared = isinstance(one, _PLAIN) and not isinstance(one, (Tensor, tuple))
    return bool(one != other) if is_compared else one is not other


def _same_items(holder: Any, was: Any) -> bool:
    if len(holder) != len(was):
        return False
    if isinstance(holder, set):
        return bool(holder == was)
    ours, theirs = (
        [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
        for value in (holder, was)
    )
    return not any(_differs(a, b) for a, b in zip(ours, theirs, strict=True))
