from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = '''"""What it is for, in a sentence."""


class Bell:
    """Rings.

    Twice.
    """

    def ring(self):
        return "no docstring"
'''


@pytest.fixture(scope="module")
def subject():
    spec = importlib.util.spec_from_file_location("text_corpus", ROOT / "tools" / "text_corpus.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules["text_corpus"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["text_corpus"]


def paragraphs(seed, count=40):
    """Return text of paragraphs that no other seed has."""
    made = [f"Paragraph {n} of {seed}: " + f"{seed}{n} and so on. " * 8 for n in range(count)]
    return "\n\n".join(made)


def source_of(subject, split):
    """Return the name of a source that is in a split."""
    for number in range(100):
        made = subject.Candidate(f"s{number}", "MIT", "prose", Path(), "x")
        if made.split == split:
            return made.source
    raise AssertionError(split)


def candidate(subject, path, split="train", domain="prose"):
    return subject.Candidate(source_of(subject, split), "MIT", domain, path, path.name)


def test_docstrings_stand_with_what_they_describe(subject):
    found = subject.docstrings(MODULE)
    assert found == "What it is for, in a sentence.\n\nBell\n\nRings.\n\nTwice."


def test_what_is_read_and_what_is_no_text(subject, tmp_path):
    text = paragraphs("a")
    (tmp_path / "a").write_text(text)
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a", "a.gz"):
        assert subject.read(candidate(subject, tmp_path / name)) == text
    (tmp_path / "short").write_text("a")
    (tmp_path / "bytes").write_bytes(b"\xff" * 9000)
    (tmp_path / "null").write_text("\0" * 9000)
    (tmp_path / "bad.gz").write_bytes(text.encode())
    for name in ("short", "bytes", "null", "bad.gz", "missing"):
        assert subject.read(candidate(subject, tmp_path / name)) is None


def test_long_texts_are_cut_at_a_line_and_held_out_ones_are_long(subject, tmp_path):
    path = tmp_path / "long"
    path.write_text("ein Wörtchen\n" * 40_000)
    for split, most in (("train", 256_000), ("held-out", 64_000)):
        text = subject.read(candidate(subject, path, split))
        assert most - 20 < len(text.encode()) <= most
        assert text.endswith("\n")
    path.write_text(paragraphs("a"))
    assert subject.read(candidate(subject, path, "held-out")) is None


def test_a_text_is_new_unless_half_of_it_was_seen(subject):
    seen = subject.Seen()
    first, other = paragraphs("a"), paragraphs("b")
    assert seen.is_new(first)
    assert not seen.is_new(first.replace("\n\n", "\n\n  \n"))
    assert not seen.is_new(first + "\n\n" + paragraphs("c", 10))
    assert seen.is_new(other + "\n\n" + first[:200])


def test_a_corpus_is_written_with_a_manifest_and_is_the_same_again(subject, tmp_path):
    found = []
    for number in range(6):
        path = tmp_path / f"t{number}"
        path.write_text(paragraphs(f"x{number}"))
        found.append(candidate(subject, path))
    path = tmp_path / "apart"
    path.write_text(paragraphs("apart", 400))
    found.append(candidate(subject, path, "held-out"))
    limits = {"train": 10**9, "held-out": 10**9}
    entries = subject.write(tmp_path / "one", found, limits)
    again = subject.write(tmp_path / "two", [*reversed(found)], limits)
    assert entries == again
    assert [entry["split"] for entry in entries] == ["held-out"] + 6 * ["train"]
    for entry in entries:
        content = (tmp_path / "one" / str(entry["path"])).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert (entry["licence"], entry["bytes"]) == ("MIT", len(content))
    counts = subject.summary(entries)
    assert counts["train/prose"]["files"] == 6
    assert counts["train/code"] == {"files": 0, "sources": 0, "bytes": 0}


def test_a_source_gives_a_sixth_and_a_domain_has_an_end(subject, tmp_path):
    found = []
    for number in range(30):
        path = tmp_path / f"t{number}"
        path.write_text(paragraphs(f"y{number}"))
        found.append(candidate(subject, path))
    size = len(found[0].path.read_bytes())
    entries = subject.write(tmp_path / "out", found, {"train": 12 * size, "held-out": 0})
    assert len(entries) == pytest.approx(2, abs=1)


def test_modules_are_code_or_docstrings_and_tests_are_neither(subject, tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("tests/a.py", *(f"m{n}.py" for n in range(30))):
        (tmp_path / name).write_text(MODULE)
    found = [*subject.python_files(tmp_path, "mine", "MIT")]
    assert len(found) == 30
    kinds = {(each.domain, each.kind) for each in found}
    assert kinds == {("code", "text"), ("documentation", "docstrings")}


def test_documents_of_the_system_by_their_names(subject, tmp_path):
    for name in ("doc/p/copyright", "doc/p/NEWS.gz", "doc/p/guide.md", "doc/p/a.png",
                 "common-licenses/GPL-2", "info/grep.info.gz", "perl/5/pod/x.pod"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = {each.name: (each.source, each.domain) for each in subject.system_documents(tmp_path)}
    assert found == {
        "doc/p/copyright": ("p", "prose"),
        "doc/p/NEWS.gz": ("p", "prose"),
        "doc/p/guide.md": ("p", "documentation"),
        "GPL-2": ("licences", "prose"),
        "info/grep.info.gz": ("grep", "documentation"),
        "perl/5/pod/x.pod": ("perl", "documentation"),
    }


def test_a_folder_that_is_there_is_not_written_over(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["text_corpus.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="is there already"):
        subject.main()


def test_the_command_writes_the_manifest(subject, tmp_path, monkeypatch, capsys):
    path = tmp_path / "text"
    path.write_text(paragraphs("z"))
    monkeypatch.setattr(subject, "candidates", lambda own: [candidate(subject, path)])
    monkeypatch.setattr(sys, "argv", ["text_corpus.py", "--out", str(tmp_path / "corpus")])
    subject.main()
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["summary"] == json.loads(capsys.readouterr().out)
    assert len(manifest["files"]) == 1
