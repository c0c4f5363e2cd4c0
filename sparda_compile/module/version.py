"""Whether a model is still what it was when it was optimized.

Programs are made from a model once. What is changed in place in its weights they see, since they
share them; nothing else of what is done to the model afterwards reaches them: a hook, another
submodule, a flag of an adapter, a scale, a config. So a change is noticed and named.

    `generate`, a prompt     everything: `check(thorough=True)`
    `forward` of one token   the same, but for what only a look at memory tells: `check()`
    a step of `generate`     hooks alone, since `generate` looked before it began: `check_hooks()`

`check` compares identities of submodules, parameters, buffers and hooks, addresses of parameters,
versions of buffers, and the Python values that the code of the forward mentions (`read_names.py`).
`thorough` adds values of buffers, dtypes, strides and the tables of hooks themselves: what one
changes through `.data`, or by putting another dict in the place of one. Only where one of these
differs is the model described anew and compared by values (`description.py`), so what was put back
counts as unchanged. What that costs is in docs/limits.md.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from sparda_compile.capture.longrope import has_longrope, long_frequencies
from sparda_compile.errors import ModelChangedError, UnsupportedInputError
from sparda_compile.module.description import (
    ABSENT,
    Copied,
    Description,
    attributes_of,
    describe,
    frozen,
    global_hooks,
    hooks_of,
    is_container,
)
from sparda_compile.module.read_names import ReadNames
from sparda_compile.module.watch import Watch, plain_objects

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Version"]

_LONGEST_SHOWN: Final = 60


class Version:
    """What a model was when it was optimized.

    Args:
        model: The model that was traced; kept, since what is compared by identity has to live.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        _check_global_hooks()
        self._code = ReadNames(dict.fromkeys(map(type, model.modules())))
        for value in plain_objects(model, self._code):
            self._code.add_properties(type(value))
        shared = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
        self._shared = {id(tensor) for tensor in shared if isinstance(tensor, Tensor)}
        self._was = describe(model, self._code, self._shared, keep=True)
        self._moving: set[tuple[str, str, str]] = set()
        self._optional: set[tuple[str, str, str]] = set()
        self._add_longrope()
        self._own = sorted({*attributes_of(model, self._code)} - {"training", "config"})
        self._seen = Watch(model, self._code, self._shared)
        self._lock = threading.Lock()

    def check(self, *, thorough: bool = False) -> None:
        """Refuse to go on with a model that has changed.

        Args:
            thorough: Whether to compare the values of buffers, too; that waits for the device.

        Raises:
            ModelChangedError: If it has; the message names the first thing that did.
        """
        seen = self._seen
        if seen.is_same() and (not thorough or (seen.is_in_place() and self._has_same_values())):
            return
        with self._lock:
            self._look()

    def check_hooks(self) -> None:
        """Refuse to go on with a model whose hooks are others.

        Raises:
            ModelChangedError: If they are.
        """
        if not self._seen.has_same_hooks():
            with self._lock:
                self._look()

    def check_view(self, module: nn.Module) -> None:
        """Refuse an optimized module on which something was set that belongs to the model.

        Args:
            module: The optimized module, which shows the model's children as its own.

        Raises:
            ModelChangedError: If something was.
        """
        for table in ("_modules", "_parameters"):
            mine, its = vars(module)[table], vars(self._model)[table]
            wrong = [name for name, value in its.items() if mine.get(name) is not value]
            if wrong:
                raise _set_on_the_module(wrong[0])
        set_here = [name for name in self._own if name in vars(module)]
        if set_here:
            raise _set_on_the_module(set_here[0])

    def _look(self) -> None:
        seen = Watch(self._model, self._code, self._shared)
        now = describe(self._model, self._code, self._shared)
        for key in {**self._was, **now}:
            change = self._change(key, now)
            if change:
                raise ModelChangedError(
                    f"the model has changed since it was optimized: {change}. What was built from "
                    "it does not follow that; undo it, or call optimize on the model again."
                )
        self._seen = seen

    def _change(self, key: tuple[str, str, str], now: Description) -> str:
        """Say how an entry differs in a way that matters; empty if it does not."""
        path, kind, name = key
        old, new = self._was.get(key, ABSENT), now.get(key, ABSENT)
        if key in self._moving or _same(old, new):
            return ""
        cls = self._was.get((path, "class", ""), ABSENT)
        if kind == "attribute" and cls is not ABSENT:
            old, new = (self._or_default(value, cls, name) for value in (old, new))
            # PEFT writes one active adapter as a name or as a list of one, and means the same.
            is_adapter = name == "active_adapter"
            if _same(old, new) or (is_adapter and _as_list(old) == _as_list(new)):
                return ""
        if old is ABSENT and (cls is ABSENT or not self._is_read(key)):
            return ""
        if new is ABSENT and (key in self._optional or (path, "class", "") not in now):
            return ""  # what LongRoPE may not have made yet, or what goes with its parent
        return _sentence(key, old, new)

    def _or_default(self, value: Any, cls: type, name: str) -> Any:
        if value is not ABSENT:
            return value
        default = getattr(cls, name, ABSENT)
        return ABSENT if isinstance(default, property) else frozen(default, self._code, {})

    def _is_read(self, key: tuple[str, str, str]) -> bool:
        """Whether an entry that is new can be read by the code of the forward."""
        path, kind, name = key
        if kind in ("module", "parameter", "buffer"):
            modules = dict(self._model.named_modules())
            return self._code.reads(name) or is_container(modules[path])
        return True

    def _has_same_values(self) -> bool:
        for *key, tensor in self._seen.copied:
            path, kind, name = key
            known = self._was.get((path, kind, name))
            is_moving = (path, kind, name) in self._moving
            if isinstance(known, Copied) and not is_moving and known != Copied(tensor, keep=False):
                return False
        return True

    def _add_longrope(self) -> None:
        """Know which state LongRoPE's own forward changes, and to what."""
        for path, module in self._model.named_modules():
            if not has_longrope(module):
                continue
            for name, long in long_frequencies(module).items():
                # Its forward writes the first itself; the other is what it writes.
                self._moving.add((path, "buffer", name))
                key = (path, "attribute", name.replace("inv_freq", "long_inv_freq"))
                self._was[key] = Copied(long, keep=True)
                self._optional.add(key)


