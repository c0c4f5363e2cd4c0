from __future__ import annotations

import pytest

from sparda_compile.bench.decode import DecodeSetting
from sparda_compile.bench.rank_decode import measure_on_ranks
from sparda_compile.errors import ConfigError

SETTING = DecodeSetting(1)


@pytest.mark.parametrize("started", ["1", "3"])
def test_another_number_of_processes_is_refused(monkeypatch, started):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError, match=f"--tp 2 was started in {started} processes"):
        measure_on_ranks("tiny", [SETTING], 2, print, print)
