"""What the ranks of one model have to agree on, and how they tell each other.

A rank that runs another program, or the same one for other tokens, would wait in a collective for
what never comes. So before ranks run something together each says in a few bytes what it is about
to run; where they differ, or one has raised an error, all of them raise.

    with ranks.together("generate") as facts:
        ...                            checks, which may raise on one rank alone
        facts["input_ids"] = ids       what has to be the same on all

What one rank may know and another not, such as measured constants, is taken from the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparda_compile.errors import RankLostError, RanksDisagreeError
from sparda_compile.ranks.collectives import group_named, lost_ranks
from sparda_compile.ranks.replays import check_replays, watch_of
from sparda_compile.ranks.shards import mesh_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ALONE", "Ranks", "ranks_of"]

_LONGEST_SHOWN: Final = 60


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that run one model.

    Attributes:
        size: How many there are.
        rank: Number of this one.
        group: Name of their process group; empty for a single one.
    """

    size: int
    rank: int
    group: str

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.size == 1

    def check_alive(self) -> None:
        """Refuse to go on without a process group, or without one of its ranks.

        Raises:
            RankLostError: If the group was destroyed, or a replayed step of it did not end.
        """
        if not self.is_alone:
            check_replays(self.group)

    def watch_replay(self, device: torch.device) -> None:
        """Watch the step that was just launched on a GPU's current stream, by a CUDA graph."""
        if not self.is_alone:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            watch_of(self.group, device).ran(done.query)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[dict[str, Any]]:
        """Run a block on all ranks, and go on only if it did the same on all of them.

        Args:
            what: Word for what begins here, for the message.

        Yields:
            Where to enter what has to be the same, by name: tensors, texts, numbers.

        Raises:
            RanksDisagreeError: If another rank raised an error in the block, or entered something
                else. What this rank raised goes on as it is.
            RankLostError: If a rank is gone.
        """
        facts: dict[str, Any] = {}
        if self.is_alone:
            yield facts
            return
        failed: Exception | None = None
        try:
            yield facts
        except RankLostError:
            raise
        except Exception as error:  # noqa: BLE001 - it goes on when the others know of it
            failed = error
        mine = _Said(
            f"{type(failed).__name__}: {failed}" if failed is not None else "",
            {name: (_shown(value), _digest(value)) for name, value in facts.items()},
        )
        try:
            said = self._exchange(what, mine)
        except RankLostError:
            if failed is not None:
                raise failed from None
            raise
        if failed is not None:
            raise failed
        _compare(what, said)

    def from_first(self, value: Any) -> Any:
        """Return what the first rank passes; it has to be picklable."""
        if self.is_alone:
            return value
        held = [value]
        group = group_named(self.group)
        with lost_ranks("broadcast"):
            dist.broadcast_object_list(held, group=group, group_src=0)
        return held[0]

    def least(self, number: int) -> int:
        """Return the least number that a rank passes."""
        if self.is_alone:
            return number
        return min(int(each) for each in self._exchange("least", number))

    def share_random_state(self, device: torch.device) -> None:
        """Give all ranks the state of the first one's random numbers, so that all draw the same.

        Args:
            device: Where numbers are drawn: that of the model.
        """
        if self.is_alone:
            return
        is_cuda = device.type == "cuda"
        state = torch.cuda.get_rng_state(device) if is_cuda else torch.get_rng_state()
        state = self.from_first(state)
        torch.cuda.set_rng_state(state, device) if is_cuda else torch.set_rng_state(state)

    def _exchange(self, what: str, mine: Any) -> list[Any]:
        self.check_alive()
        group, said = group_named(self.group), [None] * self.size
        with lost_ranks(what):
            dist.all_gather_object(said, mine, group=group)
        return said


ALONE: Final = Ranks(1, 0, "")
"""A model in one process."""


@dataclasses.dataclass(frozen=True)
class _Said:
    """What a rank says: an error in words, or facts as (how it is shown, digest), by name."""

    error: str
    facts: dict[str, tuple[str, str]]


def ranks_of(model: Any) -> Ranks:
    """Return the processes that a model is sharded over; `ALONE` for what is no model.

    Raises:
        UnsupportedInputError: If it is distributed in another way than by tensor parallelism.
    """
    mesh = mesh_of(model) if isinstance(model, nn.Module) else None
    if mesh is None or mesh.size() == 1:
        return ALONE
    return Ranks(mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name)


def _compare(what: str, said: list[_Said]) -> None:
    for rank, one in enumerate(said):
        if one.error:
            raise RanksDisagreeError(
                f"{what} failed on rank {rank}, so no rank runs it: {one.error}"
            )
    first = said[0].facts
    for rank, one in enumerate(said[1:], start=1):
        for name in {**first, **one.facts}:
            mine, its = (facts.get(name, ("nothing", "")) for facts in (first, one.facts))
            if mine[1] != its[1]:
                raise RanksDisagreeError(
                    f"{what} is not the same on all ranks: {name} of rank {rank} is {its[0]}, and "
                    f"of rank 0 {mine[0]}. Every rank has to pass the same; nothing was run."
                )


def _digest(value: Any) -> str:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()  # host-sync: once for each prompt, to compare it
        head = f"{tuple(data.shape)} {data.dtype} ".encode()
        raw = head + data.view(torch.uint8).numpy().tobytes()
    else:
        raw = repr(value).encode()
    return hashlib.sha256(raw).hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} with digest {_digest(value)[:8]}"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"one with digest {_digest(value)[:8]}"
