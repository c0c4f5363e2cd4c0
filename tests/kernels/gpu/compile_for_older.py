"""Compile the kernels of a decode step that begin early on Hopper, for the GPU that is named: `80`.

Writes the names of what was compiled as one line of JSON. Run as a program of its own, since the
tests' process has Triton's interpreter on.
"""

import json
import sys

import torch
from on_paper import compile_only

names = set()


def note(name, built):
    assert "griddepcontrol" not in built.asm["ptx"]
    names.add(name)


compile_only(note, int(sys.argv[1]))

from sparda_compile.kernels.gpu import attention, low_bit_integers  # noqa: E402
from sparda_compile.kernels.gpu.early import launch_early  # noqa: E402
from sparda_compile.kernels.gpu.score import SCORE_KERNELS  # noqa: E402
from sparda_compile.selectors import SELECTORS, Geometry  # noqa: E402
from sparda_compile.selectors.base import empty_summary  # noqa: E402

GROUPS, HEADS, SIZE, DIM, BLOCKS = 2, 16, 64, 128, 300
lengths = torch.zeros(1, dtype=torch.int32)
key = torch.zeros(1, GROUPS, 1, DIM).bfloat16()
query = torch.zeros(1, HEADS, 1, DIM).bfloat16()
scores = torch.zeros(1, GROUPS, BLOCKS)
assert launch_early() == {}
for name in ("infllm2", "lowbit2"):
    tensors = empty_summary(SELECTORS[name].summary, key, Geometry(BLOCKS, SIZE, 32, 16))
    SCORE_KERNELS[name](query, tensors, lengths, 1.0, Geometry(BLOCKS, SIZE, 32, 16), scores)
low_bit_integers.integer_masses(query, tensors, lengths, 1.0, (scores,) * 3, softmax=True)
pages = torch.zeros(1, GROUPS, 31, 2, SIZE, DIM).bfloat16()
ids = torch.zeros(1, GROUPS, 20, dtype=torch.int32)
parts = attention.partials(query, pages, ids, ids, None, lengths, 1.0, 0.0, SIZE)
attention.merge(*parts, None, torch.bfloat16)
json.dump(sorted(names), sys.stdout)
