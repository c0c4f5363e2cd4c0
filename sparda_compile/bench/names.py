"""Names of what benchmarks measure; a command line that offers them need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["DeviceName", "PromptProgramName", "ShapeName", "VariantName"]

# Keys of `shapes.SHAPES`, of `programs.KNOBS` with `body`, of `start.DEFAULT_SCENARIOS`, and of
# `prompt_programs.OURS`.
ShapeName = Literal["8b", "8b-8kv", "tiny"]
VariantName = Literal["scheduled", "inline", "resident", "dense", "body"]
DeviceName = Literal["cuda", "cpu"]
PromptProgramName = Literal["sparse_forecast", "sparse_query", "dense", "sparse_resident"]
