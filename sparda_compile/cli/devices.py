"""Devices that a command is told to run on, and whether they have the room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["check_memory", "find_device"]


def find_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, or another accelerator that this torch has.

    Raises:
        ConfigError: If it is the name of none, or it is not there.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device; use {_there()}.") from error
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    if device.type == "cpu":
        found, count = torch.device("cpu"), 1
    if found is None or device.type != found.type:
        raise ConfigError(
            f"--device {name} is not there: torch {torch.__version__} sees no device of type "
            f"{device.type}; use {_there()}."
        )
    if (device.index or 0) >= count:
        raise ConfigError(
            f"--device {name} is not there: the last of the {count} of type {device.type} is "
            f"{device.type}:{count - 1}; use {_there()}."
        )
    return device


def _there() -> str:
    """Return the devices that there are, in words."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return "cpu, the only device here"
    return f"cpu, or {found.type}:0 to {found.type}:{torch.accelerator.device_count() - 1}"


def check_memory(config: Any, batch: int, tokens: int, device: torch.device) -> None:
    """Refuse sequences whose keys and values alone are more than the device has free.

    Args:
        config: Of a transformers model built like Llama.
        batch: Sequences at once.
        tokens: Tokens of each.
        device: Where they are to be.

    Raises:
        ConfigError: If they do not fit; the text names `--batch` and `--tokens`.
    """
    import torch

    from sparda_compile.runtime.host_pool import free_host_bytes

    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    is_cpu = device.type == "cpu"
    per_token = 2 * text.num_hidden_layers * heads * width * (4 if is_cpu else 2)
    needed = batch * tokens * per_token
    free = free_host_bytes() if is_cpu else torch.accelerator.get_memory_info(device)[0]
    if needed > free:
        raise ConfigError(
            f"{batch} x {tokens} tokens have {needed / 2**30:.1f} GiB of keys and values, but "
            f"{device} has {free / 2**30:.1f} GiB free; lower the number of tokens "
            f"(batch x tokens) to at most {free // per_token}."
        )
