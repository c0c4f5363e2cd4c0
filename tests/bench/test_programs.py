from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.programs import KNOBS, build_body, build_program
from sparda_compile.bench.synthetic import trace_steps_of
from sparda_compile.graph.nodes import is_sparda
from sparda_compile.runtime.kv_cache import KVCache

SETTINGS = {"lowering": "eager", "top_k": 4, "local_blocks": 2}


def names(program):
    return {str(n.target) for n in program.plan.graph_module.graph.nodes if is_sparda(n)}


def test_variants_differ_in_where_blocks_are_and_when_they_move(lab):
    found = {}
    for variant in KNOBS:
        found[variant] = build_program(lab.captures, variant, 1, 1024, 8, **SETTINGS)
    layouts = {variant: program.plan.layout for variant, program in found.items()}
    assert {variant: layout.offload for variant, layout in layouts.items()} == {
        "scheduled": True, "inline": True, "resident": False, "dense": False,
    }  # fmt: skip
    assert trace_steps_of(layouts["dense"]) == 0
    assert trace_steps_of(layouts["scheduled"]) == 8
    assert found["scheduled"].plan.schedule is not None
    assert found["inline"].plan.schedule is None
    assert any("prefetch" in name for name in names(found["scheduled"]))
    assert not any("prefetch" in name for name in names(found["inline"]))


def test_body_has_no_attention_but_keys_and_values(lab):
    program = build_body(lab.captures, 2, "eager")
    assert not names(program)
    ids = torch.randint(0, 256, (2, 1))
    kv = KVCache(program.plan.layout, torch.device("cpu"))
    logits = program(ids, torch.zeros_like(ids), None, kv)
    assert logits.shape == (2, 1, 256)
    assert logits.isfinite().all()
    for layer in lab.captures.model.model.layers:
        projection = layer.self_attn.v_proj.weight
        before = projection.detach().clone()
        with torch.no_grad():
            projection.zero_()
        assert not torch.equal(program(ids, torch.zeros_like(ids), None, kv), logits)
        with torch.no_grad():
            projection.copy_(before)


def test_unknown_variant(lab):
    with pytest.raises(KeyError):
        build_program(lab.captures, "fast", 1, 1024, 8)
