"""What an argument takes, beside what it should take, and the names of what there is to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sparda_compile.forecast.projection import graph_input
from sparda_compile.graph.effects import is_state, results_of
from sparda_compile.graph.op_index import result_of
from sparda_compile.graph.writer import MAY_HIDE, NUM_PAST, TOKEN_MASK
from sparda_compile.state.layout import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sparda_compile.graph.op_index import Op
    from sparda_compile.passes.base import PassContext
    from sparda_compile.state.layout import CacheLayout, LayerShape


__all__ = [
    "Operand",
    "Operands",
    "StateNames",
    "compare",
    "kind_of",
    "names_of",
    "results_of_op",
    "token_mask_of",
    "wanted_words",
    "words_of",
    "wrong_numbers",
]


# What copies blocks to pages, and what reads pages alone.
_FETCHES: Final = ("fetch_blocks", "prefetch_blocks")
_PAGE_READERS: Final = (
    *("sparse_attention", "attend_resident", "attend_missing"),
    *("attend_predicted", "repair_predicted"),
)
# Names of what arguments take; a pair is one result of a node, None is nothing.
Operand = str | tuple[str, int] | None


Operands = dict[str, "Operand | list[Operand]"]


class StateNames(NamedTuple):
    """Short names of state tensors, the same in all layers of a kind that write blocks alike."""

    of_kind: dict[tuple[str, str], tuple[str, ...]]
    of_summary: dict[tuple[str, str], dict[str, tuple[str, ...]]]

    @classmethod
    def of(cls, ctx: PassContext) -> StateNames:
        """Return those of a plan's cache."""
        assert ctx.layout is not None
        layout = ctx.layout
        kinds = {kind_of(shape, layout): shape for shape in layout.layers}
        return cls(
            {kind: tuple(layout.tensors(shape)) for kind, shape in kinds.items()},
            {
                kind: {n: layout.summary_tensors(n, shape) for n in layout.summaries(shape.layer)}
                for kind, shape in kinds.items()
            },
        )


def kind_of(shape: LayerShape, layout: CacheLayout) -> tuple[str, str]:
    """Return what layers with the same tensors have in common: their kind and format."""
    return shape.kind, layout.kv_format(shape.layer).name


def names_of(layer: int, state: Mapping[str, str]) -> frozenset[str]:
    """Return the names of all inputs of ours that ops of a layer may take.

    Args:
        layer: Its number.
        state: Names of its state, by short name.
    """
    weights = (graph_input(f"{layer}{part}") for part in ("", "_u", "_v"))
    return frozenset({*state.values(), *weights, LENGTHS, TOKEN_MASK})


def compare(op: Op, expected: Operands, mine: frozenset[str] | None = None) -> Iterator[str]:
    """Yield which argument takes something else than is expected.

    Args:
        op: The op.
        expected: What arguments take, by name.
        mine: State that the others may take, None for any.
    """
    for name in op.tensors:
        value = op.args[name]
        if name in expected:
            wanted = expected[name]
            if not _is(value, wanted):
                taken = f"takes {words_of(value)} as its {name}"
                yield f"{op.node.name} {taken}, not {wanted_words(wanted)}"
        elif value is not None and mine is not None:
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if is_state(each) and each.name not in mine:
                    yield f"{op.node.name} takes {each.name}, which is of another layer"


def _is(value: Any, wanted: Operand | list[Operand]) -> bool:
    if isinstance(wanted, list):
        found = list(value) if isinstance(value, (list, tuple)) else [value]
        return len(found) == len(wanted) and all(map(_is, found, wanted))
    if isinstance(wanted, tuple):
        made = result_of(value)
        return made is not None and (made[0].name, made[1]) == wanted
    return getattr(value, "name", None) == wanted


def words_of(value: Any) -> str:
    """Return in words what an argument takes."""
    made = result_of(value)
    if made is not None:
        return f"{value.name} (result {made[1]} of {made[0].name})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(words_of, value))}]"
    return str(getattr(value, "name", value))


def wanted_words(wanted: Operand | list[Operand]) -> str:
    """Return in words what an argument should take."""
    if isinstance(wanted, list):
        return f"[{', '.join(map(wanted_words, wanted))}]"
    return f"result {wanted[1]} of {wanted[0]}" if isinstance(wanted, tuple) else str(wanted)


def wrong_numbers(op: Op, ctx: PassContext) -> Iterator[str]:
    """Yield which number an op takes that its caller does not give, and which other format.

    What copies blocks to pages of stored runs moves them as they are.
    """
    for name, wanted in (("num_past", NUM_PAST), ("may_hide", MAY_HIDE)):
        if name in op.args and getattr(op.args[name], "name", None) != wanted:
            yield f"{op.node.name} takes {words_of(op.args[name])} as its {name}, not {wanted}"
    assert ctx.layout is not None
    if op.layer is None:
        return
    is_stored = ctx.layout.has_stored_pages(op.layer)
    form = ctx.layout.kv_format(op.layer).name
    reads_model = op.name in _FETCHES if is_stored else op.name in _PAGE_READERS
    for name, right in (("kv_format", "model" if reads_model else form), ("is_tail", is_stored)):
        given = op.args.get(name)
        if given is not None and given != right:
            yield f"{op.node.name} takes {given!r} as its {name}, not {right!r}"


def results_of_op(plan: Op) -> Operands:
    """Return what the results of an op are, by the names of arguments that take them."""
    return {name: (plan.node.name, i) for i, name in enumerate(results_of(plan.node))}


def token_mask_of(ctx: PassContext) -> Operand:
    """Return what says which tokens are real: of one token per sequence nothing does."""
    return None if ctx.is_decode else TOKEN_MASK
