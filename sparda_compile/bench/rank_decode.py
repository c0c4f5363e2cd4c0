"""Decode on several ranks: `DecodeBench` on each of them, at the same time.

    torchrun --nproc-per-node=N -m sparda_compile bench decode --tp N

Every rank times its own steps, which wait for each other in collectives; the first one's times are
the result, and what each rank moved, held and could copy stands beside them. On a GPU each rank has
one CUDA graph with NCCL inside. Without GPUs the ranks are gloo's, on CPUs, for the shape `tiny`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sparda_compile.bench.decode import DecodeBench, memcpy_gbps
from sparda_compile.bench.memory import free_everything
from sparda_compile.bench.rank_group import rank_group
from sparda_compile.bench.rank_model import build_sharded_model
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.config import MIB
from sparda_compile.program.captures import Captures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparda_compile.bench.decode import DecodeSetting

__all__ = ["RankBench", "measure_on_ranks"]


class RankBench(DecodeBench):
    """The programs of one batch size on one of several ranks."""

    def _rate(self) -> float:
        """Return the rate of copies from CPU memory, with all ranks copying; 1.0 on a CPU."""
        dist.barrier()
        return memcpy_gbps() if self.device.type == "cuda" else 1.0

    def check(self) -> None:
        """Compare what must be equal, on all ranks, and between them."""
        super().check()
        with self._captures.ranks.together("the logits of a step") as facts:
            facts["logits"] = self.run("scheduled")


def measure_on_ranks(
    shape: str,
    settings: Sequence[DecodeSetting],
    num_ranks: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Measure batch sizes on this rank; called by every process that torchrun has started.

    Args:
        shape: A key of `SHAPES`.
        settings: What to measure.
        num_ranks: Processes.
        say: Told what is going on.
        save: Given the first rank's results, on that rank alone.

    Raises:
        ConfigError: If torchrun started another number of processes, or there are fewer GPUs.
    """
    with rank_group(shape, num_ranks) as device:
        say(f"building the {shape} model on {num_ranks} ranks")
        model = build_sharded_model(SHAPES[shape], device, torch.bfloat16, num_ranks)
        captures = Captures(model, {})
        for setting in settings:
            if device.type == "cpu":  # a check that it runs: to compile would take the time
                setting = dataclasses.replace(
                    setting, settings={**setting.settings, "lowering": "eager"}
                )
            for result in _measured(captures, setting, say):
                if captures.ranks.rank == 0:
                    save(result)
            free_everything()


def _measured(captures: Captures, setting: DecodeSetting, say: Callable[[str], None]) -> Any:
    """Yield what is known of a batch size after each overlap, with what each rank says."""
    is_cuda = captures.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(captures.device)
    bench = RankBench(captures, setting, say)
    bench.check()
    for found in bench.measure():
        peak = torch.cuda.max_memory_allocated(captures.device) if is_cuda else 0
        mine = {
            "memcpy_gbps": found["memcpy_gbps"],
            "peak_mib": round(peak / MIB, 1),
            "scheduled_us": {
                o: row["scheduled"]["median"] for o, row in found["by_overlap"].items()
            },
            "h2d_bytes": {
                o: row["scheduled"]["h2d_bytes"] for o, row in found["by_overlap"].items()
            },
        }
        said: list[Any] = [None] * captures.ranks.size
        dist.all_gather_object(said, mine)
        yield {
            "batch_size": setting.batch_size,
            "max_tokens": setting.max_tokens,
            "skipped": {},
            **found,
            "ranks": said,
        }
