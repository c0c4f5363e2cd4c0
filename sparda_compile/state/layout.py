"""The shape of all KV state: one table that both the passes and the runtime read.

A sparse layer l owns these tensors (B sequences, G KV heads, N blocks, C device pages, P tokens):

    pages        [B, G, C, 2, P, D]   device pages, K then V; [B, G, C, bytes] uint8 as in `host`
                                      with `page_format="stored"` and a `kv_format` that rounds
    tail         [B, G, 2, 2, P, D]   beside such pages alone, in the model's dtype: the block that
                                      is being written, and what a prompt has found in its place
    host         [B, G, N, 2, P, D]   the same blocks in CPU memory; empty without offload, and
                                      [B, G, N, bytes] uint8 in a `kv_format` that rounds
    block_table  [B, G, N] int32      block -> page, -1 if absent
    page_block   [B, G, C] int32      page -> block, -1 if free
    page_stamp   [B, G, C] int32      when the page's block was last selected (or loaded)
    counters     [6] int64            see `isa.counters`
    ...                               the tensors of its selectors' summaries and of its hints

A window layer owns a ring of its last tokens, `ring_k` and `ring_v` [B, G, window, D].
`lengths` [B] int32 is shared: tokens per sequence before the current step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.formats.base import STAYING_KEYS, BlockFormat, format_of
from sparda_compile.isa.counters import COUNTERS
from sparda_compile.selectors import Geometry, summary_named
from sparda_compile.sizes import SAMPLES
from sparda_compile.state.strategy import Strategy, strategy_of

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig

__all__ = ["LENGTHS", "TAIL_PAGES", "CacheLayout", "LayerShape", "TensorSpec", "state_name"]

TAIL_PAGES: Final = 2
"""Of `tail`: the block that is being written, and what a prompt has found in its place."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What the cache must know of one attention site.

    Attributes:
        layer: Index of the decoder layer.
        kind: `sparse` or `window`.
        num_groups: G, KV heads.
        head_dim: D.
        window: Tokens of the sliding window; 0 for sparse layers.
        dtype: Of keys and values.
    """

    layer: int
    kind: str
    num_groups: int
    head_dim: int
    window: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and home of one state tensor; `fill` is its value in an empty cache.

    `is_shared` says that it is one for all sequences, and not a row for each.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool = False
    fill: float = 0
    is_shared: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def state_name(tensor: str, layer: int) -> str:
    """Return the name of a layer's tensor, also the name of its graph input."""
    return f"sparda_{tensor}_{layer}"


