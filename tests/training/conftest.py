from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.module.captures_of import captures_of
from sparda_compile.testing import build

SMALL = {
    "block_size": 16,
    "pool_size": 8,
    "pool_stride": 4,
    "local_blocks": 1,
    "top_k": 3,
    "lowering": "eager",
}


class Gym:
    """A traced model and what it can be trained on."""

    def __init__(self):
        self.config = SpardaConfig(**SMALL)
        self.model = build("llama")
        self.captures = captures_of(self.model)

    def batches(self, count, batch_size=1, length=200, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randint(0, 256, (batch_size, length), generator=generator) for _ in range(count)
        ]


@pytest.fixture(scope="session")
def interpreted():
    """Run kernels on CPU tensors, in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip(
            "runs a kernel on CPU tensors in Triton's interpreter, which is on only where there is "
            "no GPU, since it would interpret every kernel of the run. With a GPU the compiled "
            "kernels are compared with the same plain PyTorch by `pytest -m gpu tests/training`, "
            "and by benchmarks/train_forecast.py before it times"
        )


@pytest.fixture(scope="session")
def gym():
    return Gym()


@pytest.fixture
def shared_capture(gym, monkeypatch):
    """Trace the model of the session once for all tests that train it."""
    from sparda_compile.training import trainer

    monkeypatch.setattr(
        trainer, "captures_of", lambda m: gym.captures if m is gym.model else captures_of(m)
    )