def _check_global_hooks() -> None:
    """Refuse hooks for all modules: they would be part of a program, and run around it too.

    Raises:
        UnsupportedInputError: If there are any that do more than look.
    """
    for hooks in global_hooks():
        found = hooks_of(hooks)
        if found:
            raise UnsupportedInputError(
                f"a hook for all modules of torch is on ({found[0]!r}); remove it, optimize, and "
                "put hooks on the optimized module instead."
            )


def _set_on_the_module(name: str) -> ModelChangedError:
    return ModelChangedError(
        f"{name} was set on the optimized module, whose programs do not read it there; delete it, "
        "set it on the model, and call optimize on the model again."
    )


def _same(old: Any, new: Any) -> bool:
    try:
        return bool(old == new)
    except (RuntimeError, TypeError, ValueError):  # things that do not say whether they are equal
        return False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _sentence(key: tuple[str, str, str], old: Any, new: Any) -> str:
    """Say what happened to an entry."""
    path, kind, name = key
    of = path or "the model"
    full = f"{path}.{name}" if path and name else path or name
    if kind == "class":
        return f"{of} is a {new.__name__}, it was a {old.__name__}"
    if kind == "hook":
        return f"{of} has other {name.strip('_').replace('_', ' ')}"
    if kind == "global hook":
        return f"hooks of torch for all modules are others ({name.strip('_').replace('_', ' ')})"
    if kind == "code":
        return f"{full} is another function"
    if kind in ("module", "parameter", "buffer"):
        what = {"module": "submodule"}.get(kind, kind)
        if old is ABSENT or new is ABSENT:
            return f"{what} {full} was {'added' if old is ABSENT else 'removed'}"
        if kind == "buffer" and isinstance(new, Copied) and isinstance(old, Copied):
            return f"{what} {full} has other values"
        return f"{what} {full} was replaced or moved: {_shown(new)}, it was {_shown(old)}"
    full, old, new = _where(full, old, new)
    if name == "forward":
        return f"forward of {of} was replaced"
    return f"{full} is {_shown(new)}, it was {_shown(old)}"


def _where(full: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Return the name and the values of what differs inside of two values."""
    while isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if not _same(old.get(k, ABSENT), new.get(k, ABSENT))]
        if not keys:
            break
        key = keys[0]
        full, old, new = f"{full}.{key}", old.get(key, ABSENT), new.get(key, ABSENT)
    return full, old, new


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)) or callable(value):
        name = getattr(value, "__name__", "")
        shown = name or (repr(value) if isinstance(value, list) else "other values")
    else:
        shown = repr(value)
    is_short = len(shown) <= _LONGEST_SHOWN
    return shown if is_short else f"{shown[:_LONGEST_SHOWN]}..."
