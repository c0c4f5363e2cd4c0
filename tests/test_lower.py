"""The two lowerings agree, and what the scheduler chose is still there behind Inductor."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.lower import lower
from sparda_compile.passes import fuse_projections
from sparda_compile.passes.effects import argument
from sparda_compile.passes.fx import call_name, is_sparda
from sparda_compile.streams import CudaEngine, ImmediateEngine, use_engine
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
_CALL = re.compile(r"torch\.ops\.sparda\.(\w+)\.default\((.*)\)$")
_EVENT_OPS = ("prefetch_blocks", "offload_blocks", "wait_blocks")


@pytest.fixture(scope="module")
def traced(traced_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparda_compile.optimize(traced_llama, SpardaConfig(lowering="eager", **SMALL))


def _fast(traced, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparda_compile.optimize(traced, SpardaConfig(**{**SMALL, **changes}))


@pytest.fixture(scope="module", params=["forecast", "exact", "forecast, joined projections"])
def compiled(request, traced):
    """An optimized module whose decode step Inductor has compiled, and the code that it made."""
    import torch._inductor.config
    from torch._inductor.utils import run_and_get_code

    mode, *joined = request.param.split(", ")
    ids = torch.tensor([[7]])
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(fuse_projections, "_on_gpu", lambda graph: bool(joined))
        fast = _fast(traced, mode=mode, lowering="inductor", machine="h200")
        _, codes = run_and_get_code(lambda: fast(ids, past_key_values=fast.new_cache()))
    return fast, codes[0]


def _generated_order(code: str) -> list[str]:
    """Sparda ops and matrix multiplications in the order of Inductor's generated code."""
    order = []
    for line in code.splitlines():
        call = _CALL.search(line.strip())
        if call and call[1] in _EVENT_OPS:
            event = [a for a in call[2].split(", ") if a.isdigit()][-1]
            order.append(f"{call[1]} {event}")
        elif call:
            order.append(call[1])
        elif "extern_kernels." in line:
            order.append("mm")
    return order


def _scheduled_order(fast) -> list[str]:
    order = []
    for node in fast.sparda.graph("decode").graph.nodes:
        name = call_name(node).removeprefix("sparda.")
        if is_sparda(node):
            event = f" {argument(node, 'event')}" if name in _EVENT_OPS else ""
            order.append(name + event)
        elif name == "linear" and "sparda_layer" not in node.meta:
            order.append("mm")
    return order


def _transfers(order: list[str]) -> list[str]:
    return [entry for entry in order if entry.split()[0] in _EVENT_OPS]


def test_the_schedule_survives_inductor(compiled):
    fast, code = compiled
    want, got = _scheduled_order(fast), _generated_order(code)
    assert sorted(x for x in want if x != "mm") == sorted(x for x in got if x != "mm")
    assert _transfers(got) == _transfers(want)

    starts = [e for e in _transfers(want) if e.startswith("prefetch")]
    assert starts
    for start in starts:
        wait = start.replace("prefetch_blocks", "wait_blocks")
        hidden_by_schedule = want[want.index(start) : want.index(wait)].count("mm")
        hidden = got[got.index(start) : got.index(wait)].count("mm")
        assert hidden >= hidden_by_schedule, (start, want, got)


def _recording(kind, *args):
    """Return an engine that notes which copies begin and are awaited, and its notes."""
    issued = []

    class Recording(kind):
        def record(self, event):
            issued.append(("start", event))
            super().record(event)

        def wait(self, event):
            issued.append(("wait", event))
            super().wait(event)

    return Recording(*args), issued


def _starts_and_waits(fast) -> list[tuple[str, int]]:
    """Return what `_recording` has to note in a decode step that keeps to its schedule."""
    nodes = fast.sparda.graph("decode").graph.nodes
    return [
        ("wait" if call_name(n).endswith("wait_blocks") else "start", argument(n, "event"))
        for n in nodes
        if call_name(n).removeprefix("sparda.") in _EVENT_OPS
    ]


def test_streams_are_given_work_in_the_order_of_the_schedule(compiled):
    fast, _ = compiled
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
    fast.program("decode", 1, 512, last_only=True)._engine = engine
    ids = torch.randint(0, 256, (1, 70), device="cuda")
    fast.generate(ids, max_new_tokens=2, do_sample=False)
    assert issued == _starts_and_waits(fast) != []


def test_inductor_allocates_no_copy_of_a_pool(compiled):
    fast, code = compiled
    nodes = fast.sparda.graph("decode").graph.nodes
    for pool in ("sparda_pages_0", "sparda_host_0"):
        shape = next(n for n in nodes if n.name == pool).meta["val"].shape
        assert f"empty_strided_cpu(({', '.join(map(str, shape))})" not in code


def test_inductor_equals_eager(compiled, traced):
    fast, _ = compiled
    eager = _fast(traced, mode=fast.sparda_config.mode, lowering="eager")
    for num_tokens in (70, 33):
        ids = torch.randint(0, 256, (1, num_tokens))
        want, got = (
            m.generate(
                ids, max_new_tokens=40, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )
            for m in (eager, fast)
        )  # fmt: skip
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(
            torch.cat(got.logits), torch.cat(want.logits), rtol=1e-3, atol=1e-3
        )
    assert fast.sparda.num_compilations == {"prefill": 1, "decode": 1}


def test_rounding_hangs_on_neither_the_clock_nor_what_is_fused(traced, monkeypatch):
    """Two programs of one model must round alike, and so must one compiled twice."""
    from torch._inductor import compile_fx

    seen = []

    def compile_nothing(graph_module, inputs, config_patches):
        seen.append(config_patches)
        return graph_module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing)
    plan = traced.program("decode", 1, 512, last_only=True).plan
    lower(plan.graph_module, "inductor")
    (patches,) = seen
    assert patches.pop("deterministic") is patches.pop("emulate_precision_casts") is True
    assert set(patches) == {"joint_custom_pre_pass", "post_grad_custom_post_pass"}
    lower(plan.graph_module, "eager")
    assert len(seen) == 1
