"""One of two processes that train together; `test_parallel.py` starts both with torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparda_compile import train_forecast
from sparda_compile.forecast.projection import to_tensors
from sparda_compile.testing import build
from sparda_compile.training import parallel


def main(folder):
    """Train on half of the batches of `folder` and write what came out."""
    task = torch.load(folder / "task", weights_only=False)
    reports = []
    weights = train_forecast(
        build("llama"), task["batches"], config=task["config"], steps=2, lr=3e-3,
        on_step=reports.append,
    )  # fmt: skip
    assert parallel.world_size() == 1, "the group must be left"
    told = {"losses": [r.losses for r in reports], "tokens": [r.num_tokens for r in reports]}
    out = {"weights": to_tensors(weights.projections), **told}
    torch.save(out, folder / f"rank{parallel.rank_of_environment()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
