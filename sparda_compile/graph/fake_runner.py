"""Functions on fake tensors, remembered by the form of what they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "FakeRunner",
    "freeze",
    "leaves_of",
    "map_leaves",
    "root_of",
    "share_memory",
    "version_of",
]

_PLAIN: Final = (
    int,
    float,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    complex,
    type(Ellipsis),
)


def leaves_of(value: Any) -> list[Any]:
    """Return what lists, tuples and dicts hold, in order; of slices, their bounds."""
    flat: list[Any] = []
    _gather(value, flat)
    return flat


def _gather(value: Any, flat: list[Any]) -> None:
    if isinstance(value, (tuple, list)):
        for item in value:
            _gather(item, flat)
    elif isinstance(value, dict):
        for item in value.values():
            _gather(item, flat)
    elif isinstance(value, slice):
        flat += (value.start, value.stop, value.step)
    else:
        flat.append(value)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a value of the same form with each leaf changed, in the order of `leaves_of`."""
    if isinstance(value, (tuple, list)):
        items = [map_leaves(item, change) for item in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*items)
        if hasattr(value, "n_sequence_fields"):  # one of torch's, as `max` returns
            return type(value)(items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {name: map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(change(value.start), change(value.stop), change(value.step))
    return change(value)


def version_of(tensor: Tensor) -> int:
    """Return how often the memory of a fake tensor was changed in place."""
    return _own_version(root_of(tensor))


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two fake tensors stand for parts of one memory."""
    return root_of(one) is root_of(other)


def root_of(tensor: Tensor) -> Tensor:
    """Return the tensor that a view is of; what is made from memory shares no storage with it."""
    root: Tensor = getattr(tensor, "sparda_root", tensor)
    return root


def _own_version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _note_views(result: Any, tensors: list[Tensor]) -> dict[int, int]:
    """Note what results are views of; returns the index of that tensor by the result's id."""
    found: dict[int, int] = {}
    by_storage = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(tensors)}
    for value in leaves_of(result):
        if not isinstance(value, Tensor) or any(value is tensor for tensor in tensors):
            continue
        of = by_storage.get(value.untyped_storage()._cdata)
        if of is not None:
            value.sparda_root = root_of(tensors[of])  # type: ignore[attr-defined]
            found[id(value)] = of
    return found


# What comes of which arguments, under which settings of torch. It holds no tensor and no fake mode,
# so what one trace has seen serves the next one.
_SEEN: Final[dict[Any, dict[Any, Any]]] = {}
_MOST_SEEN: Final = 50_000


def _settings() -> tuple[Any, ...]:
    """Return what decides beside the arguments which shape, strides and dtype a result has."""
    sdp = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.is_inference_mode_enabled(),
        sdp.flash_sdp_enabled(),
        sdp.mem_efficient_sdp_enabled(),
        sdp.math_sdp_enabled(),
        sdp.cudnn_sdp_enabled(),
    )


class FakeRunner:
    """Runs functions on fake tensors, and remembers what comes of which shapes.

    A model repeats its layers, and models of one family each other's, so nearly every call has been
    seen before: its result is then made from what is remembered. All runners remember together.

    Args:
        fake_mode: Of the tensors.
    """

    def __init__(self, fake_mode: Any) -> None:
        self.fake_mode = fake_mode
        self._seen = _SEEN.setdefault(_settings(), {})

    @classmethod
    def of(cls, fake_mode: Any) -> FakeRunner:
        """Return the runner of a fake mode; it has one."""
        runner = getattr(fake_mode, "sparda_runner", None)
        if runner is None:
            runner = fake_mode.sparda_runner = cls(fake_mode)
        return runner

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function; the mode is active while it runs."""
        tensors: list[Tensor] = []
        parts: list[Any] = [function]
        known = freeze((args, kwargs), parts, tensors) and bool(tensors)
        key = tuple(parts)
        if known and key in self._seen:
            made, changed = self._seen[key]
            for i in changed:
                increment_version(root_of(tensors[i]))
            return self._made(made, tensors)
        if not known:
            tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [_own_version(tensor) for tensor in tensors]
        with self.fake_mode:
            result = function(*args, **kwargs)
        changed = [i for i, t in enumerate(tensors) if _own_version(t) != versions[i]]
        for i in changed:
            if root_of(tensors[i]) is not tensors[i]:
                increment_version(root_of(tensors[i]))
        views = _note_views(result, tensors)
        made = self._recipe(result, tensors, views) if known else None
        if made is not None:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[key] = made, changed
        return result

    def _recipe(self, result: Any, tensors: list[Tensor], views: dict[int, int]) -> Any:
        """Return how to make such a result again; None if it cannot be made from shapes."""
        recipe: list[Any] = []
        for value in leaves_of(result):
            if not isinstance(value, Tensor):
                if not isinstance(value, _PLAIN):
                    return None
                recipe.append(("value", value))
                continue
            same = [i for i, tensor in enumerate(tensors) if tensor is value]
            if same:
                recipe.append(("argument", same[0]))
            elif type(value) is not torch._subclasses.FakeTensor or value.constant is not None:
                return None
            else:
                spec = (tuple(value.shape), value.stride(), value.dtype, value.device)
                recipe.append(("tensor", (spec, views.get(id(value)))))
        return recipe, map_leaves(result, lambda _: None)

    def _made(self, made: Any, tensors: list[Tensor]) -> Any:
        recipe, form = made
        parts = iter(
            what
            if kind == "value"
            else tensors[what]
            if kind == "argument"
            else self._view(what, tensors)
            for kind, what in recipe
        )
        return map_leaves(form, lambda _: next(parts))

    def _view(self, form: Any, tensors: list[Tensor]) -> Tensor:
        spec, of = form
        made = self.new(*spec)
        if of is not None:
            made.sparda_root = root_of(tensors[of])  # type: ignore[attr-defined]
        return made

    def new(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: Any
    ) -> Tensor:
        """Return a new fake tensor."""
        from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

        with unset_fake_temporarily():
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            return FakeTensor(self.fake_mode, meta, device)


def freeze(value: Any, parts: list[Any], tensors: list[Tensor]) -> bool:
    """Write down what a result's shape depends on; False if that is not known."""
    if isinstance(value, Tensor):
        if getattr(value, "constant", None) is not None:
            return False
        parts += (value.dtype, value.shape, value.stride(), value.device)
        tensors.append(value)
    elif isinstance(value, _PLAIN):
        parts += (type(value), value)
    elif isinstance(value, (tuple, list)):
        parts += (type(value), len(value))
        return all(freeze(item, parts, tensors) for item in value)
    elif isinstance(value, dict):
        parts += (dict, *value)
        return all(freeze(item, parts, tensors) for item in value.values())
    elif isinstance(value, slice):
        parts.append(slice)
        return all(freeze(item, parts, tensors) for item in (value.start, value.stop, value.step))
    else:
        return False
    return True
