"""Paths are refused before the work, and files are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.files import check_writable, replacing


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def names(folder):
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "is no path"),
        (None, "is no path"),
        (3, "is no path"),
        (b"bytes", "is no path"),
        (".", "it is a folder"),
        ("file/below", "is a file, not a folder"),
        ("file/far/below", "is a file, not a folder"),
        ("n" * 300, "too long"),
        ("n" * 300 + "/x", "too long"),
        ("loop", "symbolic links"),
        ("a\0b", "null byte"),
        ("\ud800", "encode"),
        ("/proc/file", "cannot be written"),
    ],
)
def test_bad_path_is_refused_in_a_sentence(folder, monkeypatch, path, why):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=why):
        check_writable(path)
    with pytest.raises(ConfigError, match=r"(cannot be written|is no path).*[.]$"), replacing(path):
        raise AssertionError("the work has begun")
    assert names(folder) == ["file", "loop"]


def test_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_writable(tmp_path / "new" / "file")


def test_check_makes_nothing_and_returns_the_path(folder):
    assert check_writable(str(folder / "a" / "b")) == folder / "a" / "b"
    assert check_writable(folder / "file") == folder / "file"
    assert names(folder) == ["file", "loop"]


@pytest.mark.parametrize("name", ["file", "new", "a/b/new"])
def test_file_takes_its_place_at_the_end(folder, name):
    path = folder / name
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("name", ["file", "new"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_error_leaves_what_was_there(folder, name, error):
    def write():
        with replacing(folder / name) as partial:
            partial.write_text("half")
            raise error

    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write()
    assert (folder / "file").read_text() == "old"
    assert names(folder) == ["file", "loop"]


def test_link_stays_a_link(folder):
    (folder / "link").symlink_to("file")
    with replacing(folder / "link") as partial:
        partial.write_text("new")
    assert (folder / "link").is_symlink()
    assert (folder / "file").read_text() == "new"


def test_what_is_no_regular_file_is_written_in_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with replacing(tmp_path / "pipe") as partial:
        assert partial == tmp_path / "pipe"
    with replacing(Path("/dev/null")) as partial:
        partial.write_text("x")
    assert Path("/dev/null").is_char_device()


def test_no_two_writers_share_a_path(tmp_path):
    path = tmp_path / "file"
    partials = []
    barrier = threading.Barrier(8)

    def write(number):
        with replacing(path) as partial:
            partials.append(partial)
            barrier.wait()
            partial.write_text(str(number) * 1000)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(partials)) == 8
    assert len(set(path.read_text())) == 1
    assert list(tmp_path.iterdir()) == [path]
