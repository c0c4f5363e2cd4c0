from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparda_compile.traces import load_traces


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "one.txt"
    path.write_text(" ".join(f"Line {i}." for i in range(80)))
    return path


SMALL = ("--tokens", 300, "--steps", 5, "--block-size", 16, "--local-blocks", 1)


def test_a_trace_is_recorded(sparda, folder, text):
    record = ("eval", "trace", folder, "--document", text, *SMALL)
    result = sparda(*record, "--budget", 0.5)
    assert result.exit_code == 0, result.output
    assert "7 of 17" in result.stdout
    assert "Wrote trace.safetensors" in result.stdout
    rules = ("--selector", "infllm2", "--selector", "lowbit2", "--out", "b.safetensors", "--json")
    result = sparda(*record, *rules, "--budget", 0.25, "--budget", 0.5)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["recordings"]
    cases = [(row["selector"], row["share"], row["chosen"]) for row in rows]
    assert cases == [
        (rule, share, chosen)
        for share, chosen in ((0.25, 2), (0.5, 7))
        for rule in ("infllm2", "lowbit2")
    ]
    found = load_traces(Path("b.safetensors"))
    assert found.model["name"] == folder.name
    assert len(found.model["weights_sha256"]) == 64
    assert [round(sum(e.overlap_by_layer()) / 2, 4) for e in found.recordings] == [
        row["overlap"] for row in rows
    ]


def test_answers_are_recorded(sparda, folder, text):
    asked = ("--question", "Which line?", "--question", "And then?", "--budget", 0.5)
    record = ("eval", "trace", folder, "--document", text, *SMALL, *asked)
    result = sparda(*record, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["recordings"]
    assert row["text"] == "one.txt (talk)"
    (found,) = load_traces(Path("trace.safetensors")).recordings
    assert row["answers"] == [*found.answers]
    assert (len(found.answers), found.num_tokens) == (2, 300)
    assert max(found.answers) <= 5
    assert found.ids_LSGK.shape[1] == sum(found.answers)
    result = sparda(*record)
    assert result.exit_code == 0, result.output
    assert f"one.txt (talk) {' + '.join(map(str, found.answers))}" in " ".join(
        result.stdout.split()
    )


def test_more_tokens_than_positions(sparda, folder, text):
    long = ("--tokens", 520, "--steps", 10, "--block-size", 16, "--local-blocks", 1)
    result = sparda("eval", "trace", folder, "--document", text, *long, "--budget", 0.5)
    assert result.exit_code == 2
    assert "--tokens 520" in result.output


def test_a_budget_that_leaves_no_choice(sparda, folder, text):
    result = sparda("eval", "trace", folder, "--document", text, *SMALL, "--budget", 0.1)
    assert result.exit_code == 2
    assert "fewer than the 3 that are always read" in " ".join(result.output.split())
