"""The settings of the KV cache's memory: one group of `SpardaConfig`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, Literal, get_args

from sparda_compile.checks import format_choice, number, one_of, plain_numbers, whole
from sparda_compile.errors import ConfigError
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MOST_TOKENS", "Eviction", "Memory", "Offload", "PageFormat"]

Eviction = Literal["lru", "fifo"]
Offload = Literal["auto", "always", "never"]
PageFormat = Literal["model", "stored", "auto"]

# Lengths are counted in 32 bits.
MOST_TOKENS: Final = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Where the KV cache lives, and how much of it there may be.

    Attributes:
        chunk_tokens: Columns of a prompt that are one turn. None reads it as one, layer by layer,
            with what lies between attentions in slices, or, where the GPU has not the memory that
            this is worked out to take, in the largest turns for which it has. Shorter turns need
            less memory, and read the past again from the cache; the result is the same but for
            rounding.
        max_tokens: Tokens that one sequence may hold. None reserves what each `generate` needs
            (prompt plus `max_new_tokens`, rounded up) and grows when a later turn needs more.
        offload: `always` keeps the KV cache in CPU memory, `never` on the device, `auto` on the
            device while it fits `device_bytes`.
        device_bytes: Device memory that the KV cache may take; None is no limit.
        host_bytes: CPU memory that the KV cache may take; None is what the machine has free.
        page_ratio: Device pages over selected blocks; more pages keep blocks for longer.
        eviction: Whose page a new block takes: `lru` (least recently selected) or `fifo`.
        kv_format: How full blocks are written: `model` keeps the model's dtype, bit for bit; `fp8`,
            `int8` and `int4` round each block once, when it is full, wherever it is. `values8` and
            `values4` store values alone; keys stay on the device, in 4 bits. A dict names those of
            some layers by number, the others keep `model`. `auto` or `auto:PERCENT` lets the cost
            model choose, within an error of 3% or PERCENT. See `docs/kv_formats.md`.
        page_format: What a page on the device holds of a full block in a format that rounds:
            `model` the block in the model's dtype, which the copy unpacks, `stored` what is in CPU
            memory, which attention unpacks. Both give the same bits. With `stored` a page takes the
            format's bytes: for the same memory `page_ratio` can be as many times larger. Formats
            with keys that stay have no such pages. `auto` takes `model`, unless the cost model
            expects `stored` to be faster, or only with them the cache fits `device_bytes`.
    """

    chunk_tokens: int | None = None
    max_tokens: int | None = None
    offload: Offload = "always"
    device_bytes: int | None = None
    host_bytes: int | None = None
    page_ratio: float = 1.5
    eviction: Eviction = "lru"
    kv_format: str | Mapping[int, str] | tuple[tuple[int, str], ...] = "model"
    page_format: PageFormat = "model"

    def __post_init__(self) -> None:
        plain_numbers(self)
        formats = format_choice("kv_format", self.kv_format, KV_FORMATS.choices())
        object.__setattr__(self, "kv_format", formats)
        one_of("page_format", self.page_format, get_args(PageFormat))
        self._check_pages()
        one_of("offload", self.offload, get_args(Offload))
        one_of("eviction", self.eviction, get_args(Eviction))
        number("page_ratio", self.page_ratio)
        if self.page_ratio < 1.0:
            raise ConfigError(
                f"page_ratio={self.page_ratio} is less than 1.0, so the selected blocks would not "
                "fit the device pages; use 1.0 or more (default 1.5)."
            )
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, 1, MOST_TOKENS)
        for name in ("chunk_tokens", "device_bytes", "host_bytes"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1)

    def _check_pages(self) -> None:
        """Refuse pages of stored runs where a run is not the whole block."""
        if self.page_format != "stored":
            return
        chosen = self.kv_format
        named = [chosen] if isinstance(chosen, str) else dict(chosen).values()
        for name in named:
            if name in KV_FORMATS.names() and KV_FORMATS[name].summary is not None:
                whole_blocks = [f.name for f in KV_FORMATS if f.rounds and f.summary is None]
                raise ConfigError(
                    f"page_format='stored' has whole blocks in pages, and kv_format={name!r} "
                    "stores values alone: its keys are made of a selector's codes where a block is "
                    f"copied. Use page_format='model', or one of {', '.join(whole_blocks)}."
                )
