from __future__ import annotations

import threading

import pytest

from sparda_compile.files import replacing


def test_an_old_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with replacing(path) as partial:
            before = path.read_text() if path.exists() else None
            partial.write_text(text)
        assert before in (None, "first")
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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
