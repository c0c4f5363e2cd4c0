"""Stage 6: the verified graph becomes a list of calls.

    cut      at the ops `sparda::*`; what lies between them is pure and becomes a piece
    compile  each different piece once, by Inductor (`pieces.py`), those too that an op runs;
             `lowering="eager"` runs a piece's own Python instead
    run      pieces and ops one after another, in the order of the graph, on tensors held here; of
             an op, the function that its dispatcher would call; pieces of a long prompt in slices
             (`slices.py`)

So nothing that moves bytes passes through a compiler: no node is moved, copied or fused away, and a
value is one tensor for everybody. A tensor is held until the last call that takes it. A wait takes
what side streams use until then, so nothing of that is freed before. `run_proof.py` checks it on
the first run of every program.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.graph.fake_runner import leaves_of, map_leaves
from sparda_compile.graph.nodes import call_name, changes_in_place, fake_value, is_sparda
from sparda_compile.graph.pure_part import form_of
from sparda_compile.isa.define import implementation
from sparda_compile.kernels.run_piece import running
from sparda_compile.passes.schedule.kernels_of import VIEWS
from sparda_compile.program.pieces import Piece, make_piece, piece_of_op
from sparda_compile.program.slices import SlicedPiece
from sparda_compile.ranks.collectives import sum_in_place
from sparda_compile.sizes import NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sparda_compile.program.recording import Observer

__all__ = ["Call", "LoweredProgram", "Register", "lower", "split_graph"]

_SUM: Final = "sparda.all_reduce"
_PIECE: Final = "sparda.run_piece"
_PRODUCTS: Final = frozenset({"linear", "addmm", "matmul"})


@dataclasses.dataclass
class Call:
    """One call of a lowered program. Registers are numbers of values.

    Attributes:
        name: Of the op's node, or of the piece.
        function: What is called.
        args: Positional arguments, `Register` in the place of a value.
        kwargs: Named arguments, likewise.
        results: Registers of the results; None for a result that nobody takes.
        is_tuple: Whether what is returned is a tuple of them.
        frees: Registers that nobody takes any more.
        reuses: Results that may take the memory of a register that is freed here, each with it.
        node: Node of the op; None for a piece.
        piece: The piece, also that which an op runs; None for another op.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    is_tuple: bool
    frees: tuple[int, ...] = ()
    reuses: tuple[tuple[int, int], ...] = ()
    node: fx.Node | None = None
    piece: Piece | None = None


class Register(int):
    """Number of a value of a lowered program."""


class LoweredProgram:
    """Calls in order.

    Attributes:
        calls: What is called.
        names: Name of the node of each register; inputs come first.
        num_inputs: Registers that a run is given.
        result: Register of the logits.
        failed: The call that the last run to fail has failed in.
    """

    def __init__(
        self, calls: Sequence[Call], names: Sequence[str], num_inputs: int, result: int
    ) -> None:
        self.calls = list(calls)
        self.names = list(names)
        self.num_inputs = num_inputs
        self.result = result
        self.failed: Call | None = None

    def pieces(self) -> list[Piece]:
        """Return the different pieces, in the order of their first call."""
        found = [call.piece for call in self.calls if call.piece is not None]
        return list({piece.key: piece for piece in found}.values())

    def run(self, inputs: Sequence[Any], observer: Observer | None = None) -> Tensor:
        """Run the calls.

        Args:
            inputs: Values of the graph's placeholders, in order.
            observer: Told of every call, if there is one.

        Returns:
            The logits.
        """
        values: list[Any] = [*inputs, *[None] * (len(self.names) - len(inputs))]
        call = None

        def value(leaf: Any) -> Any:
            return values[leaf] if type(leaf) is Register else leaf

        try:
            with torch.no_grad():
                for call in self.calls:
                    args = _filled(call.args, values)
                    kwargs = map_leaves(call.kwargs, value) if call.kwargs else {}
                    if observer is not None:
                        observer.begin(call, args, kwargs)
                    result = call.function(*args, **kwargs)
                    results = result if call.is_tuple else (result,)
                    for i, register in enumerate(call.results):
                        values[register] = results[i]
                    if observer is not None:
                        observer.end(call, results)
                    del result, results, args, kwargs
                    for register in call.frees:
                        values[register] = None
        except BaseException:
            self.failed = call
            raise
        logits: Tensor = values[self.result]
        return logits


