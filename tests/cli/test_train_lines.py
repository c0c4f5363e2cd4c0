from __future__ import annotations

from sparda_compile.cli.train_lines import TrainingLines, share_in_words
from sparda_compile.training.report import HeldOutReport


def test_a_share_that_there_is_not():
    assert share_in_words(0.51234) == "0.512"
    assert share_in_words(float("nan")) == "unknown (too short)"


def test_what_held_out_documents_gave_is_said_at_once(capsys):
    lines = TrainingLines(1)
    lines.measured(HeldOutReport(7, {0: 1.0, 1: 2.0}, {0: 0.25, 1: 0.75}, 100))
    assert "held-out documents behind step 7: loss 1.5000, recall 0.500" in capsys.readouterr().err
    assert [each.step for each in lines.measures] == [7]
