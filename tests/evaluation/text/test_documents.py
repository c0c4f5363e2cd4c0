from __future__ import annotations

import hashlib

import pytest
from transformers import PreTrainedTokenizerFast

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.documents import begin_ids, read_documents, token_ids


def test_files_and_folders_are_named_hashed_and_cut_into_tokens(tmp_path, byte_tokenizer):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.md").write_text("second text")
    (folder / "a.txt").write_text("first text")
    (folder / ".hidden").write_text("not a text of this folder")
    (tmp_path / "c.txt").write_text("third text")
    found = read_documents([tmp_path / "c.txt", folder], byte_tokenizer, 1)
    assert [each.name for each in found.each] == ["c.txt", "notes/a.txt", "notes/deep/b.md"]
    last = found.each[-1]
    assert byte_tokenizer.decode(last.ids_T) == "second text"
    assert last.sha256 == hashlib.sha256(b"second text").hexdigest()
    assert found.plain()[-1] == {"name": last.name, "sha256": last.sha256, "tokens": 11}
    assert (found.begin, found.left_out) == ([], {})


def test_of_a_folder_what_cannot_be_read_is_left_out_and_listed(tmp_path, byte_tokenizer):
    (tmp_path / "long.txt").write_text("x" * 50)
    (tmp_path / "short.txt").write_text("x" * 10)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    found = read_documents([tmp_path], byte_tokenizer, 20)
    assert [each.name.rpartition("/")[2] for each in found.each] == ["long.txt"]
    assert {name.rpartition("/")[2] for name in found.left_out} == {"short.txt", "picture.png"}
    assert any("10 tokens, fewer than the 20" in why for why in found.left_out.values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\xff", "it.txt is no text: its byte 0 is not UTF-8"),
        (b"null \x00 byte", "it.txt is no text: it holds null bytes"),
        (b"", "it.txt is empty; name a file with text in it"),
        (b"short", "it.txt has 5 tokens, fewer than the 20 that are read of each text"),
    ],
)
def test_a_file_that_is_named_has_to_be_a_long_text(content, words, tmp_path, byte_tokenizer):
    path = tmp_path / "it.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_documents([path], byte_tokenizer, 20)


def test_what_is_refused_besides(tmp_path, byte_tokenizer):
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        read_documents([tmp_path / "nothing.txt"], byte_tokenizer, 1)
    (tmp_path / "a.txt").write_text("the same")
    (tmp_path / "b.txt").write_text("the same")
    with pytest.raises(ConfigError, match=r"b\.txt and .*a\.txt are the same text"):
        read_documents([tmp_path], byte_tokenizer, 1)
    with pytest.raises(ConfigError, match="none of the 2 files in the folders"):
        read_documents([tmp_path], byte_tokenizer, 100)


def test_two_files_of_one_name_are_told_apart(tmp_path, byte_tokenizer):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    paths = [tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"]
    first, second = read_documents(paths, byte_tokenizer, 1).each
    assert (first.name, second.name) == ("a.txt", f"a.txt {second.sha256[:8]}")


def test_what_a_text_begins_with(byte_tokenizer, tmp_path):
    assert begin_ids(byte_tokenizer) == []
    from tokenizers.processors import TemplateProcessing

    byte_tokenizer.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path, bos_token="a")
    begin = other.bos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A", special_tokens=[("a", begin)]
    )
    assert begin_ids(other) == [begin]
    assert begin not in token_ids(other, "bcd")
    (tmp_path / "it.txt").write_text("bcd")
    found = read_documents([tmp_path / "it.txt"], other, 4)
    assert found.begin == [begin]
    with pytest.raises(ConfigError, match="fewer than the 4"):
        read_documents([tmp_path / "it.txt"], other, 5)