def _filled(args: tuple[Any, ...], values: list[Any]) -> list[Any]:
    """Return arguments with values in the place of registers; lists of them are one level deep."""
    return [
        values[a]
        if type(a) is Register
        else [values[x] if type(x) is Register else x for x in a]
        if type(a) is list
        else a
        for a in args
    ]


def lower(gm: fx.GraphModule, lowering: str) -> LoweredProgram:
    """Return the calls of a verified graph.

    Args:
        gm: The graph; its placeholders are the inputs, in order.
        lowering: `inductor` or `eager`.

    Raises:
        PassError: If a part of it cannot be a piece.
    """
    return _Lowering(gm.graph, lowering).program()


def split_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with each piece as a submodule, to look at; equal pieces are one."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    module = fx.GraphModule({}, fx.Graph())
    for part in _cut(gm.graph):
        if isinstance(part, fx.Node):
            mapping[part] = graph.node_copy(part, lambda n: mapping[n])
            mapping[part].name = part.name
            continue
        if not hasattr(module, part.name):
            module.add_submodule(part.name, part.graph_module)
        sizes = [n for name in part.sizes for n in mapping if n.name == name]
        args = tuple(mapping[n] for n in (*sizes, *part.inputs))
        call = graph.call_module(part.name, args)
        call.meta["val"] = tuple(fake_value(n) for n in part.outputs)
        for i, node in enumerate(part.outputs):
            mapping[node] = graph.call_function(operator.getitem, (call, i))
            mapping[node].meta["val"] = fake_value(node)
            mapping[node].name = node.name
    module.graph = graph
    return module


