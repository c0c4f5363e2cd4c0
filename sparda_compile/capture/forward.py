"""Stage 1: a model's forward becomes FX graphs, for prefill and for decode.

The model's own forward runs on fake tensors (`tracing.py`) with a cache whose `update` is one op,
`sparda::kv_update`. So each attention site names its layer and its new keys and values, no KV
memory is allocated, and an attention that no pass rewrites fails loudly when it runs. Nothing is
computed: weights may be on the meta device.

The prompt's length and the number of sequences stay open: a second run with other numbers, of one
sequence, shows what depends on them (`sizes.py`). So two graphs serve every shape.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import operator
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.capture.longrope import check_ropes, choosing_by_positions
from sparda_compile.capture.marker_cache import marker_cache
from sparda_compile.capture.tracing import Trace, record
from sparda_compile.errors import CaptureError
from sparda_compile.graph.fake_runner import leaves_of, map_leaves
from sparda_compile.graph.nodes import as_module, call_name, changed_root, snapshot
from sparda_compile.isa.define import define
from sparda_compile.isa.table import instruction_of, op_name
from sparda_compile.ranks.agreement import ALONE, Ranks
from sparda_compile.ranks.shards import local_names, meshes_in
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS, OTHER_SAMPLES, SAMPLES, common_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, MutableMapping

    from sparda_compile.capture.tracing import Call
    from sparda_compile.sizes import Samples, Size

__all__ = ["CapturedGraph", "capture", "kv_update", "share_weights"]

INPUT_NAMES: Final = ("input_ids", "position_ids")
_CUTS: Final = ("sparda.kv_update", "scaled_dot_product_attention")


@define(fake=lambda a: (torch.empty_like(a.k), torch.empty_like(a.v)), is_marker=True)
def kv_update(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Mark the new keys and values of one layer; passes replace it, it never runs.

    Args:
        k: [B, G, T, D] new keys.
        v: [B, G, T, D] new values.
        layer: Index that the model gave.

    Raises:
        CaptureError: Always.
    """
    raise CaptureError(
        f"sparda::kv_update(layer={layer}) was run: the attention of layer {layer} was not "
        "rewritten. This is a bug of sparda_compile; please report the model's configuration."
    )


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One traced forward.

    Attributes:
        phase: `prefill` or `decode`.
        graph_module: The graph; every weight is a placeholder, every node has `meta["val"]`.
        inputs: Placeholder of a tensor input -> `input_ids` or `position_ids`.
        weights: Placeholder of anything else -> the tensor.
        ranks: The processes that the model is sharded over.
        joined: Copies of several weights in one, by the addresses of the weights.
    """

    phase: str
    graph_module: fx.GraphModule
    inputs: dict[str, str]
    weights: dict[str, Tensor]
    ranks: Ranks = ALONE
    joined: MutableMapping[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    def copy(self) -> fx.GraphModule:
        """Return a copy of the graph that passes may change."""
        return snapshot(self.graph_module)


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares the weights of `model`.

    So it does meshes and process groups. Buffers that are not part of the state dict are copied:
    some models update them in forward.
    """
    shared = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
    return copy.deepcopy(model, {id(it): it for it in (*shared, *meshes_in(model))})


def capture(
    model: nn.Module, phase: str, *, last_logits_only: bool, limits: Collection[int] = ()
) -> CapturedGraph:
    """Trace a causal LM's forward, for any number of sequences.

    Args:
        model: A causal LM of transformers; its attention implementation is `sdpa` or `eager`.
        phase: `prefill`, many tokens, or `decode`, one token per sequence.
        last_logits_only: Whether the graph returns the logits of the last token alone.
        limits: Sliding windows in tokens: forwards drop their mask for a prompt that one holds.

    Returns:
        The graph with its inputs told apart.

    Raises:
        CaptureError: If the forward depends on values of tensors, changes its module, or does
            something else for other sizes.
    """
    ours, theirs = (samples.of(phase) for samples in (SAMPLES, OTHER_SAMPLES))
    step = _step(model, last_logits_only)
    check_ropes(model)
    with choosing_by_positions(model):
        trace, other = (
            record(step, model, _inputs(model, s), tokens=s.tokens, limits=limits)
            for s in (ours, theirs)
        )
    sizes = _open_sizes(trace, other, ours, theirs, model)
    return _Writer(model, trace, sizes, ours).captured(phase)


