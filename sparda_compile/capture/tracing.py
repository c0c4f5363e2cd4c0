"""One run of a model's forward on fake tensors, written down call by call.

Every torch function that the forward calls passes through a `TorchFunctionMode`: it is run on fake
tensors, which have shapes and no values, and noted with its arguments. Python between the calls
simply runs. That takes a thirtieth of the time of a tracer that reads bytecode, and what such a run
cannot see is refused: a value of a tensor that decides in Python has no value here, state that
the forward changes on its module is compared before and after, and `capture` runs the forward with
other sizes and compares the calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparda_compile.capture import collective_calls, lengths
from sparda_compile.capture.collective_calls import (
    SummedInPlace,
    collective_call,
    has_sharded,
    of_sharded,
    redistributing,
)
from sparda_compile.capture.lengths import Length, Lengths
from sparda_compile.capture.module_state import ModuleState
from sparda_compile.errors import CaptureError
from sparda_compile.graph import fake_runner
from sparda_compile.graph.fake_runner import (
    FakeRunner,
    leaves_of,
    map_leaves,
    share_memory,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from sparda_compile.capture.collective_calls import CollectiveCall

__all__ = ["Call", "Trace", "record"]

_TORCH_FOLDER: Final = os.path.dirname(torch.__file__) + os.sep
_OUR_FILES: Final = (
    __file__,
    fake_runner.__file__,
    collective_calls.__file__,
    os.path.join(os.path.dirname(__file__), "forward.py"),
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One torch function that was called.

    Attributes:
        function: What was called.
        args: Positional arguments, with fake tensors.
        kwargs: Named arguments.
        result: What came back.
        changed: The tensor that it changed in place, None for none.
        path: Path of the module whose forward made the call.
        module: Class of that module.
        where: File and line of the call.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    changed: Tensor | None
    path: str
    module: type
    where: str


@dataclasses.dataclass
class Trace:
    """What one run did.

    Attributes:
        calls: The calls, in order.
        tensors: Real tensors that the run read, by the id of the fake tensor that stood for them.
        inputs: The fake inputs.
        result: What the forward returned.
        runner: Has the fake mode of the run.
    """

    calls: list[Call]
    tensors: dict[int, tuple[Tensor, Tensor]]
    inputs: list[Tensor]
    result: Any
    runner: FakeRunner


class _Recorder(TorchFunctionMode):
    """Notes every torch function that is called."""

    def __init__(self, runner: FakeRunner, tokens: int) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.modules: list[tuple[str, type]] = []
        self.lengths = Lengths(tokens, _caller)
        self._runner = runner
        self._fakes: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._summed = SummedInPlace()

    def fake(self, tensor: Tensor) -> Tensor:
        """Return what stands for a tensor in the run."""
        if isinstance(tensor, torch._subclasses.FakeTensor):
            return self._summed.known(tensor)
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise CaptureError("it uses torch.func or torch.vmap, which is not traced")
        if id(tensor) not in self._fakes:
            fake = self._runner.fake_mode.from_tensor(tensor, static_shapes=True)
            self._fakes[id(tensor)] = fake
            self._versions[id(fake)] = version_of(fake)
            self.tensors[id(fake)] = (fake, tensor)
        return self._fakes[id(tensor)]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func is torch._C._set_grad_enabled:
            return func(*args)
        if has_sharded(args, kwargs):
            return of_sharded(func, args, kwargs or {}, self)
        args, kwargs = map_leaves((args, kwargs or {}), self._stand_in)
        assert kwargs is not None
        if func is Tensor.view_as and args[0] is args[1]:
            return args[0]  # as a DTensor does with its local part
        collective = collective_call(func, args, kwargs)
        if collective is not None:
            return self._together(collective)
        if name == "__get__" and func.__self__.__name__ in ("shape", "dtype", "device"):
            return self.lengths.wrap(func(*args))
        given = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [version_of(tensor) for tensor in given]
        result = self._runner.run(func, args, kwargs)
        if name == "size":
            return self.lengths.wrap(result)
        results = [r for r in leaves_of(result) if isinstance(r, Tensor)]
        if name == "__set__":
            raise CaptureError(f"it sets {func.__self__.__name__} of a tensor")
        written = [t for t, v in zip(given, versions, strict=True) if version_of(t) != v]
        if not written and _is_in_place(name):
            written = [args[0]]
        changed = _changed(name, written, given, results)
        given_ids = {id(tensor) for tensor in given}
        is_new = any(id(r) not in given_ids for r in results)
        if changed is not None or is_new:
            self._check_autocast(args)
            self._note(func, args, kwargs, result, changed)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, changed: Tensor | None
    ) -> None:
        self._summed.follow(args, kwargs, result)
        path, module = self.modules[-1] if self.modules else ("", nn.Module)
        self.calls.append(Call(func, args, kwargs, result, changed, path, module, _caller()))

    def _together(self, found: CollectiveCall) -> Any:
        """Note a collective; one that changes its tensor in place is noted as one that does not."""
        tensor = found.args[0]
        if found.op is None:
            return tensor
        result = self._runner.run(found.op, found.args, {})
        self._note(found.op, found.args, {}, result, tensor if found.is_in_place else None)
        if not found.is_in_place:
            return result
        self._summed.add(tensor)
        return None

    def changed_weight(self, model: nn.Module) -> str:
        """Say which parameter, buffer or constant the run changed in place; empty for none."""
        names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
        for fake, tensor in self.tensors.values():
            if version_of(fake) != self._versions[id(fake)]:
                name = names.get(id(tensor), "a tensor that it keeps")
                return (
                    f"it changes {name} in place, which a compiled program would not do again; "
                    "compute what it needs from the arguments"
                )
        return ""

    def _stand_in(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.fake(leaf)
        return int(leaf) if isinstance(leaf, Length) else leaf

    def _check_autocast(self, args: Any) -> None:
        for leaf in args:
            kind = leaf.device.type if isinstance(leaf, Tensor) else ""
            if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
                raise CaptureError("it computes under torch.autocast, which is not traced")


def _changed(
    name: str, written: list[Tensor], given: list[Tensor], results: list[Tensor]
) -> Tensor | None:
    """Return the one tensor that a call changed in place, None for none.

    Args:
        name: Of the function.
        written: What it was given and has changed; a view of what it changed is there too.
        given: All that it was given.
        results: What it returned.

    Raises:
        CaptureError: If there are several, or it changed one and returned another.
    """
    if not written:
        return None
    changed = given[0] if name == "__setitem__" else next(iter(results), None)
    if changed is None or any(not share_memory(tensor, changed) for tensor in written):
        raise CaptureError(f"{name} changes tensors in place beside the one that it returns")
    return changed


def _is_in_place(name: str) -> bool:
    is_method = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return is_method or (name.startswith("__i") and name[3:-2] in _IN_PLACE)


_IN_PLACE: Final = frozenset(
    {
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    }
)


def _caller() -> str:
    """Return the file and line, outside of torch, that made the present call."""
    frame = sys._getframe(1)
    passed = (_TORCH_FOLDER, __file__, lengths.__file__, collective_calls.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(passed):
        frame = frame.f_back
    code = frame.f_code
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'


def record(
    step: Callable[..., Any],
    model: nn.Module,
    inputs: Callable[[Any], list[Tensor]],
    *,
    tokens: int = 1,
    limits: Collection[int] = (),
) -> Trace:
    """Run a forward on fake tensors.

    Args:
        step: Calls the model.
        model: Its modules give the calls their paths.
        inputs: Makes the fake inputs, given the fake mode.
        tokens: Tokens of the prompt.
        limits: Lengths with which the prompt's may be compared: sliding windows, which mean the
            same for a prompt that fits.

    Raises:
        CaptureError: If it depends on values of tensors, or changes state of its modules.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    runner = FakeRunner.of(FakeTensorMode(allow_non_fake_inputs=False))
    recorder = _Recorder(runner, tokens)
    given = inputs(runner.fake_mode)
    before = ModuleState(model)
    reason, cause = "", None
    try:
        with (
            _paths(model, recorder),
            _as_compiling(),
            _quiet(),
            redistributing(),
            torch.no_grad(),
            runner.fake_mode,
            recorder,
        ):
            result = step(*given)
    except Exception as error:  # noqa: BLE001 - whatever it is, there is no graph
        reason, cause = _reason(error, tokens), error
    changed = before.restore() or recorder.changed_weight(model)
    reason = reason or changed or _by_length(recorder.lengths, limits)
    if reason:
        raise CaptureError(
            f"{type(model).__name__}: cannot trace forward as one graph: {reason.rstrip('.')}."
        ) from cause
    return Trace(recorder.calls, recorder.tensors, given, result, runner)


