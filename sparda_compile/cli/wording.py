"""Sentences of the library in the words of a command: `local_blocks` becomes `--local-blocks`.

The library names the fields and arguments that its caller has. Whoever typed a command has its
options, some of which go by another name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["in_options", "option_of"]

# What the library calls it, and the parameters of commands that stand for it, best first.
_OTHER_NAMES: Final = {
    "max_tokens": ("tokens",),
    "num_tokens": ("tokens",),
    "length": ("length", "tokens"),
    "batch_size": ("batch",),
    "num_samples": ("samples",),
    "forecast_rank": ("rank",),
}
_VALUE: Final = re.compile(r"(?<![\w.-])([a-z]\w*)=(\([^)]*\)|'[^']*'|[^\s;,]*[^\s;,.)])")
_FIELD: Final = re.compile(r"(?<![\w.'/-])([a-z]+(?:_[a-z]+)+)(?![\w.'=/-])")
_REMEDY: Final = re.compile(r"(?<!a )\b(lower|raise) ([a-z]+)(?: or ([a-z]+))?\b(?![=_])")


def option_of(name: str, parameters: Collection[str]) -> str | None:
    """Return the option of a command that stands for a name of the library, if one does.

    Args:
        name: A field of SpardaConfig, or an argument of a function.
        parameters: Names of the command's parameters.
    """
    for known in _OTHER_NAMES.get(name, (name,)):
        if known in parameters:
            return "--" + known.replace("_", "-")
    return None


def in_options(message: str, parameters: Collection[str]) -> str:
    """Return a sentence with the options of a command in place of the library's names.

    Args:
        message: Of an error.
        parameters: Names of the command's parameters.
    """

    def with_value(match: re.Match[str]) -> str:
        option = option_of(match[1], parameters)
        if option is None:
            return match[0]
        # A tuple is an option that was given again.
        parts = match[2].strip("()").split(",") if match[2].startswith("(") else [match[2]]
        values = [part.strip().strip("'") for part in parts if part.strip()]
        return " ".join(f"{option} {value or chr(39) * 2}" for value in values)

    def alone(match: re.Match[str]) -> str:
        return option_of(match[1], parameters) or match[0]

    def remedy(match: re.Match[str]) -> str:
        named = [option_of(name, parameters) or name for name in match.groups()[1:] if name]
        return f"{match[1]} {' or '.join(named)}"

    message = _VALUE.sub(with_value, message)
    return _REMEDY.sub(remedy, _FIELD.sub(alone, message))