def _step(model: nn.Module, last_logits_only: bool) -> Callable[..., Tensor]:
    accepted = inspect.signature(type(model).forward).parameters
    # A model that takes none is refused later, when it is known whether it has attention at all.
    takes_positions = "position_ids" in accepted
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1 if last_logits_only else 0

    def step(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = model(
            input_ids=input_ids,
            **{CACHE_NAME: marker_cache(model)},
            use_cache=True,
            return_dict=True,
            **({"position_ids": position_ids} if takes_positions else {}),
            **extra,
        )
        logits: Tensor = out.logits
        return logits[:, -1:] if last_logits_only else logits

    return step


def _inputs(model: nn.Module, samples: Samples) -> Callable[[Any], list[Tensor]]:
    device = next(model.parameters()).device
    shape = (samples.batch, samples.tokens)

    def make(fake_mode: Any) -> list[Tensor]:
        with fake_mode:
            return [torch.empty(shape, dtype=torch.long, device=device) for _ in INPUT_NAMES]

    return make


def _open_sizes(
    first: Trace, second: Trace, ours: Samples, theirs: Samples, model: nn.Module
) -> dict[tuple[int, int], Size]:
    """Return what the numbers are that differ between two runs, by call and place in it.

    Raises:
        CaptureError: If the runs differ in anything but such numbers.
    """
    found: dict[tuple[int, int], Size] = {}
    for i, (one, other) in enumerate(zip(first.calls, second.calls, strict=False)):
        leaves, others = (leaves_of((call.args, call.kwargs)) for call in (one, other))
        if one.function != other.function or len(leaves) != len(others):
            raise _depends(model, one, "calls something else")
        for place, (mine, its) in enumerate(zip(leaves, others, strict=True)):
            if isinstance(mine, Tensor) or isinstance(its, Tensor):
                continue
            if type(mine) is int and type(its) is int:
                size = common_size(mine, its, ours, theirs)
                if size is None:
                    raise _depends(model, one, f"passes {mine} and {its}")
                if size.is_open:
                    found[i, place] = size
            elif mine != its:
                raise _depends(model, one, f"passes {mine} and {its}")
        if _num_dims(one.result) != _num_dims(other.result):
            raise _depends(model, one, "gets tensors of other dimensions")
    if len(first.calls) != len(second.calls):
        longer = max(first.calls, second.calls, key=len)
        raise _depends(model, longer[-1], "calls something else")
    return found


def _num_dims(result: Any) -> list[int]:
    return [leaf.dim() for leaf in leaves_of(result) if isinstance(leaf, Tensor)]


def _depends(model: nn.Module, call: Call, what: str) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__}: cannot trace forward as one graph: for another prompt length "
        f"or number of sequences it {what} at {call.where}. Sizes may pass into torch functions "
        "as products of the two, or one of them plus a constant."
    )


