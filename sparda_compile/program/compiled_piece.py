"""One piece, compiled by Inductor.

    compile    `compile_fx`; the two open sizes, of the batch and of the prompt, stay symbols
    guards     what Inductor has assumed of these sizes: where that does not hold, another variant
               is compiled

Inductor keeps what it has compiled on disk: a second process compiles nothing.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.errors import PassError
from sparda_compile.program.compiler_errors import compiler_errors
from sparda_compile.progress import stage
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, Size, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CompiledPiece", "start_compiler"]

# Inductor compiles one piece at a time.
_LOCK: Final = threading.RLock()
# What an open size is compiled with. Always the same, so that a piece is the same whoever calls it
# first. So many tokens that Inductor indexes with 64 bits, which is right for any prompt: with 32
# bits, a prompt of 128K tokens would have it compile once more, and one of 1024 is no faster.
_EXAMPLE: Final = {BATCH_SIZE: 8, NUM_TOKENS: 1 << 20}
_PATCHES: Final = {
    # Else Inductor times its reductions and picks one: two programs of one model would round
    # their sums differently, and so would one program compiled twice.
    "deterministic": True,
    # Else what Inductor fuses decides where it rounds, and which products it adds without
    # rounding: a schedule would change the logits. So every op rounds as it does in eager.
    "emulate_precision_casts": True,
    # Else it compiles up to six forms of a kernel and times them, when it first runs and again in
    # every process. On an H200 one form is as fast, in a prefill and in a decode:
    # `benchmarks/results/2026-11-29-h200-piece-options.json`.
    "triton.autotune_pointwise": False,
}


# AOTAutograd keeps a graph on disk only if each method's tensor has this mark, as Dynamo gives it.
# Without it a second process would trace every piece again, 0.5 to 2.5 s each.
_META: Final[dict[str, Any]] = {"example_value": None}


def start_compiler(device: torch.device) -> None:
    """Start the processes in which Inductor compiles kernels for a GPU, and go on meanwhile.

    It starts them itself when it is first called, and until they are there, which takes seconds,
    it compiles one kernel after another.

    Args:
        device: Where pieces will run; on a CPU Inductor has no such processes.
    """
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


class CompiledPiece:
    """A piece that Inductor has compiled, in as many variants as sizes have asked for."""

    def __init__(
        self,
        name: str,
        graph_module: fx.GraphModule,
        sizes: tuple[str, ...],
        values: tuple[Tensor, ...],
    ) -> None:
        self.name = name
        self.num_variants = 0
        self._graph_module = graph_module
        self._sizes = sizes
        self._values = values
        self._variants: list[tuple[Callable[..., Any], _Guards]] = []
        self._chosen: dict[tuple[int, ...], Callable[..., Any]] = {}

    def compile(self) -> None:
        """Compile now, for usual sizes.

        Raises:
            BackendUnavailableError: If there is no compiler that works.
        """
        with _LOCK:
            if not self._variants:
                self._add({name: _EXAMPLE[name] for name in self._sizes})

    def __call__(self, *args: Any) -> Sequence[Tensor]:
        """Run on the open sizes and the inputs."""
        sizes = args[: len(self._sizes)]
        function = self._chosen.get(sizes)
        if function is None:
            function = self._choose(sizes)
        result: Sequence[Tensor] = function(*args)
        return result

    def _choose(self, sizes: tuple[int, ...]) -> Callable[..., Any]:
        self.compile()
        given = dict(zip(self._sizes, sizes, strict=True))
        with _LOCK:
            fitting = next((f for f, guards in self._variants if guards.hold(given)), None)
            if fitting is None:
                with stage("compile", f"{self.name} for other sizes"):
                    fitting = self._add(given)
            function = self._chosen[sizes] = fitting
        return function

    def _add(self, sizes: dict[str, int]) -> Callable[..., Any]:
        with compiler_errors():
            function, guards = _compile(self._graph_module, sizes, self._values)
        if not guards.hold(sizes):
            raise PassError(f"{self.name} was compiled for {sizes} and refuses these sizes.")
        self._variants.append((function, guards))
        self.num_variants += 1
        return function


@dataclasses.dataclass(frozen=True)
class _Guards:
    """What a compiler has assumed of the open sizes."""

    expressions: tuple[Any, ...]
    symbols: dict[str, Any]

    def hold(self, sizes: dict[str, int]) -> bool:
        """Whether it is so for these sizes."""
        values = {self.symbols[name]: number for name, number in sizes.items()}
        return all(bool(expression.xreplace(values)) for expression in self.expressions)


def _compile(
    graph_module: fx.GraphModule, sizes: dict[str, int], values: Sequence[Tensor]
) -> tuple[Callable[..., Any], _Guards]:
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=False)
    symbols = _symbols(fake_mode, sizes)
    batch, tokens = (symbols.get(name, 1) for name in (BATCH_SIZE, NUM_TOKENS))

    def real(number: int) -> Any:
        size: Size = size_of(int(number))
        return size.value(batch, tokens)

    inputs: list[Any] = list(symbols.values())
    with fake_mode:
        inputs += [_like(value, real) for value in values]
    graph = fx.Graph()
    output = graph.graph_copy(graph_module.graph, {})
    graph.output(output)
    for node in graph.nodes:
        node.meta = dict(_META)
    with tracing(TracingContext(fake_mode)), torch.no_grad():
        compiled = compile_fx(fx.GraphModule({}, graph), inputs, config_patches=dict(_PATCHES))
    expressions = tuple(guard.expr for guard in environment.guards)
    names = {name: symbol.node.expr for name, symbol in symbols.items()}
    return compiled, _Guards(expressions, names)  # type: ignore[return-value]


def _like(value: Tensor, real: Callable[[int], Any]) -> Tensor:
    """Return a tensor of the form of another, made of others where that one is.

    Args:
        value: The form; its sizes may be open.
        real: Gives a size in the place of each.
    """
    shape, strides = ([real(s) for s in given] for given in (value.shape, value.stride()))
    if not is_traceable_wrapper_subclass(value):
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    names, context = value.__tensor_flatten__()
    parts = {name: _like(getattr(value, name), real) for name in names}
    made: Tensor = type(value).__tensor_unflatten__(parts, context, shape, strides)
    return made


def _symbols(fake_mode: Any, sizes: dict[str, int]) -> dict[str, torch.SymInt]:
    """Return a symbol for each open size, compiled with that number as an example."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    if not sizes:
        return {}
    like = torch.empty(tuple(sizes.values()), device="meta")
    kinds = [DimDynamic.DYNAMIC] * len(sizes)
    fake = fake_mode.from_tensor(
        like, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)
    )
    return dict(zip(sizes, fake.shape, strict=True))
