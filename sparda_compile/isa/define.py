"""`define`: the one way to make an op. Its function is the op; the decorator says what it is.

    @define(mutates=("pages",), starts=True, work=Work.TO_DEVICE, kernels=("_gather",),
            fake=lambda a: a.pages.new_empty(0))
    def prefetch_blocks(miss_blocks: Tensor, ..., event: int, stream: int = COPY) -> Tensor:
        ...

The function does its work on any device, through `engines.current_engine` if it may leave the
compute stream. What it returns for fake tensors is said by `fake`, from the same arguments.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.errors import PassError
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import INSTRUCTIONS, Instruction, Work, instruction_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sparda_compile.isa.table import Part

__all__ = ["define", "implementation"]


def define(
    *,
    mutates: Sequence[str] = (),
    fake: Callable[[Any], Any] | None = None,
    stream: int = COMPUTE,
    results: Sequence[str] = (),
    starts: bool = False,
    waits: bool = False,
    forks: bool = False,
    work: Work = Work.TOUCHED,
    kernels: Sequence[str] = (),
    prompt_copies: Sequence[str] = (),
    launched: Callable[[Mapping[str, Any], int], tuple[str, ...]] | None = None,
    parts: Sequence[Part] = (),
    before: Sequence[str] = (),
    behind: Sequence[str] = (),
    latency_us: float | None = None,
    is_free: bool = False,
    is_marker: bool = False,
    is_collective: bool = False,
    is_for_later: bool = False,
    workspace: Callable[[Any], int] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an op `sparda::<its name>` and enter it in the table of instructions.

    Args:
        mutates: Names of the arguments that it writes.
        fake: Returns fake results from the arguments, given as attributes; None where nothing is
            returned.
        stream: Where it runs. A function with an argument `stream` runs where that says.
        results: Names of its results, if there are several.
        starts: Whether it records its argument `event`.
        waits: Whether it waits for its argument `event`.
        forks: Whether it only marks where side streams may go on.
        work: What its time is made of.
        kernels: Kernels that it may launch in a decode step.
        prompt_copies: Kernels by which it copies blocks in a prefill.
        launched: Says which of them it does launch; see `Instruction`.
        parts: The parts of tensors that it uses.
        before: Ops of a layer that come behind it.
        behind: Ops of a layer that come before it.
        latency_us: What it takes beside its bytes where a machine does not say.
        is_free: Whether a layer may have any number of it; else `passes/check/grammar.py` says how
            many.
        is_marker: Whether it marks a place in a captured graph; no program has it.
        is_collective: Whether all ranks of a process group do it together: it belongs to no layer,
            and keeps its place among the others of its kind.
        is_for_later: Whether only later steps use what it does, so that it may run while this one
            waits.
        workspace: Returns the most bytes that it takes on a GPU beside its results, from the
            arguments, given as attributes; None where that is next to nothing.

    Returns:
        A decorator; it returns the op of `torch.library`.

    Raises:
        PassError: If an op of that name was defined before, or what it writes has a default.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = function.__name__
        if name in INSTRUCTIONS:
            raise PassError(f"sparda::{name} is defined already; give the op another name.")
        signature = inspect.signature(function)
        _check_written(name, mutates, signature)
        op = torch.library.custom_op(f"sparda::{name}", function, mutates_args=tuple(mutates))

        op.register_fake(_by_name(fake, signature) or (lambda *_, **__: None))
        INSTRUCTIONS[name] = Instruction(
            name=name,
            op=op,
            stream=None if "stream" in signature.parameters else stream,
            results=tuple(results),
            starts=starts,
            waits=waits,
            forks=forks,
            work=work,
            kernels=tuple(kernels),
            prompt_copies=tuple(prompt_copies),
            launched=launched,
            parts=tuple(parts),
            before=tuple(before),
            behind=tuple(behind),
            latency_us=latency_us,
            is_free=is_free,
            is_marker=is_marker,
            is_collective=is_collective,
            is_for_later=is_for_later,
            workspace=_by_name(workspace, signature),
        )
        instruction_of.cache_clear()
        return op

    return decorate


def _check_written(name: str, mutates: Sequence[str], signature: inspect.Signature) -> None:
    for argument in mutates:
        if signature.parameters[argument].default is not inspect.Parameter.empty:
            raise PassError(
                f"sparda::{name} writes {argument}, which has a default: torch 2.11 fails where an "
                f"argument that is written is left out. Take the default away."
            )


def _by_name(
    function: Callable[[Any], Any] | None, signature: inspect.Signature
) -> Callable[..., Any] | None:
    """Return a function of an op's arguments for one that takes them as attributes."""
    if function is None:
        return None

    def of_arguments(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(SimpleNamespace(**bound.arguments))

    return of_arguments


def implementation(target: Any) -> Callable[..., Any]:
    """Return the Python function of an op, which is what its dispatcher calls.

    The dispatcher takes about 0.1 ms a call, for autograd and for modes, which a step has not.
    """
    instruction = instruction_of(target)
    assert instruction is not None, f"{target} is no instruction"
    function: Callable[..., Any] = instruction.op._init_fn
    return function
