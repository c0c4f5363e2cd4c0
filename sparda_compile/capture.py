"""Stage 1: a model's forward becomes two FX graphs, one for prefill and one for decode.

Dynamo traces the model's own forward with a cache whose `update` is one op, `sparda::kv_update`.
So each attention site names its layer and its new keys and values, no KV memory is allocated,
and an attention that no pass rewrites fails loudly when it runs. Nothing is computed: weights may
be on the meta device.

Batch size and prompt length are symbols, so two captures serve every shape; `specialize` puts a
batch size in and gives every node its fake value under `meta["val"]`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from sparda_compile.cache_name import CACHE_NAME
from sparda_compile.errors import CaptureError
from sparda_compile.passes.manager import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CapturedGraph", "capture", "kv_update", "share_weights", "specialize"]

INPUT_NAMES: Final = ("input_ids", "position_ids")
# Example sizes of the trace. Unusual numbers, so that no size of a model equals one by accident;
# more tokens than any window that is proved, since transformers drops the mask of a prompt that a
# window holds, and the proof would then find none.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS = 2, 523


@torch.library.custom_op("sparda::kv_update", mutates_args=())
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


@kv_update.register_fake
def _(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v)


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One traced forward.

    Attributes:
        phase: `prefill` or `decode`.
        graph_module: Dynamo's graph; every weight is a placeholder.
        sizes: Placeholder of a size -> `batch` or `tokens`.
        inputs: Placeholder of a tensor input -> `input_ids` or `position_ids`.
        weights: Placeholder of anything else -> the tensor.
        specialized: Graphs that `specialize` has made, by batch size.
        joined: Copies of several weights in one, by the addresses of the weights.
    """

    phase: str
    graph_module: fx.GraphModule
    sizes: dict[str, str]
    inputs: dict[str, str]
    weights: dict[str, Tensor]
    specialized: dict[int, fx.GraphModule] = dataclasses.field(default_factory=dict)
    joined: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device


