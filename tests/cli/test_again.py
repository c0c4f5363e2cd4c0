from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from sparda_compile.cli.again import words_of


@pytest.fixture
def again():
    """Runs a command; returns the words that it would start itself again with."""
    app, said = typer.Typer(), []

    @app.command()
    def one(
        context: typer.Context,
        target: str,
        number: int = 3,
        share: float = 0.5,
        many: Annotated[list[int] | None, typer.Option()] = None,
        place: Path = Path("here"),
        with_it: Annotated[bool, typer.Option("--with-it/--no-with-it")] = True,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        del target, number, share, many, place, with_it, as_json
        said.append(words_of(context, ("share",)))

    def run(*words):
        out = CliRunner().invoke(app, [str(word) for word in words])
        assert out.exit_code == 0, out.output
        return said.pop()

    return run


def test_what_is_the_default_is_left_out(again):
    assert again("x") == ["x"]
    assert again("x", "--number", 3, "--place", "here", "--with-it") == ["x"]


def test_what_differs_is_said_as_it_was(again):
    words = ["a b", "--number", "0", "--many", "1", "--many", "2", "--place", "/there"]
    assert again(*words) == words
    assert again("x", "--no-with-it", "--json") == ["x", "--no-with-it", "--json"]


def test_names_are_left_out(again):
    assert again("x", "--share", 0.1, "--number", 4) == ["x", "--number", "4"]


def test_words_lead_to_the_same_words(again):
    words = again("x", "--many", 5, "--no-with-it")
    assert again(*words) == words
