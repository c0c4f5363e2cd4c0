from __future__ import annotations

import pytest

from sparda_compile.bench import prompt_programs
from sparda_compile.cli.bench_files import (
    REPEAT,
    budget_file,
    decode_file,
    kernels_file,
    prompt_file,
    trace_file,
)


@pytest.mark.parametrize(
    ("make", "name", "key"),
    [(decode_file, "decode", "batch_size"), (budget_file, "budget", "budget_gib")],
)
def test_files_of_shapes(tmp_path, make, name, key):
    file = make(tmp_path, "8b", 4096, "abc")
    file.save({key: 1})
    assert file.path == tmp_path / f"{name}-8b.json"
    assert file.content() == {
        "name": name, "shape": "8b", "max_tokens": 4096, "results": [{key: 1}],
    }  # fmt: skip
    assert make(tmp_path, "8b", 4096, "abc").has(1)
    assert not make(tmp_path, "8b", 8192, "abc").has(1), "it holds other tokens"


def test_file_of_kernels(tmp_path):
    file = kernels_file(tmp_path / "k.json", None)
    assert (file.path, file.key, file.head) == (tmp_path / "k.json", "part", {"name": "kernels"})


def test_file_of_steps_that_follow_a_trace(tmp_path):
    trace = {"name": "chat", "sha256": "1"}
    file = trace_file(tmp_path, "8b", 4096, "abc", None, trace)
    assert (file.path.name, file.head["trace"]) == ("decode-8b-trace-chat.json", trace)
    file.save({"batch_size": 1})
    assert not trace_file(tmp_path, "8b", 4096, "abc", None, {**trace, "sha256": "2"}).has(1)
    file = trace_file(tmp_path, "8b", 4096, None, {"kv_format": "fp8"}, trace)
    assert file.path.name == "decode-8b-fp8-trace-chat.json"


def test_files_say_what_is_not_as_usual(tmp_path):
    fields = {"kv_format": "int8", "top_k": 171, "selector": "lowbit4", "page_format": "model"}
    file = decode_file(tmp_path, "8b", 4096, "abc", fields)
    assert file.path.name == "decode-8b-int8-lowbit4-top171.json"
    wanted = {"name": "decode", "shape": "8b", "max_tokens": 4096}
    del fields["page_format"]
    assert file.head == {**wanted, **fields}
    assert decode_file(tmp_path, "8b", 4096, "abc", {"kv_format": "model"}).head == wanted
    fields = {"kv_format": "int8", "page_format": "stored"}
    file = decode_file(tmp_path, "8b", 4096, "abc", fields, 2)
    assert file.path.name == "decode-8b-int8-stored-tp2.json"
    assert file.head["page_format"] == "stored"
    file = trace_file(
        tmp_path, "8b", 4096, None, {"kv_format": "int4", "page_format": "stored"}, {"name": "m"}
    )
    assert file.path.name == "decode-8b-int4-stored-trace-m.json"
    file = trace_file(tmp_path, "8b", 4096, None, {"top_k": 126, "page_ratio": 2.5}, {"name": "m"})
    assert file.path.name == "decode-8b-top126-pages2.5-trace-m.json"
    assert file.head["page_ratio"] == 2.5
    file = budget_file(tmp_path, "8b", 4096, "abc", {"kv_format": "fp8"})
    assert (file.path.name, file.head["kv_format"]) == ("budget-8b-fp8.json", "fp8")


def test_files_of_prompts(tmp_path):
    assert REPEAT == prompt_programs.REPEAT
    file = prompt_file("prefill", tmp_path, "8b", "abc", {"chunk_tokens": 4096})
    assert (file.path.name, file.key) == ("prefill-8b.json", "tokens")
    assert file.head == {"name": "prefill", "shape": "8b", "repeat": REPEAT}
    fields = {"selector": "lowbit2", "prefill_selector": "infllm2"}
    file = prompt_file("turns", tmp_path, "8b", "abc", fields, 1, 2)
    assert file.path.name == "turns-8b-lowbit2-prompts-infllm2-repeat-1-tp2.json"
    assert file.head == {"name": "turns-tp", "shape": "8b", "repeat": 1, "tp": 2, **fields}
    assert file.key == "past"
    file = prompt_file("turns", tmp_path, "8b", "abc", {"prefill_candidates": 2.5})
    assert (file.path.name, file.head["prefill_candidates"]) == ("turns-8b-candidates2.5.json", 2.5)


def test_prompts_by_another_selector_are_not_mixed(tmp_path):
    low = prompt_file("prefill", tmp_path, "8b", "abc", {"selector": "lowbit2"})
    low.save({"tokens": 1024})
    assert low.path.name == "prefill-8b-lowbit2.json"
    low.path.rename(tmp_path / "prefill-8b-lowbit4.json")
    assert not prompt_file("prefill", tmp_path, "8b", "abc", {"selector": "lowbit4"}).has(1024)
