from __future__ import annotations

import pytest
import torch

from sparda_compile.bench.decode import DecodeSetting
from sparda_compile.cli.trace_options import read_traces
from sparda_compile.errors import ConfigError
from sparda_compile.traces import Recording, TraceFile


@pytest.fixture
def path(tmp_path):
    ids = torch.arange(1, 7, dtype=torch.uint8).expand(2, 40, 2, 6).contiguous()
    recording = Recording("t", "0" * 64, "infllm2", 0.1, 6144, 1, 92, ids)
    TraceFile({"name": "m"}, 64, (recording,)).save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def test_a_setting_follows_the_trace_with_a_whole_number_of_copies(path):
    followed = read_traces(path, [], None)
    setting = followed.setting(DecodeSetting(1), [])
    assert (setting.overlaps, setting.settings) == ((), {"top_k": 60})
    assert setting.recorded[0].copies == 10
    plain = followed.plain()
    assert (plain["name"], plain["cases"]) == ("trace", ["infllm2 10%"])
    setting = read_traces(path, ["infllm2 10%"], 3).setting(DecodeSetting(1), [0.9])
    assert (setting.overlaps, setting.settings) == ((0.9,), {"top_k": 18})
    chosen = followed.setting(DecodeSetting(1, settings={"selector": "lowbit2"}), [])
    assert chosen.settings == {"selector": "lowbit2", "top_k": 60}


def test_what_does_not_fit_the_benchmark_is_found_at_once(path):
    with pytest.raises(ConfigError, match="40 steps, fewer than the 44 that are run"):
        read_traces(path, [], None).setting(DecodeSetting(1, steps=40), [])
    with pytest.raises(ConfigError, match="22 copies of 92 blocks do not fit the 2013"):
        read_traces(path, [], 22).setting(DecodeSetting(1), [])


def test_nothing_is_followed_without_a_file():
    assert read_traces(None, [], None) is None
    for names, copies in ((["infllm2 10%"], None), ([], 3)):
        with pytest.raises(ConfigError, match="are of a trace; pass trace"):
            read_traces(None, names, copies)


def test_several_ranks_follow_none(path):
    with pytest.raises(ConfigError, match="tp=2 ranks follow no trace"):
        read_traces(path, [], None, 2)


def test_blocks_of_another_size(path):
    ids = torch.ones(1, 2, 1, 1, dtype=torch.uint8)
    recording = Recording("t", "0" * 64, "infllm2", 0.1, 64, 1, 2, ids)
    TraceFile({}, 16, (recording,)).save(path)
    with pytest.raises(ConfigError, match=r"blocks of 16 tokens.*record it with --block-size 64"):
        read_traces(path, [], None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trace", "no.safetensors"), "--trace no.safetensors is no file"),
        (("--copies", 3), "are of a trace; pass trace, or leave them out"),
        (("--trace", "no.safetensors", "--top-k", 9), "--top-k does not go with --trace"),
    ],
)
def test_it_is_refused_before_a_gpu_is_asked_for(sparda, options, words):
    result = sparda("bench", "decode", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_the_command_reads_the_file_before_it_asks_for_a_gpu(sparda, path):
    result = sparda("bench", "decode", "--trace", path, "--trace-case", "quest 10%")
    assert result.exit_code == 2
    assert "--trace-case quest 10% is not in the trace" in " ".join(result.output.split())
    result = sparda("bench", "decode", "--trace", path)
    assert "measures a CUDA GPU" in " ".join(result.output.split())
