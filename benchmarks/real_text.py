"""What programs share that run the real model on a document: options, its tokens, the Forecast."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.cli.real_model import forecast_file, load_real_model, load_real_tokenizer
from sparda_compile.environment import describe
from sparda_compile.forecast.weights import load_forecast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparda_compile.forecast.weights import ForecastWeights

__all__ = ["options", "read", "result_of"]


def options(purpose: str) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("document", type=Path)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--commit")
    return parser.parse_args()


def read(given: argparse.Namespace) -> tuple[nn.Module, Tensor, ForecastWeights]:
    """Return the model, a document's first tokens [1, T], and the Forecast of the package."""
    tokenizer, model = load_real_tokenizer(), load_real_model()
    model = model.to(given.device, getattr(torch, given.dtype))
    text = given.document.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])[None, : given.tokens].to(given.device)
    path = forecast_file(Path("smollm2"))
    assert path is not None
    return model, ids, load_forecast(path)


def result_of(given: argparse.Namespace, name: str, **found: Any) -> dict[str, Any]:
    """Return what a program prints: where it ran, with which options, and what it found."""
    settings = {k: v for k, v in vars(given).items() if k not in ("document", "commit")}
    head = {"environment": describe(given.commit), "name": name, "settings": settings}
    return head | {"document": given.document.name} | found
