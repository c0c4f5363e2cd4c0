"""Tiny models traced once for all end-to-end tests, and a normal form of their programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn

from sparda_compile import SpardaConfig, optimize
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda
from sparda_compile.isa.engines import use_engine
from sparda_compile.program.plan import make_plan
from sparda_compile.testing import build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.isa.engines import Engine
    from sparda_compile.program.captures import Captures
    from sparda_compile.program.plan import Plan

# `exact` with a Forecast as hint selects by the query and by the Forecast: it uses all that is
# known of a site.
FULLEST = SpardaConfig(
    mode="exact", hint="forecast", machine="h200", top_k=4, block_size=16,
    attend_before_repair="always",
)  # fmt: skip
# These give back what they take if the shape stays.
_LAYOUT = frozenset({"contiguous", "reshape"})
_SIZE = re.compile(r"\bs\d+\b")


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model and what became of it in mode `dense`."""

    model: nn.Module
    fast: Any


@pytest.fixture(scope="session")
def turns():
    """Return a function that reads tokens in turns of some sizes: their logits, and the cache."""

    @torch.no_grad()
    def read(module, ids, *sizes, past=None):
        logits, begin = [], 0
        for size in sizes:
            out = module(ids[:, begin : begin + size], past_key_values=past)
            logits, past, begin = [*logits, out.logits], out.past_key_values, begin + size
        return torch.cat(logits, 1), past

    return read


@pytest.fixture(scope="session")
def traced() -> Any:
    """Return a function that gives the plain form of a family, traced once."""

    @functools.cache
    def trace(name: str, attn: str) -> Traced:
        model = build(name, attn_implementation=attn)  # type: ignore[arg-type]
        config = SpardaConfig(
            mode="dense",
            top_k=None,
            block_size=16,
            lowering="eager",
            offload="always",
            max_tokens=768,
        )
        return Traced(model, optimize(model, config))

    return trace


@pytest.fixture(scope="session")
def two_turns() -> Any:
    """Return a function that generates two turns of a padded batch on one cache.

    It takes an optimized module, the steps of each turn and an engine or None, and returns the
    tokens and the logits of all steps.
    """
    return _two_turns


def _two_turns(fast: Any, steps: int, engine: Engine | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 250, (2, 130), generator=generator)
    more = torch.randint(2, 250, (2, 33), generator=generator)
    mask = torch.arange(130) >= torch.tensor([[0], [77]])
    settings = {
        "max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    with use_engine(engine) if engine else contextlib.nullcontext():
        one = fast.generate(ids, attention_mask=mask.long(), **settings)
        rest = torch.ones(2, steps + 33, dtype=torch.int64)
        two = fast.generate(
            torch.cat([one.sequences, more], 1),
            attention_mask=torch.cat([mask.long(), rest], 1),
            past_key_values=one.past_key_values,
            **settings,
        )
    return two.sequences, torch.stack(one.logits + two.logits)


@pytest.fixture(scope="session")
def rewrite() -> Any:
    """Return `_rewrite`, so that test files need not import this one."""
    return _rewrite


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """The attentions of a model, and its program as lines in which equal programs agree."""

    sites: tuple[AttentionSite, ...]
    lines: tuple[str, ...]


def _rewrite(captures: Captures, phase: str) -> Rewritten:
    """Return the graph once attention is replaced and the last graph, with the sites in each.

    Kept is what reaches the output or the cache, in order: each op with its arguments, its dtype
    and its shape. Inputs have their names in the model. Left out is what only changes strides: a
    reshape to the same shape and a copy in row-major order.
    """
    plan = make_plan(
        captures,
        phase,
        FULLEST,
        batch_size=1,
        max_tokens=4096,
    )
    tensors = [*captures.model.named_parameters(), *captures.model.named_buffers()]
    names = {id(tensor): name for name, tensor in reversed(tensors)}
    lines = []
    for stage in ("replace_attention", None):
        text = _Text(plan, names)
        lines += text.graph(plan.stage(stage).graph)
        lines += text.sites()
    return Rewritten(plan.sites, tuple(lines))


class _Text:
    """One graph as lines; nodes are numbered as they come."""

    def __init__(self, plan: Plan, weight_names: dict[int, str]) -> None:
        self._plan = plan
        self._weight_names = weight_names
        self._called: dict[str, str] = {}

    def graph(self, graph: fx.Graph) -> list[str]:
        lines: list[str] = []
        live = _live(graph)
        for node in graph.nodes:
            if node not in live:
                continue
            if node.op == "placeholder":
                self._called[node.name] = self._input(node)
            elif _keeps_values(node):
                self._called[node.name] = self._called[node.all_input_nodes[0].name]
            else:
                self._called[node.name] = f"%{len(lines)}"
                arguments = [self._argument(a) for a in node.args]
                arguments += [f"{k}={self._argument(v)}" for k, v in sorted(node.kwargs.items())]
                value = _SIZE.sub("T", _type(fake_value(node)))
                lines.append(f"%{len(lines)} {call_name(node)}({', '.join(arguments)}): {value}")
        return lines

    def sites(self) -> list[str]:
        lines = []
        for site in self._plan.sites:
            fields = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)}
            for name in ("form", "anchor", "rotation"):
                del fields[name]
            given = [f"{name}={self._argument(value)}" for name, value in fields.items()]
            lines.append(f"site {', '.join(given)}")
        return lines

    def _input(self, node: fx.Node) -> str:
        weight = self._plan.captured.weights.get(node.name)
        if weight is None:
            return "$" + self._plan.captured.inputs.get(node.name, node.name)
        name = self._weight_names.get(id(weight))
        return f"${weight.tolist() if name is None else name}"

    def _argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._called.get(value.name, "gone")
        if isinstance(value, slice):
            return self._argument((value.start, value.stop, value.step))
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._argument, value))}]"
        # The scale of eager attention is measured.
        return f"{value:.5g}" if isinstance(value, float) else str(value)


def _live(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    stack = list(_ends(graph))
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return live


def _ends(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        in_place = node.op == "call_method" and call_name(node).endswith("_")
        if node.op == "output" or is_sparda(node) or in_place or call_name(node) == "setitem":
            yield node


def _keeps_values(node: fx.Node) -> bool:
    if call_name(node) not in _LAYOUT:
        return False
    return _type(fake_value(node)) == _type(fake_value(node.all_input_nodes[0]))


def _type(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_type, value))}]"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
