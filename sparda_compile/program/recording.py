"""One run of a program, call by call: streams, events, storages used and let go of."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.graph.effects import (
    bound_arguments,
    instruction,
)
from sparda_compile.graph.fake_runner import leaves_of
from sparda_compile.isa.engines import Engine, current_engine, use_engine
from sparda_compile.isa.streams import COMPUTE, COPY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

    from sparda_compile.program.lower import Call, LoweredProgram


__all__ = ["Observer", "Record", "Recording", "record_run"]


class Observer(Protocol):
    """Is told of each call of a program."""

    def begin(self, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note a call that is about to be made."""

    def end(self, call: Call, results: Sequence[Any]) -> None:
        """Note what a call returned."""


@dataclasses.dataclass
class Record:
    """One call as it ran.

    Attributes:
        name: Of the op's node, or of the piece.
        node: Node of the op; None for a piece.
        streams: Streams that work was submitted to.
        starts: Events that were recorded, each with the stream that it marks.
        waits: Events that were waited for, each with the stream that waits.
        takes: Storages of each argument, by the argument's name; 0 for an empty tensor.
        returns: Storages of the results, likewise.
        frees: Storages that the program let go of behind the call.
        reused: Storages that it took and wrote its results to.
        overwritten: Those of them that a later call takes as they were.
    """

    name: str
    node: fx.Node | None
    streams: list[int] = dataclasses.field(default_factory=list)
    starts: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    waits: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    takes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    returns: list[int] = dataclasses.field(default_factory=list)
    frees: list[int] = dataclasses.field(default_factory=list)
    reused: list[int] = dataclasses.field(default_factory=list)
    overwritten: list[int] = dataclasses.field(default_factory=list)

    @property
    def stream(self) -> int:
        """Where the work ran; of what only marks or waits, the stream that does."""
        marked = [stream for _, stream in (*self.starts, *self.waits)]
        return next(iter((*self.streams, *marked)), COMPUTE)

    def accesses(self) -> dict[int, bool]:
        """Return each storage that the work uses, and whether it writes it."""
        if self.node is None:
            mine = dict.fromkeys(itertools.chain(*self.takes.values()), False)
            made = {storage: True for storage in self.returns if storage not in mine}
            return _without_empty({**mine, **made, **dict.fromkeys(self.reused, True)})
        it = instruction(self.node)
        if it is not None and it.forks:
            return {}
        found: dict[int, bool] = {}
        for name, is_write, _ in bound_arguments(self.node):
            # A wait uses nothing: it names what is free to use behind it.
            if name in ("keepalive", "ticket", "after"):
                continue
            for storage in self.takes.get(name, ()):
                found[storage] = found.get(storage, False) or is_write
        return _without_empty({**found, **dict.fromkeys(self.returns, True)})


def _without_empty(storages: dict[int, bool]) -> dict[int, bool]:
    return {storage: is_write for storage, is_write in storages.items() if storage}


@dataclasses.dataclass
class Recording:
    """A run: its calls, and the storages of the state that it was given, by name."""

    records: list[Record]
    state: dict[str, int]


class _Recorder:
    """An engine around the real one, and the observer of the calls."""

    def __init__(self, engine: Engine) -> None:
        self.records: list[Record] = []
        self._engine = engine
        self._owners: dict[int, set[int]] = {}  # storage -> registers
        self._storages: dict[int, int] = {}  # register -> storage
        self._given: Sequence[Any] = ()  # what the call that runs was given

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Note the stream and pass the work on."""
        self.records[-1].streams.append(stream)
        self._engine.submit(stream, work)

    def record(self, event: int, stream: int = COPY) -> None:
        """Note the event and pass it on."""
        self.records[-1].starts.append((event, stream))
        self._engine.record(event, stream)

    def wait(self, event: int, stream: int = COMPUTE) -> None:
        """Note the event and pass it on."""
        self.records[-1].waits.append((event, stream))
        self._engine.wait(event, stream)

    def begin(self, call: Call, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note what a call takes."""
        record = Record(call.name, call.node)
        self._given = args
        if call.node is None:
            record.takes["inputs"] = [_storage(a) for a in args if isinstance(a, Tensor)]
        else:
            names = [name for name, _, _ in bound_arguments(call.node)]
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                record.takes[name] = [
                    _storage(leaf) for leaf in leaves_of(value) if isinstance(leaf, Tensor)
                ]
        self.records.append(record)

    def end(self, call: Call, results: Sequence[Any]) -> None:
        """Note what a call returned, and what the program lets go of."""
        record, sources = self.records[-1], dict(call.reuses)
        for register, result in zip(call.results, results, strict=False):
            storage = _storage(result) if isinstance(result, Tensor) else 0
            record.returns.append(storage)
            # A view of an input is another object, and nothing was written.
            is_same = any(result is given for given in self._given)
            if is_same and storage and storage == self._storages.get(sources.get(register, -1)):
                record.reused.append(storage)
                if self._owners[storage] - {*call.frees}:
                    record.overwritten.append(storage)
            if storage:
                self._storages[register] = storage
                self._owners.setdefault(storage, set()).add(register)
        self._given = ()
        for register in call.frees:
            storage = self._storages.pop(register, 0)
            if storage:
                self._owners[storage].discard(register)
                if not self._owners[storage]:
                    record.frees.append(storage)


def _storage(tensor: Tensor) -> int:
    """Return what tells a tensor's memory apart, 0 for an empty tensor.

    One that is made of others, as quantised weights are, is told apart by its first.
    """
    while is_traceable_wrapper_subclass(tensor):
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0


def record_run(program: LoweredProgram, inputs: Sequence[Any]) -> tuple[Tensor, Recording]:
    """Run a program on the engine of the moment and record what it did.

    Args:
        program: What to run.
        inputs: Its inputs.

    Returns:
        The logits, and the recording.
    """
    recorder = _Recorder(current_engine())
    with use_engine(recorder):
        logits = program.run(inputs, recorder)
    state = {
        name: _storage(value)
        for name, value in zip(program.names, inputs, strict=False)
        if isinstance(value, Tensor)
    }
    return logits, Recording(recorder.records, state)
