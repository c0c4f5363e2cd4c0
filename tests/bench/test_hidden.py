"""Shares of hidden copies, from a trace made by hand."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.bench import hidden
from sparda_compile.bench.hidden import can_profile, copy_kernels, hidden_copies, profile_copies
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.profiling.kernel_trace import read_kernels

COMPUTE, SELECT, COPY = 7, 13, 20
# Name, stream, start and end: fetches at 10 to 30 and 40 to 50, a store at 60 to 100.
WORK = [
    ("gemm", COMPUTE, 0, 15),
    ("_score", SELECT, 12, 20),
    ("_fetch", COPY, 10, 30),
    ("gemm", COMPUTE, 25, 28),
    ("_fetch", COPY, 40, 50),
    ("norm", COMPUTE, 45, 61),
    ("_store", COPY, 60, 100),
    ("Memcpy HtoD (Pinned -> Device)", COMPUTE, 70, 72),
    ("_fetch_in_line", COMPUTE, 80, 90),
    ("late", COPY, 95, 99),
    ("gemm", COMPUTE, 110, 120),
]
COPIES = {"_fetch", "_store", "_fetch_in_line", "_never"}


def events(work):
    kinds = {"Memcpy": "gpu_memcpy"}
    return [
        {
            "ph": "X", "name": name, "ts": float(start), "dur": float(end - start),
            "cat": kinds.get(name.split()[0], "kernel"), "args": {"stream": stream},
        }
        for name, stream, start, end in work
    ]  # fmt: skip


def found(work, copies=COPIES):
    return hidden_copies(read_kernels(events(work)), copies)


def test_time_under_kernels_of_other_streams_is_hidden():
    rows = found(WORK)["copies"]
    assert list(rows) == ["_fetch", "_fetch_in_line", "_store"]
    # 10 to 20 under two kernels that overlap, 25 to 28, and 45 to 50.
    assert rows["_fetch"] == {"us": 30.0, "hidden": 0.6, "launches": 2}
    # One microsecond under `norm`: no copy hides one, nor does what runs on its own stream.
    assert rows["_store"] == {"us": 40.0, "hidden": 0.025, "launches": 1}
    # `late` runs on another stream than this one, and behind it.
    assert rows["_fetch_in_line"] == {"us": 10.0, "hidden": 0.0, "launches": 1}
    assert found(WORK)["hidden_share"] == pytest.approx(19 / 80, abs=1e-4)


def test_all_work_keeps_the_device_busy():
    result = found(WORK)
    assert result["gpu_busy"] == pytest.approx(100 / 120, abs=1e-4)
    assert result["longest_idle_us"] == 10.0


def test_the_order_of_events_does_not_matter():
    assert found(WORK[::-1]) == found(WORK)


@pytest.mark.parametrize(
    ("work", "share"),
    [
        ([("gemm", COMPUTE, 0, 9), ("_fetch", COPY, 2, 5)], 1.0),
        ([("gemm", COMPUTE, 2, 5), ("_fetch", COPY, 0, 6)], 0.5),
        ([("gemm", COMPUTE, 0, 2), ("_fetch", COPY, 2, 5)], 0.0),
        ([("gemm", COPY, 0, 9), ("_fetch", COPY, 2, 5)], 0.0),
        ([("gemm", COMPUTE, 0, 9)], None),
    ],
)
def test_share_of_one_copy(work, share):
    assert found(work)["hidden_share"] == share


def test_many_kernels_equal_a_count_of_ticks():
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 900, (300,), generator=generator).tolist()
    names = ["_fetch", "gemm", "_store", "norm", "_score"]
    work = [
        (names[i % 5], i % 3, start, start + 1 + i % 17) for i, start in enumerate(starts)
    ]  # fmt: skip
    whole = part = 0
    for name, stream, start, end in work:
        if name not in COPIES:
            continue
        whole += end - start
        for tick in range(start, end):
            part += any(
                a <= tick < b for n, s, a, b in work if n not in COPIES and s != stream
            )  # fmt: skip
    assert 0 < part < whole
    assert found(work)["hidden_share"] == round(part / whole, 4)


def test_kernels_of_copies_are_those_of_the_instructions():
    pytest.importorskip("triton")
    from sparda_compile.kernels.gpu import copy, packed, packed_store, prefill, stage

    names, own = copy_kernels(), {"_gather", "_gather_listed", "_store_tail", "_store_prefix"}
    assert names == {*own, *(f"{name}_packed" for name in own), "_copy_pages"}
    modules = (copy, packed, packed_store, prefill, stage)
    for name in names:
        assert any(hasattr(module, name) for module in modules), name


def test_only_a_cuda_device_is_profiled():
    assert can_profile(torch.device("cuda"))
    assert not can_profile(torch.device("cpu"))


def test_a_call_is_profiled_and_read(monkeypatch):
    called = []

    def record(call):
        call()
        return events([("gemm", COMPUTE, 0, 9), ("_gather_listed", COPY, 2, 12)])

    monkeypatch.setattr(hidden, "record_events", record)
    row = profile_copies(lambda: called.append(1))
    assert called == [1]
    assert row["copies"] == {"_gather_listed": {"us": 10.0, "hidden": 0.7, "launches": 1}}
    monkeypatch.setattr(hidden, "record_events", lambda call: [])
    with pytest.raises(BackendUnavailableError, match="CUPTI"):
        profile_copies(lambda: None)


@pytest.mark.gpu
def test_copies_of_a_prompt_on_a_gpu():
    from sparda_compile.bench.lab import Lab
    from sparda_compile.bench.prompt_programs import prompt_of

    programs = Lab("tiny", lambda text: None).prompts
    programs.configure(block_size=16, top_k=4, local_blocks=2, offload="always")
    ids = prompt_of(2000, programs.vocabulary, programs.device)
    programs.generate("sparse_query", ids, 30)
    row = profile_copies(lambda: programs.first_token("sparse_query", ids, 30))
    assert row["copies"]["_store_prefix"]["us"] > 0
    assert 0 <= row["hidden_share"] <= 1
    assert 0 < row["gpu_busy"] <= 1
