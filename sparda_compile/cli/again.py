"""The words of a command line, from what typer has read: to start the same command again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    import typer

__all__ = ["words_of"]


def words_of(context: typer.Context, without: Collection[str] = ()) -> list[str]:
    """Return arguments and options of the command that runs, without those that are the default.

    Args:
        context: Of the command.
        without: Names of parameters to leave out.
    """
    words: list[str] = []
    for param in context.command.params:
        value = context.params.get(str(param.name))
        if param.name in without or value is None or value == param.default:
            continue
        if param.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((param.opts if value else param.secondary_opts)[0])
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                words += [param.opts[0], str(each)]
    return words
