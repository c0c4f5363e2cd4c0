"""How much GPU memory a prompt takes while it is read, worked out before it runs.

    live       results that a later call takes, by the order of the lowered calls
    + a call   its results, and what it takes on its way: of a piece what one slice computes, of an
               op what it says (`workspace` in the table of instructions)

The largest of these sums is the peak. Sizes are those of fake tensors with numbers put in, so
nothing is allocated. Beside it are weights and the KV cache, which do not depend on the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparda_compile.graph.effects import instruction
from sparda_compile.graph.fake_runner import FakeRunner, map_leaves
from sparda_compile.graph.nodes import fake_value
from sparda_compile.graph.writer import MAY_HIDE, NUM_PAST
from sparda_compile.program.lower import Register, lower
from sparda_compile.program.piece_memory import num_bytes, piece_bytes
from sparda_compile.program.slices import SlicedPiece
from sparda_compile.report.model import PromptMemory
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, concrete

if TYPE_CHECKING:
    from torch import fx

    from sparda_compile.program.lower import Call, LoweredProgram
    from sparda_compile.program.plan import Plan

__all__ = ["prompt_memory"]


def prompt_memory(
    plan: Plan,
    num_tokens: int,
    num_past: int = 0,
    *,
    may_hide: bool = False,
    program: LoweredProgram | None = None,
) -> PromptMemory:
    """Work out the memory of a prompt.

    Args:
        plan: Of a prefill.
        num_tokens: Columns that are read at once, two or more.
        num_past: Tokens in the cache.
        may_hide: Whether some token may be padding.
        program: The plan's calls, where they are at hand.
    """
    lowering = plan.layout.config.lowering
    program = program or lower(plan.graph_module, "eager")
    inputs = [n for n in plan.graph_module.graph.nodes if n.op == "placeholder"]
    batch = plan.layout.batch_size
    given = {BATCH_SIZE: batch, NUM_TOKENS: num_tokens, NUM_PAST: num_past, MAY_HIDE: may_hide}
    return _Walk(program, inputs, given, lowering).run()


class _Walk:
    """Goes through the calls of a program with fake values."""

    def __init__(
        self, program: LoweredProgram, inputs: list[fx.Node], given: dict[str, int], lowering: str
    ) -> None:
        self._program = program
        self._lowering = lowering
        self._sizes = given[BATCH_SIZE], given[NUM_TOKENS]
        some: Any = next(v for n in inputs if isinstance(v := fake_value(n), Tensor))
        self._runner = FakeRunner.of(some.fake_mode)
        self._values: dict[int, Any] = {
            i: given[node.name] if node.name in given else self._numbered(fake_value(node))
            for i, node in enumerate(inputs)
        }
        self._held: dict[int, int] = {}
        self._pieces: dict[tuple[str, int], int] = {}

    def run(self) -> PromptMemory:
        peak, peak_call = 0, ""
        for call in self._program.calls:
            taken = self._call(call)
            reused = self._reused(call)
            for register in call.results:
                size = num_bytes(self._values[register], *self._sizes)
                self._held[register] = self._held.pop(reused.get(register, -1), size)
            most = sum(self._held.values()) + taken
            if most > peak:
                peak, peak_call = most, call.name
            for register in call.frees:
                self._held.pop(register, None)
                self._values[register] = None
        logits = num_bytes(self._values[self._program.result], *self._sizes)
        return PromptMemory(self._sizes[1], peak, peak_call, self._whole(), logits)

    def _call(self, call: Call) -> int:
        """Note the results of a call; returns what it takes beside them."""
        if call.node is None:
            assert call.piece is not None
            for register, node in zip(call.results, call.piece.outputs, strict=True):
                self._values[register] = self._numbered(fake_value(node))
            return self._taken_by(call)
        args, kwargs = map_leaves((call.args, call.kwargs), self._value)
        result = self._runner.run(call.node.target, args, kwargs)  # type: ignore[arg-type]
        results = result if call.is_tuple else (result,)
        self._values |= dict(zip(call.results, results, strict=False))
        it = instruction(call.node)
        return it.workspace(*args, **kwargs) if it is not None and it.workspace else 0

    def _taken_by(self, call: Call) -> int:
        piece, (batch, tokens) = call.piece, self._sizes
        assert piece is not None
        sliced = self._sliced(call)
        if sliced is not None:
            tokens = sliced.most_tokens(batch, tokens)
        key = piece.key, tokens
        if key not in self._pieces:
            self._pieces[key] = piece_bytes(piece, self._lowering, batch, tokens)
        taken = self._pieces[key]
        if sliced is not None:
            return taken + sliced.copied_bytes(*self._sizes)
        # Its results are counted already.
        return taken - sum(num_bytes(self._values[r], *self._sizes) for r in call.results)

    def _sliced(self, call: Call) -> SlicedPiece | None:
        """Return the piece of a call if it runs in slices."""
        piece = call.function
        return piece if isinstance(piece, SlicedPiece) and piece.is_sliced(*self._sizes) else None

    def _reused(self, call: Call) -> dict[int, int]:
        """Return the results that take the memory of another register, each with it."""
        if call.piece is None:
            return dict(call.reuses)
        piece = self._sliced(call)
        if piece is None:
            return {}
        places = {register: i for i, register in enumerate(call.results)}
        return {to: source for to, source in call.reuses if piece.takes_memory(places[to])}

    def _whole(self) -> tuple[tuple[str, str], ...]:
        functions = [call.function for call in self._program.calls]
        found = {f.name: f.reason for f in functions if isinstance(f, SlicedPiece) and f.reason}
        return tuple(found.items())

    def _value(self, leaf: Any) -> Any:
        return self._values[leaf] if type(leaf) is Register else leaf

    def _numbered(self, value: Any) -> Any:
        """Return a fake tensor with numbers for the open sizes."""
        if not isinstance(value, Tensor):
            return value
        shape, strides = (concrete(n, *self._sizes) for n in (value.shape, value.stride()))
        return self._runner.new(shape, strides, value.dtype, value.device)
