"""`sparda bench decode --tp N`: starts itself once a rank, and prints what the first one wrote."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.cli.bench_files import decode_file
from sparda_compile.cli.console import CANNOT, fail, progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.lab import ResultFile

__all__ = ["decode_on_ranks"]

# A program that uses NVLink multicast can take the GPUs of a shared host out of service.
_NO_MULTICAST: Final = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


# JSON goes to stdout alone.
_STDERR: Final = 2


def decode_on_ranks(
    shape: str, settings: Sequence[DecodeSetting], tp: int, out: Path, commit: str | None
) -> ResultFile | None:
    """Measure decode on several ranks.

    Args:
        shape: A key of `SHAPES`.
        settings: What to measure, one for each batch size.
        tp: Ranks.
        out: Folder for the JSON file.
        commit: Of this package, where it is not a git checkout.

    Returns:
        The file; None in a process that torchrun has started.

    Raises:
        ConfigError: If there are not as many GPUs.
    """
    from sparda_compile.bench.rank_decode import measure_on_ranks, rank_device

    rank_device(tp, shape)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _start(shape, settings, tp, out, commit)
        return decode_file(out, shape, settings[0].max_tokens, commit, _format(settings), tp)
    file = decode_file(out, shape, settings[0].max_tokens, commit, _format(settings), tp)
    is_first = os.environ.get("RANK", "0") == "0"
    with progress() if is_first else contextlib.nullcontext(_silent) as say:
        measure_on_ranks(shape, settings, tp, say, file.save)
    return None


def _format(settings: Sequence[DecodeSetting]) -> str:
    return str(settings[0].settings.get("kv_format", "model"))


def _silent(text: str) -> None:
    del text


def _start(
    shape: str, settings: Sequence[DecodeSetting], tp: int, out: Path, commit: str | None
) -> None:
    """Run the same command once for each rank; what they say goes to stderr."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={tp}", "-m", "sparda_compile", "bench", "decode"]
    run = subprocess.run(
        [*command, *_options(shape, settings, tp, out, commit)],
        env={**_NO_MULTICAST, **os.environ},
        stdout=_STDERR,
        check=False,
    )
    if run.returncode:
        fail(f"a rank of --tp {tp} ended with an error; see above.", CANNOT)


def _options(
    shape: str, settings: Sequence[DecodeSetting], tp: int, out: Path, commit: str | None
) -> list[str]:
    first = settings[0]
    options: dict[str, list[Any]] = {
        "--shape": [shape],
        "--tp": [tp],
        "--batch": [setting.batch_size for setting in settings],
        "--tokens": [first.max_tokens],
        "--overlap": [*first.overlaps],
        "--variant": [*first.variants],
        "--rounds": [first.rounds],
        "--steps": [first.steps],
        "--kv-format": [_format(settings)],
        "--out": [out],
        "--commit": [commit] if commit else [],
    }
    return [
        str(part) for name, values in options.items() for each in values for part in (name, each)
    ]
