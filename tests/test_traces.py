from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparda_compile.errors import ConfigError
from sparda_compile.traces import Recording, TraceFile, load_traces

IDS = torch.tensor(
    [[[[1, 2, 4]], [[2, 4, 9]], [[2, 4, 9]]], [[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]]]
)


def recording(**changes):
    fields = {
        "text": "a.txt",
        "sha256": "0" * 64,
        "selector": "infllm2",
        "share": 0.25,
        "num_tokens": 640,
        "sink_blocks": 1,
        "num_free": 9,
        "ids_LSGK": IDS.to(torch.uint8),
    }
    return Recording(**(fields | changes))


def traces(**changes):
    return TraceFile({"name": "m"}, 64, (recording(), recording(share=0.1, **changes)))


def test_the_overlap_of_each_layer():
    assert recording().overlap_by_layer() == pytest.approx([(2 / 3 + 1) / 2, 0.0])


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "deep" / "trace.safetensors"
    traces(text="b.txt").save(path)
    found = load_traces(path)
    assert (found.model, found.block_size) == ({"name": "m"}, 64)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for one, other in zip(found.recordings, traces(text="b.txt").recordings, strict=True):
        assert torch.equal(one.ids_LSGK, other.ids_LSGK)
        fields = (dataclasses.asdict(each) | {"ids_LSGK": None} for each in (one, other))
        assert next(fields) == next(fields)
    assert list(found.cases()) == ["infllm2 25%", "infllm2 10%"]


def test_a_talk_says_how_long_its_answers_are(tmp_path):
    path = tmp_path / "trace.safetensors"
    traces(answers=(2, 1)).save(path)
    assert [each.answers for each in load_traces(path).recordings] == [(), (2, 1)]
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["sparda_trace"])
    assert "answers" not in head["recordings"][0], "a text's entry is as it always was"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ids_LSGK": IDS.int()}, "not .L, S, G, K. uint8 or int16"),
        ({"num_free": 8}, "ids are 1 to 9; 1 to 8 can be chosen"),
        ({"sink_blocks": 2}, "ids are 1 to 9; 2 to 10"),
        ({"answers": (2, 2)}, "answers of 4 steps are not the 3 there are"),
        ({"ids_LSGK": IDS.flip(-1).to(torch.int16)}, "not ascending"),
    ],
)
def test_ids_that_cannot_be(tmp_path, changes, words):
    path = tmp_path / "trace.safetensors"
    traces(**changes).save(path)
    with pytest.raises(ConfigError, match=words):
        load_traces(path)


def test_files_that_are_no_trace(tmp_path):
    path = tmp_path / "trace.safetensors"
    with pytest.raises(ConfigError, match="is no file"):
        load_traces(path)
    path.write_text("no")
    with pytest.raises(ConfigError, match="cannot be read as a trace"):
        load_traces(path)
    later = {"sparda_trace": json.dumps({"format_version": 2})}
    save_file({"0": IDS}, path, metadata=later)
    with pytest.raises(ConfigError, match="format_version is 2"):
        load_traces(path)


def test_the_traces_that_the_project_has_can_be_read():
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "traces"
    files = sorted(folder.glob("*.safetensors"))
    assert files
    for file in files:
        found = load_traces(file)
        assert file.stat().st_size < 1 << 20
        assert {each.share for each in found.recordings} == {0.1, 0.25}
        assert len({each.text for each in found.recordings}) == 3


def test_committed_talks_are_about_the_committed_texts():
    folder = Path(__file__).parents[1] / "benchmarks" / "traces"
    texts, talks = (
        load_traces(folder / f"{name}.safetensors") for name in ("smollm2", "smollm2-chat")
    )
    assert texts.model == talks.model
    assert list(texts.cases()) == list(talks.cases())
    for fed, written in zip(texts.recordings, talks.recordings, strict=True):
        assert (written.sha256, written.case) == (fed.sha256, fed.case)
        assert (written.num_tokens, fed.num_tokens) == (6144, 6144)
        assert written.ids_LSGK.shape[-1] == fed.ids_LSGK.shape[-1]
        assert (len(written.answers), fed.answers) == (3, ())
