from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sparda_compile.cli.main import app
from sparda_compile.cli.outputs import check_folder, check_outputs, check_plot, write_file
from sparda_compile.errors import BackendUnavailableError, ConfigError

# The user whom Unix has for what owns nothing.
NOBODY = 65534


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    old = tmp_path / "old.html"
    old.write_text("old")
    check_outputs(html=old, trace=tmp_path / "new" / "deep" / "trace.json", plot=None)
    check_folder(tmp_path / "other")
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("folder", "is a folder"),
        ("file/page.html", "is a file, not a folder"),
        ("file/deep/page.html", "is a file, not a folder"),
        ("x" * 300, "name too long"),
        ("/proc/page.html", "cannot be written"),
        ("/dev/null/page.html", "is a file, not a folder"),
    ],
)
def test_what_cannot_be_written(tmp_path, path, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=rf"^--html .*{words}"):
        check_outputs(html=tmp_path / path)


@pytest.fixture
def guarded():
    """A folder of a user whom file modes stop: the one who runs this, or nobody where that is root.

    It is not `tmp_path`, which lies where nobody else may look.
    """
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        if user == 0:
            os.chown(name, NOBODY, -1)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            Path(name).chmod(0o700)
            os.seteuid(user)


def test_what_may_not_be_written(guarded):
    file = guarded / "file"
    file.write_text("")
    file.chmod(0o400)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_outputs(html=file)
    guarded.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_folder(guarded)


def test_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    check_plot(None)
    check_plot(tmp_path / "a.png")
    for name in ("a", "a.docx"):
        with pytest.raises(ConfigError, match=r"use one of .*\.png.*\.svg"):
            check_plot(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_plot(tmp_path / "file" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"sparda-compile\[plot\]"):
        check_plot(tmp_path / "a.png")


def test_files_are_written_with_their_folder(tmp_path):
    def write(path):
        path.write_text("x")
        return path

    path = tmp_path / "new" / "file"
    assert write_file(write, path) == path
    assert write_file(write, None) is None
    with pytest.raises(ConfigError, match="cannot be written"):
        write_file(write, path / "page.html")


TEXT = ["--text", __file__, "--length", "5000"]
DOCUMENT = ["--document", __file__]
OUTPUTS = {
    "inspect --html": ["inspect", "tiny-llama", "--html"],
    "inspect --trace": ["inspect", "tiny-llama", "--trace"],
    "demo --html": ["demo", "--html"],
    "eval tasks --json-file": ["eval", "tasks", "--json-file"],
    "eval tasks --plot": ["eval", "tasks", "--plot"],
    "eval text --json-file": ["eval", "text", "smollm2", *DOCUMENT, "--json-file"],
    "eval text --plot": ["eval", "text", "smollm2", *DOCUMENT, "--plot"],
    "eval formats --json-file": ["eval", "formats", "smollm2", *DOCUMENT, "--json-file"],
    "eval trace --out": ["eval", "trace", "smollm2", *DOCUMENT, "--out"],
    "train --out": ["train", "tiny-llama", *TEXT, "--out"],
    "bench decode --out": ["bench", "decode", "--out"],
    "bench decode --plot": ["bench", "decode", "--plot"],
    "bench budget --out": ["bench", "budget", "--out"],
    "bench kernels --out": ["bench", "kernels", "--out"],
    "bench all --out": ["bench", "all", "--out"],
    "bench profile --out": ["bench", "profile", "--out"],
    "bench prefill --out": ["bench", "prefill", "--out"],
    "bench prefill --plot": ["bench", "prefill", "--plot"],
    "bench turns --out": ["bench", "turns", "--out"],
    "bench prr --out": ["bench", "prr", "--out"],
    "bench tradeoff --plot": [
        "bench",
        "tradeoff",
        "--decode",
        __file__,
        "--text",
        __file__,
        "--plot",
    ],
    "bench start --out": ["bench", "start", "--device", "cpu", "--out"],
}


@pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS)
def test_every_command_checks_its_outputs_before_the_work_begins(arguments, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("the work has begun")

    for name in (
        "api.explain", "demo.needles.run_shipped_model", "evaluation.run.evaluate",
        "training.run.train_forecast", "cli.evaluate._load", "bench.start.measure_start",
        "cli.labs.require_gpu",
    ):  # fmt: skip
        monkeypatch.setattr(f"sparda_compile.{name}", work)
    (tmp_path / "file").write_text("")
    name = "a.png" if arguments[-1] == "--plot" else "a"
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "file" / name)])
    assert result.exit_code == 2, result.output
    assert "is a file, not a folder" in " ".join(result.stderr.split())
    assert f"{arguments[-1]} " in result.stderr


def test_every_option_that_names_an_output_is_in_that_list():
    def outputs(command, words):
        for name, child in getattr(command, "commands", {}).items():
            yield from outputs(child, [*words, name])
        for param in command.params:
            if re.search(r"[Ff]older for|to write", param.help or ""):
                yield " ".join([*words, param.opts[0]])

    assert set(outputs(get_command(app), [])) == set(OUTPUTS)
