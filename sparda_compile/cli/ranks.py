"""`--tp N`: a benchmark starts itself once a rank, and prints what the first one wrote."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sparda_compile.cli.again import words_of
from sparda_compile.cli.bench_files import decode_file
from sparda_compile.cli.console import CANNOT, fail, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sparda_compile.bench.decode import DecodeSetting
    from sparda_compile.bench.prefill import PrefillSetting
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.turns import TurnSetting

    Place = tuple[Path, str | None]

__all__ = ["NumRanks", "decode_on_ranks", "prompts_on_ranks"]

_MOST_RANKS: Final = 64
NumRanks = Annotated[
    int,
    typer.Option(
        min=1, max=_MOST_RANKS, help="Ranks to shard the model over, a process and GPU each."
    ),
]

# A program that uses NVLink multicast can take the GPUs of a shared host out of service.
_NO_MULTICAST: Final = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
# What the ranks do not do: the process that starts them prints and draws.
_LAST: Final = ("as_json", "plot")

# JSON goes to stdout alone.
_STDERR: Final = 2


def decode_on_ranks(
    context: typer.Context, shape: str, settings: Sequence[DecodeSetting], place: Place, tp: int
) -> ResultFile | None:
    """Measure decode on several ranks.

    Args:
        context: Of the command.
        shape: A key of `SHAPES`.
        settings: What to measure, one for each batch size.
        place: Folder for the JSON file, and the commit of this package, where it is not a git
            checkout.
        tp: Ranks.

    Returns:
        The file; None in a process that torchrun has started.

    Raises:
        ConfigError: If there are not as many GPUs.
    """
    from sparda_compile.bench.rank_decode import measure_on_ranks

    out, commit = place

    def file() -> ResultFile:
        tokens = settings[0].max_tokens
        return decode_file(out, shape, tokens, commit, settings[0].settings, tp)

    def measure(say: Callable[[str], None], into: ResultFile) -> None:
        measure_on_ranks(shape, settings, tp, say, into.save)

    return _on_ranks(context, shape, tp, file, measure)


def prompts_on_ranks(
    context: typer.Context,
    shape: str,
    setting: PrefillSetting | TurnSetting,
    tp: int,
    file: Callable[[], ResultFile],
    max_host_gib: float | None,
) -> ResultFile | None:
    """Measure prompts or turns on several ranks.

    Args:
        context: Of the command.
        shape: A key of `SHAPES`.
        setting: What to measure.
        tp: Ranks.
        file: Returns the JSON file as it is now.
        max_host_gib: Most CPU memory for KV of all ranks, GiB; None is what is free.

    Returns:
        The file; None in a process that torchrun has started.

    Raises:
        ConfigError: If there are not as many GPUs.
    """
    from sparda_compile.bench.memory import GIB
    from sparda_compile.bench.rank_prompts import measure_prompts_on_ranks

    limit = None if max_host_gib is None else round(max_host_gib * GIB)

    def measure(say: Callable[[str], None], into: ResultFile) -> None:
        measure_prompts_on_ranks(shape, setting, tp, say, into, limit)

    return _on_ranks(context, shape, tp, file, measure)


def _on_ranks(
    context: typer.Context,
    shape: str,
    tp: int,
    file: Callable[[], ResultFile],
    measure: Callable[[Callable[[str], None], ResultFile], None],
) -> ResultFile | None:
    """Be a rank, if torchrun has started this process; else start all of them."""
    from sparda_compile.bench.rank_group import rank_device

    rank_device(tp, shape)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _start(context, tp)
        return file()
    is_first = os.environ.get("RANK", "0") == "0"
    with progress() if is_first else contextlib.nullcontext(_silent) as say:
        measure(say, file())
    return None


def _silent(text: str) -> None:
    del text


def _start(context: typer.Context, tp: int) -> None:
    """Run the same command once for each rank; what they say goes to stderr."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={tp}", "-m", "sparda_compile", "bench"]
    run = subprocess.run(
        [*command, str(context.info_name), *words_of(context, _LAST)],
        env={**_NO_MULTICAST, **os.environ},
        stdout=_STDERR,
        check=False,
    )
    if run.returncode:
        fail(f"a rank of --tp {tp} ended with an error; see above.", CANNOT)