def _cut(graph: fx.Graph) -> Iterator[fx.Node | Piece]:
    """Yield placeholders, ops of ours with what chooses from their results, pieces, the output."""
    run: list[fx.Node] = []
    taken: set[fx.Node] = set()

    def piece() -> Iterator[Piece]:
        inside = set(run)
        live = [n for n in run if n.users or changes_in_place(n)]
        outputs = [n for n in live if any(user not in inside for user in n.users)]
        if outputs:
            yield make_piece(live, outputs)
        run.clear()

    for node in graph.nodes:
        if node in taken or _is_number(node):
            continue
        if node.op in ("placeholder", "output") or is_sparda(node) or _is_choice(node):
            if not (node.op == "placeholder" or _is_choice(node)):
                yield from piece()
            yield node
            continue
        run.append(node)
        if isinstance(fake_value(node), (tuple, list)):
            # Its results go on as tensors, each by itself.
            run += node.users
            taken |= set(node.users)


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a size; a piece that takes it computes it again."""
    return node.op == "call_function" and isinstance(fake_value(node), int)


def _is_choice(node: fx.Node) -> bool:
    """Whether a node chooses one result of an op of ours."""
    return call_name(node) == "getitem" and is_sparda(node.all_input_nodes[0])


class _Lowering:
    """Turns a graph into calls."""

    def __init__(self, graph: fx.Graph, lowering: str) -> None:
        self._graph = graph
        self._lowering = lowering
        self._registers: dict[fx.Node | _Unused, Register] = {}
        self._inputs: dict[str, Register] = {}
        self._calls: list[Call] = []

    def program(self) -> LoweredProgram:
        result = -1
        for part in _cut(self._graph):
            if isinstance(part, Piece):
                self._add_piece(part)
            elif part.op == "placeholder":
                self._inputs[part.name] = self._register(part)
            elif part.op == "output":
                outputs: Any = part.args[0]
                result = self._registers[outputs[0]]
            elif not _is_choice(part):
                self._add_op(part)
        names = [node.name for node in self._registers]
        program = LoweredProgram(self._calls, names, len(self._inputs), result)
        set_frees(program)
        nodes = [*self._registers]
        _set_slices(program, nodes)
        _set_sums(program, nodes)
        return program

    def _register(self, node: fx.Node | _Unused) -> Register:
        self._registers[node] = Register(len(self._registers))
        return self._registers[node]

    def _add_piece(self, piece: Piece) -> None:
        sizes = [self._inputs[name] for name in piece.sizes]
        args = (*sizes, *(self._registers[node] for node in piece.inputs))
        results = tuple(self._register(node) for node in piece.outputs)
        self._calls.append(
            Call(piece.name, piece.callable(self._lowering), args, {}, results, True, piece=piece)
        )

    def _add_op(self, node: fx.Node) -> None:
        def value(leaf: Any) -> Any:
            return self._registers[leaf] if isinstance(leaf, fx.Node) else leaf

        args = tuple(
            list(map_leaves(a, value)) if isinstance(a, (list, tuple)) else value(a)
            for a in node.args
        )
        kwargs = map_leaves(dict(node.kwargs), value)
        made = fake_value(node)
        is_tuple = isinstance(made, (tuple, list))
        if is_tuple:
            items = {user.args[1]: user for user in node.users}
            results = tuple(
                self._register(items.get(i, _Unused(node, i))) for i in range(len(made))
            )
        else:
            results = (self._register(node),)
        call = Call(
            node.name, implementation(node.target), args, kwargs, results, is_tuple, node=node
        )
        if call_name(node) == _PIECE:
            call.piece = piece_of_op(node)
            call.function = running(call.piece.callable(self._lowering))
        self._calls.append(call)


@dataclasses.dataclass(frozen=True)
class _Unused:
    """Stands for a result that no node chooses."""

    node: fx.Node
    index: int

    @property
    def name(self) -> str:
        return f"{self.node.name}[{self.index}]"


def set_frees(program: LoweredProgram) -> None:
    """Let each call free the registers that no later one takes."""
    last: dict[int, int] = {}
    for i, call in enumerate(program.calls):
        taken = [leaf for leaf in leaves_of((call.args, call.kwargs)) if type(leaf) is Register]
        for register in (*call.results, *taken):
            last[register] = i
    frees: dict[int, list[int]] = {}
    for register, i in last.items():
        if register >= program.num_inputs and register != program.result:
            frees.setdefault(i, []).append(register)
    for i, call in enumerate(program.calls):
        call.frees = tuple(sorted(frees.get(i, ())))


def _set_slices(program: LoweredProgram, nodes: Sequence[fx.Node | _Unused]) -> None:
    """Let pieces with tokens run in slices, and their results take memory that is free."""
    makers: dict[int, SlicedPiece] = {}
    for call in program.calls:
        piece = call.piece
        if piece is None or NUM_TOKENS not in piece.sizes:
            continue
        free = [r for r in call.frees if r in makers]
        for result in call.results:
            same = [r for r in free if _is_of_one_form(nodes[r], nodes[result])]
            if same:
                call.reuses += ((result, same[0]),)
                free.remove(same[0])
        places = {
            call.results.index(result): (call.args.index(source) - len(piece.sizes), makers[source])
            for result, source in call.reuses
        }
        call.function = SlicedPiece(piece, call.function, places)
        makers |= dict.fromkeys(call.results, call.function)


def _set_sums(program: LoweredProgram, nodes: Sequence[fx.Node | _Unused]) -> None:
    """Let a sum over ranks take the memory of its summand, where that is nobody else's."""
    makers = {register: call for call in program.calls for register in call.results}
    for call in program.calls:
        summand = call.args[0] if call.node is not None and call_name(call.node) == _SUM else None
        if summand not in call.frees or makers[summand].piece is None:
            continue
        beside = [nodes[r] for r in makers[summand].results if r != summand]
        if _is_product(nodes[summand]) and all(
            _base(node) is not nodes[summand] for node in beside
        ):
            call.function = sum_in_place
            call.reuses = ((call.results[0], summand),)


def _is_product(node: fx.Node | _Unused) -> bool:
    """Whether a result is that of a matrix product, which has new memory that is contiguous."""
    return isinstance(node, fx.Node) and call_name(node) in _PRODUCTS


def _base(node: fx.Node | _Unused) -> fx.Node | _Unused:
    """Return what a node is a view of, through all views; itself if it is none."""
    while isinstance(node, fx.Node) and call_name(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_of_one_form(one: fx.Node | _Unused, other: fx.Node | _Unused) -> bool:
    pair = [node for node in (one, other) if isinstance(node, fx.Node)]
    return len(pair) == 2 and len({form_of(fake_value(node)) for node in pair}) == 1