LENGTHS: Final = "sparda_lengths"


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Sizes of a KV cache for `batch_size` sequences of up to `max_tokens` tokens.

    `format_reason` and `page_reason` say why its format and pages were chosen, where `auto` was
    given.
    """

    config: SpardaConfig
    layers: tuple[LayerShape, ...]
    batch_size: int
    max_tokens: int
    format_reason: str = ""
    page_reason: str = ""

    @property
    def strategy(self) -> Strategy:
        """What the mode means."""
        return strategy_of(self.config)

    @property
    def geometry(self) -> Geometry:
        """Sizes that selectors depend on."""
        return Geometry.of(self.config, self.num_blocks)

    def __post_init__(self) -> None:
        """Refuse formats of layers that have no blocks.

        Raises:
            ConfigError: If one is named.
        """
        chosen, known = self.config.kv_format, [s.layer for s in self.layers if s.kind == "sparse"]
        for layer, name in ({} if isinstance(chosen, str) else dict(chosen)).items():
            if layer not in known:
                raise ConfigError(
                    f"kv_format names {name!r} for layer {layer}, but those whose KV cache is in "
                    f"blocks are {', '.join(map(str, known))}; name some of these."
                )

    def kv_format(self, layer: int) -> BlockFormat:
        """Return how full blocks of a layer are written."""
        return format_of(self.config, layer)

    def stores(self, layer: int) -> bool:
        """Whether something is done to a block that became full: it is copied, or rounded."""
        return self.offload or self.kv_format(layer).rounds

    def stored_bytes(self, layer: int, head_dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of a full block in CPU memory, which are those that cross the link."""
        return self.kv_format(layer).num_bytes(self.config.block_size, head_dim, dtype)

    def has_stored_pages(self, layer: int) -> bool:
        """Whether a layer's pages hold full blocks as CPU memory does, not as the model does."""
        return self.config.page_format == "stored" and self.kv_format(layer).rounds

    @property
    def num_blocks(self) -> int:
        """N, blocks of one sequence and group."""
        return self.max_tokens // self.config.block_size

    @property
    def num_selected(self) -> int:
        """K, blocks that attention reads."""
        return self.config.num_selected(self.num_blocks)

    @property
    def num_scored(self) -> int:
        """Blocks among them that scores choose; the others are read in every step."""
        return max(self.num_selected - self.config.num_forced, 0)

    def block_bytes(self, layer: LayerShape) -> int:
        """Return the bytes of keys and values of a block in the model's dtype."""
        return 2 * self.config.block_size * layer.head_dim * layer.dtype.itemsize

    def page_bytes(self, layer: LayerShape) -> int:
        """Return the bytes of one page, which are those that attention reads of a full block."""
        if self.has_stored_pages(layer.layer):
            return self.stored_bytes(layer.layer, layer.head_dim, layer.dtype)
        return self.block_bytes(layer)

    def unpacked(self, layer: LayerShape) -> int:
        """Return how many numbers attention unpacks of one page: none of the model's dtype."""
        stored = self.has_stored_pages(layer.layer)
        return 2 * self.config.block_size * layer.head_dim if stored else 0

    def traced(self) -> CacheLayout:
        """Return the layout of a graph: a sample number stands for that of the sequences."""
        offload = "always" if self.offload else "never"
        config = self.config.replace(offload=offload)
        return dataclasses.replace(self, config=config, batch_size=SAMPLES.batch)

    @property
    def num_predicted(self) -> int:
        """W, most blocks that a step predicts."""
        return self.config.num_predicted(self.num_blocks)

    @property
    def offload(self) -> bool:
        """Whether full blocks live in CPU memory.

        Raises:
            ConfigError: If they would have to and the mode wants them on the device.
        """
        if self.stays_on_device:
            return False
        limit = self.config.device_bytes
        if self.strategy.predictor is not None:
            raise ConfigError(
                f"a KV cache of {self.batch_size} x {self.max_tokens} tokens takes "
                f"{self.resident_bytes:,} bytes, and device_bytes={limit:,} would move it to "
                f"CPU memory, where mode={self.config.mode!r} cannot attend before it has "
                "selected; raise device_bytes, pass offload='never' or fewer tokens, or use "
                "mode='exact' with hint='ema'."
            )
        return True

    @functools.cached_property
    def stays_on_device(self) -> bool:
        """Whether full blocks stay on the device, by what the configuration says alone."""
        if not self.strategy.selects or self.config.offload == "never":
            return True
        limit = self.config.device_bytes
        is_small = limit is None or self.resident_bytes <= limit
        return self.config.offload == "auto" and is_small

    @functools.cached_property
    def resident_bytes(self) -> int:
        """Device memory that the cache takes with all blocks there."""
        resident = dataclasses.replace(self, config=self.config.replace(offload="never"))
        return resident.num_bytes(on_host=False)

    @property
    def stages_ahead(self) -> bool:
        """Whether a sparse prompt fetches a layer's past blocks while the layer before computes.

        So it does where the Forecast selects by scores that no new key changes: what tokens read
        of the past is then known before the layer's new keys are. Blocks that new keys do change
        have to be local ones.
        """
        selector = self.strategy.in_prompts.forecast_selector
        if selector is None or not self.strategy.selects_by_forecast or not self.offload:
            return False
        return selector.settles and self.config.local_blocks >= self.geometry.num_open_blocks

    @property
    def num_pages(self) -> int:
        """C, device pages of one sequence and group."""
        if not self.offload:
            return self.num_blocks
        wanted = math.ceil(self.num_selected * self.config.page_ratio)
        return min(self.num_blocks, max(wanted, self.num_selected + 1))

    def fresh_share(self, overlap: float) -> float:
        """Return the share of the scored blocks that a step is expected to find without a page.

        Those that the step before did not choose; of these as many have a page as of all blocks
        that it did not read, which is least where steps choose at random.

        Args:
            overlap: Share of the scored blocks that the step before chose, too.
        """
        others = max(self.num_blocks - self.num_selected, 1)
        return (1.0 - overlap) * (self.num_blocks - self.num_pages) / others

    def overlap_at(self, fresh: float) -> float:
        """Return the overlap whose `fresh_share` is nearest to a share of the scored blocks."""
        largest = self.fresh_share(0.0)
        return min(max(1.0 - fresh / largest, 0.0), 1.0) if largest else 1.0

    def summaries(self, layer: int) -> tuple[str, ...]:
        """Names of a layer's summaries: what scores, and what its format reads keys from."""
        scored, kept = self.scored_summaries(), self.kv_format(layer).summary
        tensors = {name for each in scored for name in summary_named(each).shapes(self.geometry, 1)}
        if kept is None or tensors.issuperset(STAYING_KEYS):
            return scored
        return tuple(sorted((*scored, kept)))

    def scored_summaries(self) -> tuple[str, ...]:
        """Names of the summaries that this configuration scores with."""
        return tuple(sorted({scorer.summary.name for scorer in self.strategy.scorers}))

    def staying_keys(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors that a layer's keys are read back from; none if they are stored."""
        has_blocks = any(s.layer == layer and s.kind == "sparse" for s in self.layers)
        return STAYING_KEYS if has_blocks and self.kv_format(layer).summary is not None else ()

    def summary_tensors(self, summary: str, layer: LayerShape) -> tuple[str, ...]:
        """Names of the tensors of one summary, in order."""
        return tuple(summary_named(summary).shapes(self.geometry, layer.head_dim))

    def tensors(self, layer: LayerShape) -> dict[str, TensorSpec]:
        """Return every state tensor of a layer, by short name."""
        batch = (self.batch_size, layer.num_groups)
        if layer.kind == "window":
            ring = TensorSpec((*batch, layer.window, layer.head_dim), layer.dtype)
            return {"ring_k": ring, "ring_v": ring}
        block = (2, self.config.block_size, layer.head_dim)
        pages, blocks = self.num_pages, self.num_blocks
        stored, dtype = self.kv_format(layer.layer).stored(*block[1:], layer.dtype)
        host_shape = (*batch, blocks, *stored) if self.offload else (0,)
        pools = {"pages": TensorSpec((*batch, pages, *block), layer.dtype)}
        if self.has_stored_pages(layer.layer):
            pools = {
                "pages": TensorSpec((*batch, pages, *stored), dtype),
                "tail": TensorSpec((*batch, TAIL_PAGES, *block), layer.dtype),
            }
        specs = pools | {
            "host": TensorSpec(host_shape, dtype, on_host=True),
            "block_table": TensorSpec((*batch, blocks), torch.int32, fill=-1),
            "page_block": TensorSpec((*batch, pages), torch.int32, fill=-1),
            "page_stamp": TensorSpec((*batch, pages), torch.int32, fill=-1),
            "counters": TensorSpec((len(COUNTERS),), torch.int64, is_shared=True),
        }
        for summary in self.summaries(layer.layer):
            found = summary_named(summary)
            own = {
                name: TensorSpec((*batch, *size), found.dtypes.get(name, layer.dtype))
                for name, size in found.shapes(self.geometry, layer.head_dim).items()
            }
            assert all(specs.get(name, spec) == spec for name, spec in own.items()), summary
            specs |= own
        for keeper in self.strategy.keepers:
            specs |= keeper.state(self, layer)
        return specs

    def all_tensors(self) -> dict[str, TensorSpec]:
        """Return every state tensor of the cache, by graph input name."""
        specs = {LENGTHS: TensorSpec((self.batch_size,), torch.int32)}
        for layer in self.layers:
            specs |= {state_name(n, layer.layer): s for n, s in self.tensors(layer).items()}
        return specs

    def num_bytes(self, *, on_host: bool) -> int:
        """Return the size of the cache in CPU memory, or on the device."""
        return sum(s.num_bytes for s in self.all_tensors().values() if s.on_host == on_host)
