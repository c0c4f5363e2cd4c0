from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.chat.settings import ChatSettings
from sparda_compile.errors import ConfigError

BASE = SpardaConfig(mode="query", top_k=5, local_blocks=2, block_size=16)


def test_share_is_of_the_blocks_of_the_text():
    settings = ChatSettings(BASE, 0.25, 10)
    # 1 sink, 2 local and the current block are read whatever the scores.
    assert settings.config(16 * 100).top_k == 25 - 4
    assert settings.config(16 * 100).num_selected(100) == 25
    assert settings.config(16 * 8).top_k == 0


def test_full_share_reads_all_and_none_reads_top_k():
    assert ChatSettings(BASE, 1.0, 10).config(1600).top_k is None
    assert ChatSettings(BASE, None, 10).config(1600) == BASE
    dense = BASE.replace(mode="dense")
    assert ChatSettings(dense, 0.5, 10).config(1600) == dense


def test_changes_reach_settings_and_configuration():
    settings = ChatSettings(BASE, 0.25, 10)
    changed = settings.changed(mode="exact", hint="ema", max_new_tokens=7)
    assert (changed.base.mode, changed.base.hint, changed.max_new_tokens) == ("exact", "ema", 7)
    assert changed.budget == 0.25
    assert settings.changed(top_k=3).budget is None
    assert settings.changed(top_k=3).config(1600).top_k == 3
    assert settings.changed(top_k=3).changed(budget=0.5).config(1600).top_k == 50 - 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is not a share"),
        ({"budget": 1.5}, r"budget=1\.5 is not a share"),
        ({"max_new_tokens": 0}, "leaves no room for an answer"),
        ({"mode": "best"}, "mode='best'"),
        ({"selector": "nosa"}, "short_list=23 is more than"),
    ],
)
def test_what_is_not_allowed_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        ChatSettings(BASE, 0.25, 10).changed(**changes)
