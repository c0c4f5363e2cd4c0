"""What a hint computes before it scores, as one op, which may run on any stream.

Before, and after:

    %forecast_1 = linear(%hidden_0, %W_1)    %hint_piece_1 = run_piece([%hidden_0, %W_1, ..],
    %view, %transpose, rotation of layer 1       [%batch_size], [%batch_size, G, 1, D], "piece_..")
    %scores_1 = score_blocks(%rotated, ..)   %scores_1 = score_blocks(%hint_piece_1, ..)

Nothing of the step itself needs it, so a schedule may take it off the compute stream. It stays a
piece by itself: what the model computes keeps its bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import changes_in_place, fake_value, is_sparda
from sparda_compile.graph.pure_part import cut_out
from sparda_compile.graph.side_piece import add_side_piece
from sparda_compile.graph.tags import HINT, LAYER
from sparda_compile.sizes import BATCH_SIZE, Size, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["put_in_piece"]


def put_in_piece(graph: fx.Graph, hint: str, layer: int, prefix: str) -> int:
    """Put the nodes of the model that a hint has added for a layer into one op.

    Args:
        graph: The graph.
        hint: Name of the hint.
        layer: The layer that it guesses for.
        prefix: What the op's name begins with.

    Returns:
        How many ops were made: 1, or 0 where there is nothing, or what one op cannot do.
    """
    nodes = [n for n in graph.nodes if HINT.get(n) == hint and LAYER.get(n) == layer]
    nodes = [n for n in nodes if n.op in ("call_function", "call_method") and not is_sparda(n)]
    inside = set(nodes)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    if len(outputs) != 1 or not _may_be_put(nodes, outputs[0]):
        return 0
    (output,) = outputs
    part = cut_out(nodes, outputs)
    open_sizes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    emit = Emitter(graph, nodes[-1].next, output, layer)
    made = emit.call(
        "run_piece",
        [*part.inputs],
        [open_sizes[name] for name in part.sizes],
        [open_sizes[BATCH_SIZE] if _is_batch(s) else int(s) for s in fake_value(output).shape],
        add_side_piece(part).name,
        name=f"{prefix}piece_{layer}",
    )
    HINT.put(made, hint)
    output.replace_all_uses_with(made)
    for node in reversed(nodes):
        graph.erase_node(node)
    return 1


def _may_be_put(nodes: Sequence[fx.Node], output: fx.Node) -> bool:
    """Whether one op can compute what nodes do: a tensor from tensors, nothing in between."""
    inside, value = set(nodes), fake_value(output)
    if not isinstance(value, Tensor) or any(map(changes_in_place, nodes)):
        return False
    if any(size_of(int(s)).is_open and not _is_batch(s) for s in value.shape):
        return False
    if any(user not in inside and user < nodes[-1] for user in output.users):
        return False  # what takes the result may lead back here
    given = [fake_value(n) for node in nodes for n in node.all_input_nodes if n not in inside]
    plain = [v for v in given if not is_traceable_wrapper_subclass(v)]
    return len(plain) == len(given) and all(isinstance(v, (Tensor, int)) for v in given)


def _is_batch(size: int) -> bool:
    return size_of(int(size)) == Size(1, batch_power=1)
