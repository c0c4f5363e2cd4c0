"""What a model is at one moment, as far as its forward can tell: a flat table to compare.

    (path of the module, kind, name) -> what it was

Parameters and submodules are known by identity and address, since the programs share them. What the
programs do not share, buffers and Python values, is known by its values: what was changed and put
back is as it was.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from sparda_compile.ranks.shards import local_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from sparda_compile.module.read_names import ReadNames

__all__ = [
    "ABSENT",
    "HOOKS",
    "Copied",
    "Description",
    "Held",
    "Shared",
    "address_of",
    "attributes_of",
    "describe",
    "fields_of",
    "frozen",
    "global_hooks",
    "hooks_of",
    "is_container",
    "is_plain_object",
    "version_of",
]

Description = dict[tuple[str, str, str], Any]
HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")

_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module())) - {"training"}
# What transformers and torch keep for themselves, and what `generate` reads of the model itself.
_NOT_READ: Final = frozenset(
    {
        "_gradient_checkpointing_func",
        "_is_hf_initialized",
        "forward",
        "generation_config",
        "gradient_checkpointing",
    }
)
# What an optimized module reads from the model's own config at every call.
_LIVE: Final = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
    }
)
# Hooks that look and change nothing: where they are written, or what they are called.
_OBSERVERS: Final = ("torch.utils.", "transformers.utils.output_capturing")
_OBSERVER_NAMES: Final = ("make_inputs_require_grads",)
_ATOMS: Final = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
)
# Larger buffers are known by their identity and version.
_MOST_COPIED: Final = 1 << 22


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()
"""Stands for what is not there."""


class Held:
    """Something that is the same only if it is the same object."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.what is other.what

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"a {type(self.what).__name__}"


class Shared(Held):
    """A tensor whose memory the programs read: its values may change, its place may not."""

    def __init__(self, what: Tensor) -> None:
        super().__init__(what)
        self.place = (address_of(what), what.dtype, what.device, tuple(what.shape), _strides(what))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shared) and self.what is other.what and self.place == other.place

    def __repr__(self) -> str:
        return f"{tuple(self.what.shape)} {self.place[1]} on {self.place[2]}"


class Copied:
    """A tensor that the programs have a copy of; the same if its values are.

    Args:
        tensor: The tensor.
        keep: Whether to keep its values, too, as the first description does.
    """

    def __init__(self, tensor: Tensor, *, keep: bool) -> None:
        self.tensor = tensor
        self.version = version_of(tensor)
        self.is_small = tensor.numel() <= _MOST_COPIED
        self.values = tensor.detach().clone() if keep and self.is_small else tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Copied):
            return False
        if not self.is_small:
            return self.tensor is other.tensor and self.version == other.version
        one, its = self.values, other.values
        if one.dtype != its.dtype or one.device != its.device or one.shape != its.shape:
            return False
        return torch.equal(one, its)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{tuple(self.values.shape)} {self.values.dtype} on {self.values.device}"


def address_of(tensor: Tensor) -> int:
    """Return where a tensor lies; 0 for kinds of tensors that do not say."""
    tensor = local_of(tensor)
    if tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass that is made of other tensors
        return 0


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def is_container(module: nn.Module) -> bool:
    """Whether a module is read as a whole, and not only by names."""
    return hasattr(type(module), "__getitem__")


def is_plain_object(value: Any) -> bool:
    """Whether something is a config, a dataclass or the like: known by its attributes."""
    if isinstance(value, (nn.Module, GenerationConfig, types.ModuleType)) or callable(value):
        return False
    home = type(value).__module__.partition(".")[0]
    is_foreign = home in ("torch", "builtins", "collections", "logging", "threading", "weakref")
    return hasattr(value, "__dict__") and not is_foreign


def attributes_of(module: nn.Module, code: ReadNames) -> Iterator[str]:
    """Yield the names of the plain attributes that code may read; see `frozen` for `forward`."""
    for name in list(vars(module)):
        if name not in _OF_EVERY_MODULE and name not in _NOT_READ and code.reads(name):
            yield name


