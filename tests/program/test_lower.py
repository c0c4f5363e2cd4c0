"""A verified graph becomes calls of pieces and ops, in its order and on what it names."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.graph.effects import argument
from sparda_compile.graph.fake_runner import leaves_of
from sparda_compile.graph.nodes import call_name, is_sparda
from sparda_compile.isa.define import implementation
from sparda_compile.isa.engines import CudaEngine, ImmediateEngine, use_engine
from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.program.lower import Register, lower, split_graph
from sparda_compile.testing import tiny_llama

SMALL = {
    "top_k": 2,
    "sink_blocks": 1,
    "local_blocks": 1,
    "block_size": 16,
    "pool_size": 8,
    "pool_stride": 4,
    "offload": "always",
    "max_tokens": 512,
}
_EVENT_OPS = ("prefetch_blocks", "offload_blocks", "wait_blocks")
MODES = ("query", "forecast", "exact", "dense")


@pytest.fixture(scope="module")
def traced(traced_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparda_compile.optimize(traced_llama, SpardaConfig(lowering="eager", **SMALL))


def _fast(traced, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparda_compile.optimize(
            traced, SpardaConfig(**{**SMALL, **changes}, attend_before_repair="always")
        )


def _lowered(traced, phase, mode):
    fast = _fast(traced, mode=mode, lowering="eager", machine="h200")
    graph_module = fast.programs.latest_plan(phase).graph_module
    return graph_module.graph, lower(graph_module, "eager")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("mode", MODES)
class TestProgram:
    def test_ops_are_those_of_the_graph_in_its_order(self, traced, phase, mode):
        graph, program = _lowered(traced, phase, mode)
        ops = [call.node for call in program.calls if call.node is not None]
        assert ops == [node for node in graph.nodes if is_sparda(node)]
        for call in program.calls:
            if call.piece is None:
                assert call.function is implementation(call.node.target)

    def test_pieces_hold_no_op_and_no_state(self, traced, phase, mode):
        _, program = _lowered(traced, phase, mode)
        assert program.pieces()
        for piece in program.pieces():
            assert not [n for n in piece.graph_module.graph.nodes if is_sparda(n)]
            assert not [n for n in piece.inputs if n.name.startswith("sparda_") and
                        "forecast" not in n.name]  # fmt: skip

    def test_everything_is_held_until_its_last_use_and_no_longer(self, traced, phase, mode):
        _, program = _lowered(traced, phase, mode)
        last, freed = {}, {}
        for i, call in enumerate(program.calls):
            for leaf in [*leaves_of((call.args, call.kwargs)), *map(Register, call.results)]:
                if type(leaf) is Register:
                    last[int(leaf)] = i
            freed |= dict.fromkeys(call.frees, i)
        made = set(range(program.num_inputs, len(program.names))) - {program.result}
        assert freed == {register: last[register] for register in made}

    def test_split_graph_is_what_is_called(self, traced, phase, mode):
        graph, program = _lowered(traced, phase, mode)
        fast = _fast(traced, mode=mode, lowering="eager", machine="h200")
        split = split_graph(fast.programs.latest_plan(phase).graph_module)
        names = [n.target for n in split.graph.nodes if n.op == "call_module"]
        # What an op runs stays the op.
        called = [call for call in program.calls if call.node is None]
        assert names == [call.name for call in called]
        assert {n for n, _ in split.named_children()} == {call.piece.name for call in called}
        split.graph.lint()
        left = [n for n in split.graph.nodes if n.op in ("call_function", "call_method")]
        assert {call_name(n) for n in left if not is_sparda(n)} == {"getitem"}
        del graph


def test_split_is_shown(traced):
    split = traced.sparda.graph("decode", after="split")
    assert any(n.op == "call_module" for n in split.graph.nodes)
    with pytest.raises(ConfigError, match=r"stages are capture, .*, split"):
        traced.sparda.graph("decode", after="pieces")


def _recording(kind, *args):
    """Return an engine that notes which copies begin and are awaited, and its notes."""
    issued = []

    class Recording(kind):
        def record(self, event, stream=COPY):
            issued.append(("start", event))
            super().record(event, stream)

        def wait(self, event, stream=COMPUTE):
            issued.append(("wait", event))
            super().wait(event, stream)

    return Recording(*args), issued


def _starts_and_waits(fast) -> list[tuple[str, int]]:
    """Return what `_recording` has to note in a decode step that keeps to its schedule."""
    nodes = fast.sparda.graph("decode").graph.nodes
    return [
        ("wait" if call_name(n).endswith("wait_blocks") else "start", argument(n, "event"))
        for n in nodes
        if call_name(n).removeprefix("sparda.") in _EVENT_OPS
    ]


@pytest.mark.parametrize("mode", ["forecast", "exact"])
def test_streams_are_given_work_in_the_order_of_the_schedule(traced, mode):
    fast = _fast(traced, mode=mode, lowering="eager", machine="h200")
    engine, issued = _recording(ImmediateEngine)
    with use_engine(engine):
        fast(torch.tensor([[7]]), past_key_values=fast.new_cache())
    assert issued == _starts_and_waits(fast) != []


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
def test_a_gpu_is_given_work_in_the_order_of_the_schedule(mode):
    """There projections are joined, kernels are Triton's, and a program has its own engine."""
    model = tiny_llama(num_hidden_layers=3).to("cuda")
    fast = _fast(model, mode=mode, lowering="inductor", machine="h200", cuda_graph=False)
    engine, issued = _recording(CudaEngine, torch.device("cuda"))
    fast.programs.get("decode", 1, 512, last_only=True)._engine = engine
    ids = torch.randint(0, 256, (1, 70), device="cuda")
    fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert issued == _starts_and_waits(fast) != []
