"""What the ranks of a sharded model have to pass alike, for each call.

A prompt is compared before it is read, by digests: shapes, tokens, masks and settings. A step of
one token is not: that would wait for the device. Sampling draws the same on all ranks, since logits
are the same bits and the random state is the first rank's.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from sparda_compile.module.cache import SpardaCache
    from sparda_compile.ranks.agreement import Ranks

__all__ = [
    "Turn",
    "at_prompt",
    "check_same_text",
    "check_whole",
    "facts_of_call",
    "facts_of_generation",
]

_PLAIN: Final = (int, float, str, bool, type(None))


class Turn:
    """Lets one thread at a time run a sharded model: collectives of two would come in any order.

    Args:
        ranks: That run the model.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take the turn for a block; several threads of a model in one process all have it.

        Raises:
            UnsupportedInputError: If another thread has it.
        """
        if self._ranks.is_alone:
            yield
            return
        if not self._lock.acquire(blocking=False):
            raise UnsupportedInputError(
                f"another thread runs the model, which {self._ranks.size} ranks share: what they "
                "do together has to come in one order on all of them. Call it from one thread."
            )
        try:
            yield
        finally:
            self._lock.release()


def check_whole(ranks: Ranks, what: str) -> None:
    """Refuse what reads or writes the heads of one rank alone.

    Raises:
        UnsupportedInputError: If several ranks share the model.
    """
    if not ranks.is_alone:
        raise UnsupportedInputError(
            f"{what} is not supported for a model that {ranks.size} ranks share: each has the keys "
            "and values of its own heads. Keep the cache in memory, or pass the whole text again."
        )


def at_prompt(
    ranks: Ranks, cache: SpardaCache, ids: Tensor
) -> AbstractContextManager[dict[str, Any]]:
    """Compare what ranks pass, where a call reads a prompt or begins a cache; see `together`.

    Args:
        ranks: That run the model.
        cache: What the call reads into.
        ids: [B, T] int64.
    """
    if ids.shape[1] == 1 and cache.kv is not None:
        return contextlib.nullcontext({})
    return ranks.together("a call of forward")


def facts_of_call(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, kept: int | Tensor
) -> dict[str, Any]:
    """Return what has to be the same in a call of `forward`; see `OptimizedModule.forward`."""
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "logits_to_keep": kept,
    }
    return {name: value for name, value in given.items() if value is not None}


def facts_of_generation(
    ranks: Ranks, ids: Tensor | None, kwargs: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what has to be the same in a call of `generate`.

    Args:
        ranks: That run the model.
        ids: [B, T] int64 prompt.
        kwargs: Arguments of the call.
        settings: What holds for it.

    Raises:
        UnsupportedInputError: If a rank would stop by its own clock.
    """
    if not ranks.is_alone and settings.get("max_time") is not None:
        raise UnsupportedInputError(
            f"max_time={settings['max_time']} is not supported for a model that {ranks.size} ranks "
            "run: each would stop by its own clock. Use max_new_tokens or a stopping criterion "
            "that says the same on every rank."
        )
    facts: dict[str, Any] = {"do_sample": settings.get("do_sample") is True, "input_ids": ids}
    facts |= {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    facts |= {n: v for n, v in settings.items() if isinstance(v, _PLAIN) and not n.startswith("_")}
    return facts | {"do_sample": facts["do_sample"]}


def check_same_text(ranks: Ranks, output: Any) -> None:
    """Refuse texts that are not the same on all ranks, as after a criterion of one rank alone.

    A function as `custom_generate` may return something else, which is not compared.

    Raises:
        RanksDisagreeError: If they are not.
    """
    with ranks.together("the end of generate") as facts:
        text = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        facts["tokens"] = text