class _Writer:
    """Writes a trace as a graph."""

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        sizes: Mapping[tuple[int, int], Size],
        samples: Samples,
    ) -> None:
        self._model = model
        self._trace = trace
        self._sizes = sizes
        self._samples = samples
        self._graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}  # by the id of the fake tensor
        self._open: dict[str, fx.Node] = {}
        self._weights: dict[str, Tensor] = {}
        self._names = _tensor_names(model)
        self._sharded = local_names(model)

    def captured(self, phase: str) -> CapturedGraph:
        """Return the whole graph."""
        inputs = {}
        for name, value in zip(INPUT_NAMES, self._trace.inputs, strict=True):
            self._nodes[id(value)] = self._placeholder(name, value)
            inputs[name] = name
        self._open[BATCH_SIZE] = self._placeholder(BATCH_SIZE, self._samples.batch)
        if phase == "prefill":
            self._open[NUM_TOKENS] = self._placeholder(NUM_TOKENS, self._samples.tokens)
        self._weight_placeholders()
        for i, call in enumerate(self._trace.calls):
            self._write(i, call)
        result = self._trace.result
        if not isinstance(result, Tensor) or id(result) not in self._nodes:
            raise CaptureError(
                f"{type(self._model).__name__}: forward's logits are not computed from its input "
                "by torch functions."
            )
        output = self._graph.output((self._nodes[id(result)],))
        output.meta["val"] = (result,)
        module = as_module(self._graph)
        return CapturedGraph(phase, module, inputs, self._weights)

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _weight_placeholders(self) -> None:
        """Make an input of every tensor that the run read, in the order of first use."""
        read = {
            id(leaf)
            for call in self._trace.calls
            for leaf in leaves_of((call.args, call.kwargs))
            if isinstance(leaf, Tensor)
        }
        for number, (fake, tensor) in self._trace.tensors.items():
            if number in read:
                path = self._names.get(id(tensor), f"constant_{len(self._weights)}")
                name = re.sub(r"\W", "_", path).lower()  # as fx writes names
                while name in self._weights or name in INPUT_NAMES or name.startswith("sparda_"):
                    name = f"w_{name}"
                node = self._nodes[number] = self._placeholder(name, fake)
                self._weights[node.name] = (
                    nn.Parameter(tensor, requires_grad=False)
                    if id(tensor) in self._sharded
                    else tensor
                )

    def _write(self, i: int, call: Call) -> None:
        places = itertools.count()
        args, kwargs = map_leaves(
            (call.args, call.kwargs), lambda leaf: self._argument(i, next(places), leaf)
        )
        meta = {
            "stack_trace": call.where,
            "nn_module_stack": {call.path: (call.path, call.module)},
        }
        op, target, args = _target(call.function, args)
        it = instruction_of(target)
        is_collective = it is not None and it.is_collective
        node = self._graph.create_node(
            op, target, args, kwargs, op_name(target) if is_collective else None
        )
        node.meta = {**meta, "val": call.result}
        if call.changed is not None:
            if not is_collective:  # which returns a new tensor
                self._check_in_place(node)
            if isinstance(call.result, Tensor):
                self._nodes[id(call.changed)] = node
        elif isinstance(call.result, Tensor):
            self._nodes[id(call.result)] = node
        else:
            self._items(node, call.result, meta)

    def _check_in_place(self, node: fx.Node) -> None:
        """Refuse a change of what was made before an attention: a program is cut there.

        Raises:
            CaptureError: If a node makes one.
        """
        root = changed_root(node)
        above = node.prev
        while above is not root and above.op != "root":
            if call_name(above) in _CUTS:
                raise CaptureError(
                    f"{type(self._model).__name__}: {call_name(node)} "
                    f"({node.meta['stack_trace']}) changes a tensor in place that was made "
                    "before an attention; use the form that returns a new tensor."
                )
            above = above.prev

    def _items(self, node: fx.Node, result: Any, meta: dict[str, Any]) -> None:
        for index, part in enumerate(result):
            if isinstance(part, Tensor):
                item = self._graph.call_function(operator.getitem, (node, index))
                item.meta = {**meta, "val": part}
                self._nodes[id(part)] = item
            elif isinstance(part, (tuple, list)):
                raise CaptureError(f"{node.target} returns tensors in nested lists")

    def _argument(self, i: int, place: int, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._nodes[id(leaf)]
        size = self._sizes.get((i, place))
        return leaf if size is None else self._size_node(size)

    def _size_node(self, size: Size) -> fx.Node | int:
        """Return a node for a size; whatever it takes is made anew, pieces share no numbers."""
        batch, tokens = (self._open.get(name, 1) for name in (BATCH_SIZE, NUM_TOKENS))
        factors = [batch] * size.batch_power + [tokens] * size.tokens_power
        node: Any = factors[0]
        for factor in factors[1:]:
            node = self._number(operator.mul, node, factor)
        if size.factor != 1:
            node = self._number(operator.mul, node, size.factor)
        if size.offset:
            node = self._number(operator.add, node, size.offset)
        result: fx.Node | int = node
        return result

    def _number(self, function: Any, one: Any, other: Any) -> fx.Node:
        node = self._graph.call_function(function, (one, other))
        values = (v.meta["val"] if isinstance(v, fx.Node) else v for v in (one, other))
        node.meta["val"] = function(*values)
        return node


def _tensor_names(model: nn.Module) -> dict[int, str]:
    named = [
        *model.named_buffers(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
    ]
    return local_names(model) | {id(tensor): name for name, tensor in reversed(named)}


_OPERATORS: Final = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
# Methods that bear another name than the one they are called by.
_POWERS: Final = {Tensor.__pow__: "pow", Tensor.__ipow__: "pow_"}


def _target(function: Any, args: Any) -> tuple[str, Any, Any]:
    """Return a call as a graph has it: kind of node, target and arguments."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (*args, function.__self__.__name__)
    if name in _OPERATORS:
        return "call_function", _OPERATORS[name], args
    if name.startswith("__i") and name.endswith("__") and hasattr(Tensor, f"{name[3:-2]}_"):
        return "call_method", f"{name[3:-2]}_", args
    if function in _POWERS:
        return "call_method", _POWERS[function], args
    if getattr(Tensor, name, None) is function:
        return "call_method", name, args
    return "call_function", function, args
