"""Prompts and turns on several ranks: the benchmarks of one GPU, on each of them at the same time.

    torchrun --nproc-per-node=N -m sparda_compile bench prefill --tp N
    torchrun --nproc-per-node=N -m sparda_compile bench turns --tp N

What to measure next is decided by times and by free memory, and all ranks have to decide the same:
so times are those of the first rank, and memory that of the fullest one. transformers' own programs
run on the same sharded model. The first rank writes the file; of every rank it says what memory it
took. Without GPUs the ranks are gloo's, on CPUs, for the shape `tiny`.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from sparda_compile.bench.lab import Lab
from sparda_compile.bench.memory import FreeMemory
from sparda_compile.bench.prefill import PrefillSetting
from sparda_compile.bench.prompt_floor import Rates
from sparda_compile.bench.prompt_programs import PromptPrograms
from sparda_compile.bench.rank_group import rank_group
from sparda_compile.bench.rank_model import build_sharded_model
from sparda_compile.bench.result_file import ResultFile
from sparda_compile.bench.shapes import SHAPES, ModelShape
from sparda_compile.ranks.agreement import Ranks, ranks_of
from sparda_compile.runtime.host_pool import free_host_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from sparda_compile.bench.turns import TurnSetting

__all__ = ["RankLab", "RankPrograms", "measure_prompts_on_ranks", "shape_of_rank"]

# Of a program's row: what is of one rank.
_OF_A_RANK: Final = ("peak_gpu_bytes", "host_kv_bytes", "gpu_kv_bytes")
# Nobody reads the rates of a CPU: they only have to be there.
_CPU_RATES: Final = Rates(1.0, 1.0)


def shape_of_rank(shape: ModelShape, num_ranks: int) -> ModelShape:
    """Return the sizes of what one rank computes; the hidden state is whole on each."""
    return dataclasses.replace(
        shape,
        ffn=-(-shape.ffn // num_ranks),
        num_heads=-(-shape.num_heads // num_ranks),
        num_groups=-(-shape.num_groups // num_ranks),
        vocabulary=-(-shape.vocabulary // num_ranks),
    )


class RankPrograms(PromptPrograms):
    """The programs of a sharded model on one rank; their times are the first rank's."""

    def generate(self, name: str, ids: Tensor, num_new: int, **more: Any) -> list[float]:
        """Generate with a program, on all ranks; see `PromptPrograms.generate`."""
        times: list[float] = ranks_of(self.model).from_first(
            super().generate(name, ids, num_new, **more)
        )
        return times


class RankLab(Lab):
    """Measures the prompts of one shape, on one of several ranks.

    Args:
        name: A key of `SHAPES`.
        say: Told what is going on.
        device: Of this rank.
        num_ranks: Processes of the process group, which has to be there.
        max_host_bytes: Most CPU memory for KV of all ranks; None is all that the machine has.
    """

    def __init__(
        self,
        name: str,
        say: Callable[[str], None],
        device: torch.device,
        num_ranks: int,
        max_host_bytes: int | None = None,
    ) -> None:
        super().__init__(name, say, str(device), max_host_bytes)
        self.shape = shape_of_rank(SHAPES[name], num_ranks)
        self.num_ranks = num_ranks

    @cached_property
    def model(self) -> nn.Module:
        """This rank's part of the model, bf16."""
        self.say(f"building the {self.name} model on {self.num_ranks} ranks")
        whole = SHAPES[self.name]
        return build_sharded_model(whole, self.device, torch.bfloat16, self.num_ranks)

    @cached_property
    def prompts(self) -> PromptPrograms:
        """The programs that read prompts."""
        return RankPrograms(self.model, self.say)

    @cached_property
    def rates(self) -> Rates:
        """What the first rank's GPU does at best, while all are busy."""
        if self.device.type == "cpu":
            return _CPU_RATES
        dist.barrier()
        rates: Rates = self.ranks.from_first(super().rates)
        return rates

    @property
    def ranks(self) -> Ranks:
        """All ranks."""
        return ranks_of(self.model)

    def room(self) -> FreeMemory:
        """Return what each rank may take now; they share the machine's CPU memory."""
        if self.device.type == "cpu":
            free = FreeMemory(free_host_bytes() // 2, free_host_bytes() // 2)
        else:
            free = super().room()
        least = self.ranks.least
        return FreeMemory(least(free.device), least(free.host) // self.num_ranks)

    def prefill(self, setting: PrefillSetting, file: ResultFile) -> list[dict[str, Any]]:
        """Measure prompts on all ranks; the first one writes the file."""
        setting = dataclasses.replace(setting, settings=self._lowered(setting.settings))
        return super().prefill(setting, _SharedFile(file, self.ranks))

    def turns(self, setting: TurnSetting, file: ResultFile) -> list[dict[str, Any]]:
        """Measure turns on all ranks; the first one writes the file."""
        setting = dataclasses.replace(setting, settings=self._lowered(setting.settings))
        return super().turns(setting, _SharedFile(file, self.ranks))

    def _lowered(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings that compile nothing on a CPU: there it is a check that it runs."""
        return {**settings, "lowering": "eager"} if self.device.type == "cpu" else settings

    def clock(self) -> float:
        """Return the first rank's seconds."""
        seconds: float = self.ranks.from_first(super().clock())
        return seconds


class _SharedFile(ResultFile):
    """A file that all ranks read and the first one writes; each result says of every rank."""

    def __init__(self, file: ResultFile, ranks: Ranks) -> None:
        super().__init__(file.path, file.head, file.key, file.commit)
        self.results = ranks.from_first(file.results)
        self.is_first = ranks.rank == 0
        self.num_ranks = ranks.size

    def save(self, result: dict[str, Any]) -> None:
        """Add a result with what each rank took."""
        mine = {
            name: {key: row[key] for key in _OF_A_RANK if key in row}
            for name, row in result["programs"].items()
        }
        said: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(said, mine)
        super().save({**result, "ranks": said})

    def write(self) -> None:
        """Write the file, on the first rank."""
        if self.is_first:
            super().write()


def measure_prompts_on_ranks(
    shape: str,
    setting: PrefillSetting | TurnSetting,
    num_ranks: int,
    say: Callable[[str], None],
    file: ResultFile,
    max_host_bytes: int | None = None,
) -> None:
    """Measure prompts or turns on this rank; called by every process that torchrun has started.

    Args:
        shape: A key of `SHAPES`.
        setting: What to measure.
        num_ranks: Processes.
        say: Told what is going on.
        file: Gets the results, and is written by the first rank alone.
        max_host_bytes: Most CPU memory for KV of all ranks; None is all that the machine has.

    Raises:
        ConfigError: If torchrun started another number of processes, or there are fewer GPUs.
    """
    with rank_group(shape, num_ranks) as device:
        lab = RankLab(shape, say, device, num_ranks, max_host_bytes)
        if isinstance(setting, PrefillSetting):
            lab.prefill(setting, file)
        else:
            lab.turns(setting, file)