def fields_of(value: Any, code: ReadNames) -> Iterator[str]:
    """Yield the names of the attributes of a plain object that code may read."""
    aliases = getattr(type(value), "attribute_map", {})
    aliased = {own for name, own in aliases.items() if name in code.names}
    for name in list(vars(value)):
        if name.lstrip("_") not in _LIVE and (name in aliased or name in code.names):
            yield name


def global_hooks() -> tuple[Mapping[Any, Any], ...]:
    """Return the tables of hooks that run for every module."""
    module = torch.nn.modules.module
    return module._global_forward_pre_hooks, module._global_forward_hooks


def frozen(value: Any, code: ReadNames, memo: dict[int, Any], *, keep: bool = False) -> Any:
    """Return a value in a form that later changes to it do not reach, to be compared.

    Args:
        value: Anything.
        code: What of plain objects is read.
        memo: What was met already, by id.
        keep: Whether to keep the values of tensors.
    """
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, nn.Parameter):
        return Shared(value)
    if isinstance(value, Tensor):
        return Copied(value, keep=keep)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (list, tuple)):
        return [frozen(item, code, memo, keep=keep) for item in value]
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if isinstance(value, types.MethodType):
        return [value.__func__, Held(value.__self__)]
    found: dict[Any, Any] = {}
    if isinstance(value, Mapping):
        items = list(value.items())
    elif is_plain_object(value):
        items = [(name, vars(value).get(name)) for name in fields_of(value, code)]
    else:
        return Held(value)
    memo[id(value)] = found
    found.update((key, frozen(item, code, memo, keep=keep)) for key, item in items)
    return found


def describe(
    model: nn.Module, code: ReadNames, shared: Collection[int], *, keep: bool = False
) -> Description:
    """Return what a model is now.

    Args:
        model: The model.
        code: What its forward reads.
        shared: Ids of the tensors that the programs share.
        keep: Whether to keep the values of tensors that are not shared.
    """
    found: Description = {}
    memo: dict[int, Any] = {}
    for hooks, kind in zip(global_hooks(), HOOKS, strict=True):
        found["", "global hook", kind] = hooks_of(hooks)
    for path, module in model.named_modules():
        found[path, "class", ""] = type(module)
        for kind in HOOKS:
            found[path, "hook", kind] = hooks_of(getattr(module, kind))
        for name, child in module._modules.items():
            found[path, "module", name] = Held(child)
        for name, weight in module._parameters.items():
            found[path, "parameter", name] = None if weight is None else Shared(weight)
        for name, buffer in module._buffers.items():
            found[path, "buffer", name] = _buffer(buffer, shared, keep=keep)
        forward = module.forward
        is_own = isinstance(forward, types.MethodType) and forward.__self__ is module
        found[path, "attribute", "forward"] = forward.__func__ if is_own else Held(forward)
        for name in attributes_of(module, code):
            value = vars(module)[name]
            found[path, "attribute", name] = frozen(value, code, memo, keep=keep)
    _describe_code(found, code)
    return found


def _buffer(buffer: Tensor | None, shared: Collection[int], *, keep: bool) -> Any:
    if buffer is None:
        return None
    return Shared(buffer) if id(buffer) in shared else Copied(buffer, keep=keep)


def _describe_code(found: Description, code: ReadNames) -> None:
    for cls, names in code.methods.items():
        for name in (*names, "__call__"):
            found["", "code", f"{cls.__name__}.{name}"] = getattr(cls, name, ABSENT)
    for file, names in code.functions.values():
        for name in names:
            found["", "code", f"{file.get('__name__')}.{name}"] = file.get(name, ABSENT)
    for name, table in code.tables.items():
        for key in ("sdpa", "eager"):
            found["", "code", f"{name}[{key!r}]"] = table.get(key, ABSENT)


def hooks_of(hooks: Mapping[Any, Any]) -> list[Any]:
    """Return the hooks of a table that do more than look."""
    return [Held(hook) for hook in list(hooks.values()) if not _is_observer(hook)]


def _is_observer(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or ""
    return home.startswith(_OBSERVERS) or getattr(hook, "__name__", "") in _OBSERVER_NAMES
