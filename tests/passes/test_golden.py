"""The tiny Llama's graph behind each pass, as text, against the files in `golden`.

A file shows the nodes that passes make and the model's projections; other nodes of the model are
named by what they are, so a file does not depend on how a version of torch names them. Run with
SPARDA_UPDATE_GOLDEN=1 to write the files again, and read the difference before committing it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torch import fx

from sparda_compile.graph.nodes import call_name, fake_value, is_sparda, module_path
from sparda_compile.graph.text import graph_text
from sparda_compile.passes import PIPELINE
from sparda_compile.sizes import size_text

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {
    "machine": "h200", "top_k": 4, "sink_blocks": 1, "local_blocks": 2, "block_size": 64,
    "max_tokens": 1024, "batch_size": 1,
}  # fmt: skip
# VerifyTransfers changes nothing: its graph is that of the pass before.
PASSES = [graph_pass.name for graph_pass in PIPELINE if graph_pass.name != "verify_transfers"]
PHASES = ("decode", "prefill", "sparse_prefill")
MODES = {
    "forecast": {"mode": "forecast"},
    "exact": {"mode": "exact"},
    "ema": {"mode": "exact", "hint": "ema"},
    "ema+forecast": {"mode": "exact", "hint": ("ema", "forecast")},
    "speculate": {"mode": "speculate", "offload": "never", "speculate_where": "always"},
}
CASES = [(m, p, n) for m in MODES for p in PHASES for n in PASSES]


def readable(gm):
    """Return a graph as text: one line for each node that a reader of these files looks for."""
    lines = []
    for node in gm.graph.nodes:
        if _is_shown(node):
            arguments = [_value(a) for a in node.args]
            arguments += [f"{k}={_value(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{_name(node)} = {call_name(node)}({', '.join(arguments)})")
    return "\n".join(lines) + "\n"


def _is_shown(node):
    name = call_name(node)
    if node.op != "call_function":
        return False
    return is_sparda(node) or name in ("linear", "scaled_dot_product_attention")


def _name(node):
    if call_name(node) == "sparda.kv_update":
        return f"%kv_update_{node.args[2]}"
    if is_sparda(node) or node.name.startswith(("forecast_", "sparda_")):
        return f"%{node.name}"
    if call_name(node) == "getitem" and is_sparda(node.args[0]):
        return f"{_name(node.args[0])}[{node.args[1]}]"
    if _is_shown(node):
        return f"%{module_path(node)}" + (".sdpa" if call_name(node) != "linear" else "")
    return f"<{_shape(node)}>"


def _shape(node):
    value = fake_value(node)
    if not hasattr(value, "shape"):
        return type(value).__name__
    return ", ".join(map(size_text, value.shape))


def _value(argument):
    if isinstance(argument, fx.Node):
        return _name(argument)
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_value, argument))}]"
    # A piece is named after what it computes, in the words of a version of torch.
    return re.sub(r"^piece_[0-9a-f]{16}$", "piece", str(argument))


@pytest.mark.parametrize(("mode", "phase", "name"), CASES)
def test_text_of_the_graph(plan_of, mode, phase, name):
    text = readable(plan_of("llama", phase, **MODES[mode], **SETTINGS).stage(name))
    path = GOLDEN / f"{mode}_{phase}_{name}.txt"
    if os.environ.get("SPARDA_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path.name} is missing; run with SPARDA_UPDATE_GOLDEN=1"
    assert text == path.read_text(encoding="utf-8")
    assert text.count("\n") < 120


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_verification_changes_nothing(plan_of, mode, phase):
    plan = plan_of("llama", phase, **MODES[mode], **SETTINGS)
    before, after = (plan.stage(n) for n in ("schedule_transfers", "verify_transfers"))
    assert graph_text(before.graph) == graph_text(after.graph)


def test_no_file_is_left_over():
    assert {p.name for p in GOLDEN.iterdir()} == {f"{m}_{p}_{n}.txt" for m, p, n in CASES}
