from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from sparda_compile import environment
from sparda_compile.environment import describe, result_to_go_on, write_result
from sparda_compile.errors import ConfigError


def test_describes_versions_and_commit():
    found = describe("abc123")
    assert found["torch"] == torch.__version__
    assert found["transformers"] == version("transformers")
    assert found["commit"] == "abc123"
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert describe()["commit"] not in ("", None)


def test_package_that_is_not_there():
    assert environment.version_of("no-such-package-at-all") is None


def test_result_is_written_with_its_environment(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_result(path, {"name": "x", "value": 1}, "abc123")
    found = json.loads(path.read_text())
    assert found == {"environment": describe("abc123"), "name": "x", "value": 1}


def test_result_on_a_bad_path_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="it is a folder"):
        write_result(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_result_that_json_cannot_hold_leaves_the_old_one(tmp_path):
    write_result(tmp_path / "x.json", {"value": 1}, "abc123")
    with pytest.raises(TypeError):
        write_result(tmp_path / "x.json", {"value": object()}, "abc123")
    assert json.loads((tmp_path / "x.json").read_text())["value"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_result_to_go_on_is_of_the_same_environment_and_head(tmp_path):
    path, head = tmp_path / "x.json", {"name": "x", "model": "m", "settings": {"a": 1, "b": None}}
    write_result(path, {**head, "rows": []}, "abc123")
    assert result_to_go_on(path, head, ["rows"], "abc123")["rows"] == []
    for changes, commit, words in (
        ({}, "abc124", "commit abc123"),
        ({"model": "n"}, "abc123", "model"),
        ({"settings": {"a": 2, "b": None, "c": 1}}, "abc123", "a 1, c None"),
    ):
        with pytest.raises(ConfigError, match=rf"is not as it is now: {words}\.$"):
            result_to_go_on(path, head | changes, ["rows"], commit)
    for changes, fields in (({"name": "y"}, ["rows"]), ({}, ["records"])):
        with pytest.raises(ConfigError, match="no file of this command"):
            result_to_go_on(path, head | changes, fields, "abc123")
