"""Names of what benchmarks measure; a command line that offers them need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["DeviceName", "ShapeName", "VariantName"]

# Keys of `shapes.SHAPES`, of `programs.KNOBS` with `body`, and of `start.DEFAULT_SCENARIOS`.
ShapeName = Literal["8b", "8b-8kv", "tiny"]
VariantName = Literal["scheduled", "inline", "resident", "dense", "body"]
DeviceName = Literal["cuda", "cpu"]
