from __future__ import annotations

from typing import get_args

from sparda_compile.bench.decode import VARIANTS
from sparda_compile.bench.names import DeviceName, PromptProgramName, ShapeName, VariantName
from sparda_compile.bench.prompt_programs import OURS, OURS_OFFLOADED
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.bench.start import DEFAULT_SCENARIOS


def test_they_are_what_there_is_to_measure():
    assert get_args(ShapeName) == tuple(SHAPES)
    assert get_args(VariantName) == VARIANTS
    assert set(get_args(DeviceName)) == set(DEFAULT_SCENARIOS)
    assert get_args(PromptProgramName) == tuple(OURS)
    assert set(OURS) - set(OURS_OFFLOADED) == {"sparse_resident"}
