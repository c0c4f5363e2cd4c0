from __future__ import annotations

import re

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.chat.settings import ChatSettings
from sparda_compile.cli.chat_commands import COMMANDS, help_text, in_commands, run_command
from sparda_compile.errors import ConfigError
from sparda_compile.registry import SELECTORS


class Conversation:
    """Has settings, and says what it was told."""

    def __init__(self):
        base = SpardaConfig(mode="query", hint="ema", top_k=5, local_blocks=2, offload="never")
        self.settings = ChatSettings(base, 0.25, 100)

    def change(self, **changes):
        self.settings = self.settings.changed(**changes)
        return "as told"

    def stats(self):
        return "7 hits"

    def reset(self):
        return "all gone"


@pytest.fixture
def conversation():
    return Conversation()


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/mode exact", "mode", "exact"),
        ("/selector quest", "selector", "quest"),
        ("/hint previous_step", "hint", "previous_step"),
        ("/prefill sparse", "prefill", "sparse"),
        ("/prefill-selector quest", "prefill_selector", "quest"),
        ("/prefill-selector none", "prefill_selector", None),
        ("/prefill-candidates all", "prefill_candidates", None),
        ("/offload auto", "offload", "auto"),
        ("/top-k 3", "top_k", 3),
        ("/top_k all", "top_k", None),
    ],
)
def test_settings_of_the_configuration(conversation, line, field, value):
    said = run_command(line, conversation)
    assert said == f"{line.replace('_k', '-k')}: as told"
    assert getattr(conversation.settings.base, field) == value


def test_settings_of_the_conversation(conversation):
    assert run_command("/budget 0.5", conversation) == "/budget 0.5: as told"
    assert run_command("/max-new-tokens 9", conversation) == "/max-new-tokens 9: as told"
    assert (conversation.settings.budget, conversation.settings.max_new_tokens) == (0.5, 9)
    assert run_command("/hint ema,next_query", conversation) == "/hint ema,next_query: as told"
    assert conversation.settings.base.hint == ("ema", "next_query")


def test_candidates_are_of_a_selector_by_low_bit_keys(conversation):
    with pytest.raises(ConfigError, match="selector='infllm2' of prompts scores no such keys"):
        run_command("/prefill-candidates 2", conversation)
    run_command("/selector lowbit2", conversation)
    assert run_command("/prefill-candidates 2", conversation).startswith("/prefill-candidates 2")
    assert conversation.settings.base.prefill_candidates == 2.0


def test_a_command_without_a_value_says_what_there_is(conversation):
    assert run_command("/mode", conversation) == (
        "/mode query; it may be dense, query, forecast, exact, speculate"
    )
    assert run_command("/selector", conversation).endswith(", ".join(SELECTORS.choices()))
    assert run_command("/top-k", conversation).startswith("/top-k not set, /budget 0.25 is;")
    run_command("/top-k 3", conversation)
    assert run_command("/budget", conversation).startswith("/budget not set, /top-k is;")


def test_other_commands(conversation):
    assert run_command("/stats", conversation) == "7 hits"
    assert run_command("/reset", conversation) == "all gone"
    assert run_command("/quit", conversation) is None
    assert "/mode query\n" in run_command("/settings", conversation)
    assert run_command("/help", conversation) == help_text()
    assert [line.split()[0] for line in help_text().splitlines()] == list(COMMANDS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/poem", r"/poem is no command; use one of /mode, /selector, .*/quit\."),
        ("/", r"/ is no command"),
        ("/top-k many", r"/top-k many is not allowed; use a whole number, or all\."),
        ("/prefill-candidates two", r"two is not allowed; use 1\.0 or more, or all\."),
        ("/budget half", r"/budget half is not allowed; use 0\.01 to 1\."),
        ("/budget 0", r"/budget 0\.0 is not a share"),
        ("/mode best", r"/mode best is not known; use one of dense, query"),
        ("/max-new-tokens 0", r"/max-new-tokens 0 leaves no room"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(conversation, line, said):
    with pytest.raises(ConfigError) as caught:
        run_command(line, conversation)
    assert re.search(said, in_commands(str(caught.value)))


def test_sentences_of_the_library_name_commands():
    assert in_commands("pass offload='never', or raise top_k; --forecast stays") == (
        "pass /offload never, or raise /top-k; /forecast stays"
    )
