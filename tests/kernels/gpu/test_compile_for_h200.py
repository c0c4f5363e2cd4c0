"""Every kernel compiles for an H200 and fits it, which the interpreter cannot say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_for_h200.py")
# Shared memory that one program may have on an H200.
MOST_SHARED = 227 * 1024
# Kernels that read many bytes, and those that write as many.
READ = {
    "_partials", "_score_forecast", "_score_quest", "_infllm2_logits", "_infllm2_blocks",
    "_integer_masses", "_low_bit_masses", "_low_bit_scores",
    "_token_sums", "_token_blocks", "_attend_tokens", "_attend_blocks", "_repair_predicted",
    "_token_masses", "_mass_scores", "_candidate_masses", "_pick_candidates",
    "_merge_partials", "_merge_predicted", "_remove_partial",
    "_block_logs", "_mass_gradient", "_near_keys",
}  # fmt: skip
COPY = {
    "_gather",
    "_gather_listed",
    "_gather_listed_packed",
    "_gather_packed",
    "_copy_pages",
    "_store_tail",
    "_copy_runs",
    "_extend_kv",
    "_extend_tail",
    "_store_prefix",
    "_store_prefix_packed",
    "_store_tail_packed",
}
# Kernels that read packed blocks.
UNPACK = {"_gather_packed", "_gather_listed_packed"}


def test_kernels_compile_and_fit_and_read_16_bytes_at_once(kept_folder):
    # Triton finds what it has compiled by a hash of the kernel, of all that it calls and reads, of
    # its arguments and of Triton itself: what has not changed is not compiled by each run.
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(kept_folder("compiled_for_h200")),
        "TRITON_DISABLE_LINE_INFO": "1",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 65
    assert {name: shared for name, (shared, *_) in found.items() if shared > MOST_SHARED} == {}
    assert {name: found[name][1] for name in READ | COPY} == dict.fromkeys(READ | COPY, 16)
    assert {name: found[name][2] for name in COPY} == dict.fromkeys(COPY, 16)
    # Of keys as of values: half of a block that is read byte by byte is hidden by the other half.
    assert {name: found[name][3] for name in UNPACK} == dict.fromkeys(UNPACK, 0)
