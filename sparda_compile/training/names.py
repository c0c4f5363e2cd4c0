"""Names of what a Forecast learns from; a command line that offers them need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Teacher"]

Teacher = Literal["attention", "query"]