class _Stop(BaseException):
    """Ends Dynamo's call once the graph is there; nothing is computed."""


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares the weights of `model`.

    Buffers that are not part of the state dict are copied: some models update them in forward.
    """
    shared = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def capture(model: nn.Module, phase: str, *, last_logits_only: bool) -> CapturedGraph:
    """Trace a causal LM's forward.

    Args:
        model: A causal LM of transformers; its attention implementation is `sdpa` or `eager`.
        phase: `prefill`, many tokens, or `decode`, one token per sequence.
        last_logits_only: Whether the graph returns the logits of the last token alone.

    Returns:
        The graph with its inputs told apart.

    Raises:
        CaptureError: If Dynamo cannot trace the forward as one graph.
    """
    device = next(model.parameters()).device
    accepted = inspect.signature(type(model).forward).parameters
    # A model that takes none is refused later, when it is known whether it has attention at all.
    takes_positions = "position_ids" in accepted
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1 if last_logits_only else 0
    cache = _marker_cache(model)

    def step(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = model(
            input_ids=input_ids,
            **{CACHE_NAME: cache},
            use_cache=True,
            return_dict=True,
            **({"position_ids": position_ids} if takes_positions else {}),
            **extra,
        )
        logits: Tensor = out.logits
        return logits[:, -1:] if last_logits_only else logits

    num_tokens = 1 if phase == "decode" else _EXAMPLE_TOKENS
    shape = (_EXAMPLE_BATCH, num_tokens)
    example = [torch.zeros(shape, dtype=torch.long, device=device) for _ in INPUT_NAMES]
    graph_module, args = _trace(step, example, dynamic_tokens=num_tokens > 1, model=model)
    return _describe(phase, graph_module, args)


def _trace(
    step: Callable[..., Tensor], example: list[Tensor], *, dynamic_tokens: bool, model: nn.Module
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    import torch._dynamo
    from torch._C._dynamo.eval_frame import reset_code

    captured: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def stop(*args: Any) -> Any:
            captured.append((graph_module, args))
            raise _Stop

        return stop

    # A fresh code object each time, so that Dynamo's cache of one capture never serves another.
    fresh = step.__code__.replace(co_name=f"{step.__name__}_{id(step):x}")
    step.__code__ = fresh
    for tensor in example:
        torch._dynamo.mark_dynamic(tensor, 0)
        if dynamic_tokens:
            torch._dynamo.mark_dynamic(tensor, 1)
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=None)
    try:
        with torch.no_grad():
            compiled(*example)
    except _Stop:
        return captured[0]
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        reason = _root_cause(error)
        raise CaptureError(
            f"{type(model).__name__}: torch.compile cannot trace forward as one graph: {first} "
            f"{reason}Set TORCH_LOGS=graph_breaks to see where."
        ) from error
    finally:
        reset_code(fresh)
    raise CaptureError(f"{type(model).__name__}: forward returned without being traced.")


def _root_cause(error: BaseException) -> str:
    for line in str(error).splitlines():
        if "Developer debug context" in line:
            return f"({line.strip()[:300]}) "
    return ""


def _describe(phase: str, graph_module: fx.GraphModule, args: tuple[Any, ...]) -> CapturedGraph:
    sizes: dict[str, str] = {}
    inputs: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, args, strict=True):
        source = _source_name(node)
        size = re.fullmatch(r"L\['\w+'\]\.size\(\)\[(\d)\]", source)
        name = re.fullmatch(r"L\['(\w+)'\]", source)
        if size:
            sizes[node.name] = ("batch", "tokens")[int(size[1])]
        elif name and name[1] in INPUT_NAMES:
            inputs[node.name] = name[1]
        elif isinstance(value, Tensor):
            weights[node.name] = value
        else:
            raise CaptureError(
                f"graph input {node.name} ({source}) is a {type(value).__name__}, not a tensor; "
                "the model's forward depends on a Python value that changes between calls."
            )
    return CapturedGraph(phase, graph_module, sizes, inputs, weights)


def _source_name(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _marker_cache(model: nn.Module) -> Any:
    """Return a transformers cache whose `update` is the marker op."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class MarkerLayer(CacheLayerMixin):
        is_compileable = True
        is_sliding = False

        def __init__(self, layer: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.layer = layer
            self.is_initialized = True

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            return torch.ops.sparda.kv_update(key_states, value_states, self.layer)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    num_layers = getattr(text, "num_hidden_layers", None) or 0
    return Cache(layers=[MarkerLayer(i) for i in range(num_layers)])


def specialize(captured: CapturedGraph, batch_size: int) -> fx.GraphModule:
    """Return a copy of the graph for one batch size, with fake values on every node.

    The prompt length of a prefill stays one symbol; its placeholder is `num_tokens`.

    Args:
        captured: From `capture`.
        batch_size: Sequences.

    Returns:
        A graph of the caller's own whose nodes have `meta["val"]`; graphs of one batch size share
        a fake mode.
    """
    if batch_size not in captured.specialized:
        captured.specialized[batch_size] = _specialize(captured, batch_size)
    template = captured.specialized[batch_size]
    return snapshot(template)


def _specialize(captured: CapturedGraph, batch_size: int) -> fx.GraphModule:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    tokens: fx.Node | None = None
    for node in captured.graph_module.graph.nodes:
        role = captured.sizes.get(node.name) if node.op == "placeholder" else None
        if role == "batch":
            mapping[node] = batch_size
        elif role == "tokens" and tokens is not None:
            mapping[node] = tokens
        elif node.target is torch._C._log_api_usage_once:
            continue
        else:
            # A mapped batch size is an int, which `node_copy` passes into the arguments as it is.
            new: fx.Node = graph.node_copy(node, lambda old: mapping[old])
            new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
            mapping[node] = new
            if role == "tokens":
                tokens = new
    if tokens is not None:
        tokens.name = "num_tokens"
    module = fx.GraphModule(captured.graph_module, graph)

    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    device = captured.device
    num_tokens = 1 if captured.phase == "decode" else _EXAMPLE_TOKENS
    kinds = [DimDynamic.STATIC, DimDynamic.DYNAMIC if num_tokens > 1 else DimDynamic.STATIC]
    ids = fake_mode.from_tensor(
        torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
    )
    values: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        if tokens is not None and node is tokens:
            values[node.name] = ids.shape[1]
        elif node.name in captured.inputs:
            with fake_mode:
                role = captured.inputs[node.name]
                values[node.name] = ids if role == "input_ids" else torch.empty_like(ids)
        else:
            values[node.name] = fake_mode.from_tensor(
                captured.weights[node.name], static_shapes=True
            )
    _propagate(module, values, fake_mode)
    return module


class _Propagator(fx.Interpreter):
    """Runs the graph on fake values and keeps each one."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def _propagate(module: fx.GraphModule, values: dict[str, Any], fake_mode: Any) -> None:
    from torch._dispatch.python import enable_python_dispatcher

    args = [values[n.name] for n in module.graph.nodes if n.op == "placeholder"]
    # Without the Python dispatcher some ops (expand in baddbmm's meta) refuse a symbolic length.
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        _Propagator(module).run(*args)
