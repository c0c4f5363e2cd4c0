"""A model whose step waits for the CPU is refused where a CUDA graph is to hold the step."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.program.captures import Captures
from sparda_compile.program.host_waits import check_no_host_waits
from sparda_compile.testing import build


def graph_of(family, dtype, experts=None):
    """Return the graph of a step of a tiny model."""
    model = build(family).to(dtype)
    if experts:
        model.set_experts_implementation(experts)
    return Captures(model, {}).get("decode").graph_module.graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_that_are_asked_for_one_by_one_are_refused(dtype):
    graph = graph_of("mixtral", dtype)
    with pytest.raises(UnsupportedInputError) as error:
        check_no_host_waits(graph)
    for said in ("grouped_mm_fallback", "bfloat16", "batched_mm", "cuda_graph=False"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("family", "dtype", "experts"),
    [
        ("llama", torch.float32, None),
        ("mixtral", torch.bfloat16, None),
        ("mixtral", torch.float32, "batched_mm"),
    ],
)
def test_others_are_not(family, dtype, experts):
    check_no_host_waits(graph_of(family, dtype, experts))
