"""The small model that the package ships: trained from scratch to look things up.

A Llama of about five million parameters that knows the vocabulary and the tasks of
`sparda_compile.evaluation`, good at sequences of up to 16K tokens and more, with the Forecast that
was trained for it. It shows what the modes do to a model whose attention means something; it
knows no language. `examples/train_small_model.py` made it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.config import SpardaConfig
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.forecast.weights import ForecastWeights, load_forecast

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

__all__ = [
    "SMALL_CONFIG",
    "checked_folder",
    "has_small_model",
    "load_small_forecast",
    "load_small_model",
    "small_model_config",
    "small_model_folder",
]

SMALL_CONFIG: Final = SpardaConfig(mode="query", local_blocks=2, pool_size=16, pool_stride=8)
"""What the model and its Forecast were trained for: `top_k` and `max_tokens` go with the length."""

_WEIGHTS: Final = "model.safetensors"
_FORECAST: Final = "forecast.safetensors"


def small_model_folder() -> Path:
    """Return the folder of the model's files, in the form that transformers loads."""
    return Path(str(resources.files("sparda_compile") / "data" / "small_model"))


def has_small_model() -> bool:
    """Whether the weights are where the package has them."""
    return (small_model_folder() / _WEIGHTS).is_file()


def checked_folder() -> Path:
    """Return the folder of the model's files.

    Raises:
        BackendUnavailableError: If its weights are not there.
    """
    folder = small_model_folder()
    if not has_small_model():
        raise BackendUnavailableError(
            f"the small model's weights are missing: {folder.name}/{_WEIGHTS} is not among the "
            "files of this package. Install a release, or train it with "
            "examples/train_small_model.py and put its model/ there."
        )
    return folder


def small_model_config() -> LlamaConfig:
    """Return the model's configuration, as transformers reads it."""
    from transformers import LlamaConfig

    config: LlamaConfig = LlamaConfig.from_pretrained(checked_folder())
    return config


def load_small_model() -> LlamaForCausalLM:
    """Return the model in eval mode, float32, on the CPU.

    Raises:
        BackendUnavailableError: If its weights are not there.
    """
    folder = checked_folder()
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    loaded: LlamaForCausalLM = model.eval()
    return loaded


def load_small_forecast() -> ForecastWeights | None:
    """Return the Forecast trained for the model; None if its file is not there."""
    path = small_model_folder() / _FORECAST
    return load_forecast(path) if path.is_file() else None