def _by_length(lengths: Lengths, limits: Collection[int]) -> str:
    """Say with what a forward compares the prompt's length; empty for nothing that matters."""
    for limit, where in lengths.compared.items():
        if not any(abs(limit - known) <= 1 for known in limits):
            return (
                f"it decides by the prompt's length, with a limit at {limit} tokens ({where}), and "
                "one graph serves every length"
            )
    return ""


def _reason(error: Exception, tokens: int) -> str:
    kind = type(error).__name__
    line = next((x for x in str(error).splitlines() if x.strip()), kind)
    if kind in ("DataDependentOutputException", "DynamicOutputShapeException"):
        line = f"{line} needs the values of a tensor, and Python decides by them"
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith((_TORCH_FOLDER, *_OUR_FILES)):
            frames.append(f"{code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    where = f" ({frames[-1]})" if frames else ""
    if tokens > 1 and str(tokens) in line:
        line += (
            f". A prompt of {tokens} tokens stands for one of any length: a table of positions has "
            "to be gathered by position_ids, not cut to the prompt's length"
        )
    return f"{line}{where}"


@contextlib.contextmanager
def _paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Let the recorder know which module's forward runs."""
    handles = []
    for name, module in model.named_modules():
        place = (name, type(module))

        def enter(*_: Any, place: tuple[str, type] = place) -> None:
            recorder.modules.append(place)

        def leave(*_: Any) -> None:
            recorder.modules.pop()

        handles += [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_compiling() -> Iterator[None]:
    """Let `torch.compiler.is_compiling()` say yes, as it does for every tracer of torch."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging an error that is raised anyway, as a sentence."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_nothing)
    try:
        yield
    finally:
        log.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False
