"""What can be said to `sparda chat` that is no question: `/mode query`, `/stats`, `/quit`."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Final, get_args

from sparda_compile.cli.wording import in_options
from sparda_compile.config import Mode, Offload, Prefill
from sparda_compile.errors import ConfigError
from sparda_compile.registry import HINTS, KV_FORMATS, SELECTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sparda_compile.chat.conversation import Conversation

__all__ = ["COMMANDS", "help_text", "in_commands", "run_command"]


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A setting that a command changes.

    Attributes:
        what: What it says, for `/help`.
        parse: Makes a value of what was typed.
        allowed: Returns what may be typed, in words.
    """

    what: str
    parse: Callable[[str], Any]
    allowed: Callable[[], str]


def _names(names: Callable[[], Iterable[str]]) -> Callable[[], str]:
    return lambda: ", ".join(names())


def _fixed(text: str) -> Callable[[], str]:
    return lambda: text


def _top_k(text: str) -> int | None:
    return None if text == "all" else int(text)


def _name_or_none(text: str) -> str | None:
    return None if text == "none" else text


def _times(text: str) -> float | None:
    return None if text == "all" else float(text)


def _hints(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(","))
    return names[0] if len(names) == 1 else names


_SETTINGS: Final = {
    "mode": _Setting("who selects the blocks", str, _names(lambda: get_args(Mode))),
    "selector": _Setting("how a query scores blocks", str, _names(SELECTORS.choices)),
    "hint": _Setting(
        "what modes exact and speculate guess by; several with commas",
        _hints,
        _names(HINTS.choices),
    ),
    "budget": _Setting("share of the blocks to read", float, _fixed("0.01 to 1")),
    "top_k": _Setting(
        "blocks to pick by score, in the place of a share", _top_k, _fixed("a whole number, or all")
    ),
    "prefill": _Setting("what new questions read", str, _names(lambda: get_args(Prefill))),
    "prefill_selector": _Setting(
        "how tokens of a sparse question score blocks, in the place of /selector",
        _name_or_none,
        _names(lambda: (*SELECTORS.choices(), "none")),
    ),
    "prefill_candidates": _Setting(
        "times /top-k, how many blocks tokens of a sparse question score by low-bit keys",
        _times,
        _fixed("1.0 or more, or all"),
    ),
    "kv_format": _Setting("how full blocks are written", str, _names(KV_FORMATS.choices)),
    "offload": _Setting("where the KV cache lives", str, _names(lambda: get_args(Offload))),
    "max_new_tokens": _Setting("most tokens of an answer", int, _fixed("a whole number")),
}
_OTHERS: Final = {
    "stats": "what the cache did since the last question",
    "settings": "all settings, as they are",
    "reset": "forget all turns; the documents are read again",
    "help": "this list",
    "quit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
COMMANDS: Final = tuple("/" + name.replace("_", "-") for name in [*_SETTINGS, *_OTHERS])
"""All commands, as they are typed."""

_OPTION: Final = re.compile(r"(?<![\w-])--(?=[a-z])")


def in_commands(message: str, parameters: Iterable[str] | None = None) -> str:
    """Return a sentence of the library with commands in place of its names: `/top-k 4`.

    Args:
        message: Of an error.
        parameters: Names that commands stand for; None is all of them.
    """
    return _OPTION.sub("/", in_options(message, list(parameters or _SETTINGS)))


def help_text() -> str:
    """Return the commands in lines."""
    rows = [
        (f"/{name.replace('_', '-')} [VALUE]", f"{each.what}: {each.allowed()}")
        for name, each in _SETTINGS.items()
    ]
    rows += [(f"/{name}", what) for name, what in _OTHERS.items()]
    width = max(len(command) for command, _ in rows)
    return "\n".join(f"{command:{width}}  {what}" for command, what in rows)


def run_command(line: str, conversation: Conversation) -> str | None:
    """Run a command.

    Args:
        line: Beginning with a slash.
        conversation: Which it is about.

    Returns:
        What to say, or None to leave.

    Raises:
        ConfigError: If there is no such command, or its value is not allowed.
    """
    typed, *values = line[1:].split()[:2] or [""]
    name = typed.replace("-", "_")
    if name in _SETTINGS:
        return _set(name, values[0] if values else None, conversation)
    if name not in _OTHERS:
        raise ConfigError(f"/{typed} is no command; use one of {', '.join(COMMANDS)}.")
    if name == "quit":
        return None
    say: dict[str, Callable[[], str]] = {
        "help": help_text,
        "settings": lambda: _all_settings(conversation),
        "stats": conversation.stats,
        "reset": conversation.reset,
    }
    return say[name]()


def _set(name: str, value: str | None, conversation: Conversation) -> str:
    setting, command = _SETTINGS[name], "/" + name.replace("_", "-")
    if value is None:
        return f"{command} {_current(name, conversation)}; it may be {setting.allowed()}"
    try:
        parsed = setting.parse(value)
    except ValueError as error:
        raise ConfigError(f"{command} {value} is not allowed; use {setting.allowed()}.") from error
    said = conversation.change(**{name: parsed})
    return f"{command} {_current(name, conversation)}: {said}"


def _current(name: str, conversation: Conversation) -> str:
    settings = conversation.settings
    if name == "budget":
        return "not set, /top-k is" if settings.budget is None else f"{settings.budget:g}"
    if name == "top_k" and settings.budget is not None:
        return f"not set, /budget {settings.budget:g} is"
    owner = settings if hasattr(settings, name) else settings.base
    value = getattr(owner, name)
    if isinstance(value, tuple):
        return ",".join(value)
    if value is None:
        return "all" if name in ("top_k", "prefill_candidates") else "none"
    return str(value)


def _all_settings(conversation: Conversation) -> str:
    lines = (f"/{name.replace('_', '-')} {_current(name, conversation)}" for name in _SETTINGS)
    return "\n".join(lines)
