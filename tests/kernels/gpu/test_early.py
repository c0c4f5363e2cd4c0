"""Kernels that begin early, and GPUs on which they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparda_compile.kernels.gpu import early

SCRIPT = Path(__file__).with_name("compile_for_older.py")


@pytest.mark.parametrize("arch", [80, 89])
def test_kernels_compile_for_gpus_that_cannot_begin_early(arch):
    """An A100 and an L40S have no instruction for it: their assembler refuses the kernel."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch)], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [
        "_infllm2_blocks", "_infllm2_logits", "_integer_masses", "_low_bit_masses",
        "_low_bit_scores", "_merge", "_partials",
    ]  # fmt: skip


def test_the_interpreter_launches_one_after_the_other(monkeypatch):
    monkeypatch.setattr(early, "interpreting", lambda: True)
    assert early.launch_early() == {}


@pytest.mark.parametrize(("begins", "options"), [(True, {"launch_pdl": True}), (False, {})])
def test_options_are_those_of_the_gpu(monkeypatch, begins, options):
    monkeypatch.setattr(early, "interpreting", lambda: False)
    monkeypatch.setattr(early, "_begins_early", lambda device: begins)
    assert early.launch_early() == options
