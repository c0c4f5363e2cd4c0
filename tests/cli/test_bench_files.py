from __future__ import annotations

import pytest

from sparda_compile.cli.bench_files import budget_file, decode_file, kernels_file


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
