"""What `sparda bench start` does with its processes; most here run a few lines of Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from sparda_compile.bench import start
from sparda_compile.bench.start import Run, add_found, beyond, measure_start, plan_runs, totals
from sparda_compile.bench.start_child import TOKENS, Job

JOB = Job("", "tiny", 1, "cpu", "query", "eager", ("1x20",))


def use(first, rest=0.1, **more):
    token_s = dict(zip(TOKENS, (first, rest, rest, rest), strict=True))
    return {"token_s": token_s, "total_s": first + 3 * rest, "stage_s": {}, **more}


SCENARIO = {
    "scenario": "1x20",
    "first_use": use(2.0, 0.25, stage_s={"compile": 1.5}),
    "repeat": use(0.5),
}


@pytest.fixture
def children(monkeypatch):
    """Programs that take the place of the processes: by program, what they run."""
    programs = {}

    def command(job, found):
        return [sys.executable, "-c", programs[job.program], str(found)]

    monkeypatch.setattr(start, "_command", command)
    monkeypatch.setattr(start, "_LOOK_S", 0.01)
    return programs


def measure(*names, timeout=60.0):
    runs = [Run(*name.split()) for name in names]
    saved, said = [], []
    rows = measure_start(JOB, runs, timeout, lambda row: saved.append(dict(row)), said.append)
    return rows, saved, said


def tells(*found, then=""):
    lines = "".join(json.dumps(each) + "\n" for each in found)
    return f"import sys, os, time; open(sys.argv[1], 'a').write({lines!r}); {then}"


def test_runs():
    assert list(map(str, plan_runs("cuda", with_baselines=True))) == [
        "sparda cold", "sparda warm", "dynamic cold", "static cold", "static warm",
    ]  # fmt: skip
    assert list(map(str, plan_runs("cpu", with_baselines=True))) == [
        "sparda cold", "sparda warm", "dynamic cold", "static cold",
    ]  # fmt: skip
    assert list(map(str, plan_runs("cuda", with_baselines=False))) == ["sparda cold", "sparda warm"]


def test_beyond_is_the_first_use_less_the_repeat():
    assert beyond(SCENARIO["first_use"], SCENARIO["repeat"]) == {
        "first": 1.5, "second": 0.15, "third": 0.15, "fourth": 0.15, "total": 1.95,
    }  # fmt: skip


def test_row_and_its_totals():
    row = {"scenarios": []}
    stages = {"capture": 3.0, "verify": 0.5}
    for found in (
        {"import_s": {"python": 0.25}},
        {"import_s": {"torch": 2.0, "transformers": 1.0}},
        {"model_s": 100.0},
        {"optimize": {"total_s": 4.0, "stage_s": stages}},
        SCENARIO,
        {"scenario": "2x20", "skipped": "out of memory"},
        {**SCENARIO, "repeat": use(0.25, stage_s={"compile": 0.125})},
    ):
        add_found(row, found)
    assert row["import_s"] == {"python": 0.25, "torch": 2.0, "transformers": 1.0}
    assert row["model_s"] == 100.0
    assert [s.get("beyond_s", {}).get("total") for s in row["scenarios"]] == [1.95, None, 2.2]
    assert totals(row) == {
        "import": 3.25, "optimize": 4.0, "capture": 3.0, "passes": 0.0, "verify": 0.5,
        "compile": 3.125, "allocate": 0.0, "beyond": pytest.approx(4.15),
    }  # fmt: skip
    assert set(totals({"scenarios": []}).values()) == {0}


def test_row_is_saved_whenever_there_is_more(children):
    children["dynamic"] = tells({"model_s": 2.0}, SCENARIO)
    rows, saved, said = measure("dynamic cold")
    assert rows == saved[-1:]
    assert (rows[0]["run"], rows[0]["model_s"]) == ("dynamic cold", 2.0)
    assert rows[0]["scenarios"][0]["beyond_s"]["total"] == 1.95
    assert [row.get("unfinished") for row in saved] == ["more is still to be measured"] * 2 + [None]
    assert said == ["dynamic cold", "dynamic cold: 1x20 is done"]


def test_half_a_line_is_left_for_later(tmp_path):
    path, heard = tmp_path / "found", []
    with path.open("w") as out, path.open() as lines:
        for text, number in (('{"a": 1}\n{"a"', 1), (": 2}", 1), ("\n", 2)):
            out.write(text)
            out.flush()
            start._hear_all(lines, heard.append)
            assert [found["a"] for found in heard] == [1, 2][:number]


def test_warm_gets_the_folders_of_cold_and_others_their_own(children):
    code = tells(
        then="names = ('TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR'); import json; "
        "found = {n: [os.environ[n], os.path.exists(os.environ[n])] for n in names}; "
        "[os.makedirs(os.environ[n], exist_ok=True) for n in names]; "
        "open(sys.argv[1], 'a').write(json.dumps({'optimize': found}) + '\\n')"
    )
    children |= {"sparda": code, "dynamic": code}
    rows, *_ = measure("sparda cold", "sparda warm", "dynamic cold")
    cold, warm, other = (row["optimize"] for row in rows)
    for name in start._CACHES:
        assert cold[name][0] == warm[name][0] != other[name][0]
        assert [found[name][1] for found in (cold, warm, other)] == [False, True, False]
        assert not os.path.exists(cold[name][0])


def test_failed_process_is_reported_and_others_go_on(children):
    children["sparda"] = tells(SCENARIO, then="print('a' * 9); sys.exit('no room')")
    children["dynamic"] = tells(SCENARIO)
    rows, saved, _ = measure("sparda cold", "sparda warm", "dynamic cold")
    cold, warm, dynamic = rows
    assert cold["failed"].splitlines() == ["ended with code 1", "aaaaaaaaa", "no room"]
    assert len(cold["scenarios"]) == 1
    assert warm["failed"] == "left out: sparda cold, which was to fill its cache, failed"
    assert "failed" not in dynamic
    assert saved[-1] == dynamic


def test_last_lines_alone_are_kept(children):
    children["dynamic"] = "for i in range(99): print(i)\nraise SystemExit(3)"
    (row,), *_ = measure("dynamic cold")
    assert row["failed"].splitlines() == ["ended with code 3", *map(str, range(87, 99))]


def test_process_that_takes_too_long_is_stopped_with_its_children(children, tmp_path):
    pid = tmp_path / "pid"
    children["static"] = tells(
        SCENARIO,
        then="import subprocess; p = subprocess.Popen(['sleep', '600']); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(600)",
    )
    begin = time.monotonic()
    (row,), *_ = measure("static cold", timeout=2.0)
    assert time.monotonic() - begin < 60
    assert row["failed"] == "stopped after 2 s"
    assert row["scenarios"]
    assert "eagerly" in row["note"]
    end = time.monotonic() + 20
    while is_running(pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid):
    """Return whether there is such a process that has not ended."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, check=False)
    return shown.stdout.strip()[:1] not in (b"", b"Z")


def test_static_cache_is_said_to_be_compiled_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(start, "_run", lambda *args: None)
    for device, is_noted in (("cpu", True), ("cuda", False)):
        job = Job("", "tiny", 1, device, "query", "eager", ())
        rows = measure_start(job, plan_runs(device, with_baselines=True), 1, print, print)
        assert [row["run"] for row in rows if "note" in row] == ["static cold"] * is_noted
        assert [row["program"] for row in rows].count("static") == (1 if is_noted else 2)
