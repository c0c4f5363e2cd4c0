from __future__ import annotations

import sys

import pytest

from sparda_compile.bench.plots import check_matplotlib, write_plot
from sparda_compile.errors import BackendUnavailableError


def test_plot(tmp_path, decode_results):
    pytest.importorskip("matplotlib")
    path = write_plot(decode_results, tmp_path / "decode.svg")
    assert path.read_text().count("<svg") == 1
    assert path.read_text().count('id="axes_') == 3


def test_plot_of_nothing(tmp_path, decode_results):
    pytest.importorskip("matplotlib")
    assert write_plot(decode_results[2:], tmp_path / "decode.png").stat().st_size > 1000


def test_plot_needs_matplotlib(tmp_path, monkeypatch, decode_results):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match="leave --plot out"):
        check_matplotlib()
    with pytest.raises(BackendUnavailableError, match=r"sparda-compile\[plot\]"):
        write_plot(decode_results, tmp_path / "decode.png")
    assert not (tmp_path / "decode.png").exists()
