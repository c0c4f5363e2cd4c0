"""The one configuration object: frozen, keyword-only, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final, Literal, TypeVar, get_args

from sparda_compile.checks import flag, names, number, one_of, plain_numbers, whole
from sparda_compile.errors import ConfigError
from sparda_compile.memory import MOST_TOKENS, Memory, Offload, PageFormat
from sparda_compile.registry import HINTS, PREDICTORS, forecast_rule
from sparda_compile.selection import Mode, Prediction, Prefill, Selection

__all__ = [
    "MACHINE_NAMES",
    "MIB",
    "MOST_TOKENS",
    "Blocks",
    "Execution",
    "Lowering",
    "Memory",
    "Mode",
    "Offload",
    "PageFormat",
    "Prediction",
    "Prefill",
    "Selection",
    "SpardaConfig",
    "round_up",
]

Lowering = Literal["inductor", "eager"]

G = TypeVar("G")
MACHINE_NAMES: Final = ("cpu", "h100", "h200")
MIB: Final = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a sequence is cut into blocks, and its keys into pooled windows.

    Attributes:
        block_size: Tokens of one KV block: a multiple of 16 from 16 to 128 (docs/quality.md).
        pool_size: Tokens averaged into one pooled key.
        pool_stride: Tokens between the starts of neighbouring pooled keys.
    """

    block_size: int = 64
    pool_size: int = 32
    pool_stride: int = 16

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("block_size", "pool_size", "pool_stride"):
            whole(name, getattr(self, name), 1)
        if self.block_size % 16 or not 16 <= self.block_size <= 128:
            raise ConfigError(
                f"block_size={self.block_size} is not allowed; a page holds one block, so it must "
                "be a multiple of 16 from 16 to 128. Use 64, the paper's value."
            )
        if self.block_size % self.pool_stride or self.pool_size % self.pool_stride:
            raise ConfigError(
                f"pool_stride={self.pool_stride} must divide block_size={self.block_size} and "
                f"pool_size={self.pool_size}; use 16, the paper's value."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a program is made, scheduled and run.

    Attributes:
        lowering: `inductor` compiles the rewritten graph, `eager` runs it as it stands.
        cuda_graph: On a GPU, replay each decode step, and short prompts of a shape that comes
            again. False launches every kernel from Python: slower, and easier to look into.
        machine: Whose constants the scheduler plans with: `cpu`, `h100`, `h200`, or None for
            the machine that the model is on.
        expected_overlap: Share of the blocks chosen by score that the step before chose too: the
            scheduler's estimate of a step's bytes, as a small real model reads text by default.
        expected_recall: Share of the other blocks that each hint names: the scheduler's estimate of
            what is left to repair. None takes what was measured of each hint.
        disable_passes: Names of passes to leave out.
        dump_dir: Folder to write the graph after each pass to.
        progress: Whether long first calls show a line on a terminal, and one every ten seconds
            where standard error is no terminal.
    """

    lowering: Lowering = "inductor"
    cuda_graph: bool = True
    machine: str | None = None
    expected_overlap: float = 0.75
    expected_recall: float | None = None
    disable_passes: tuple[str, ...] = ()
    dump_dir: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        one_of("lowering", self.lowering, get_args(Lowering))
        flag("cuda_graph", self.cuda_graph)
        flag("progress", self.progress)
        names("disable_passes", self.disable_passes)
        if self.dump_dir is not None and (not isinstance(self.dump_dir, str) or not self.dump_dir):
            raise ConfigError(f"dump_dir={self.dump_dir!r} is no folder's path; use one, or None.")
        if self.machine is not None:
            one_of("machine", self.machine, MACHINE_NAMES)
        shares = {"expected_overlap": self.expected_overlap}
        if self.expected_recall is not None:
            shares["expected_recall"] = self.expected_recall
        for name, value in shares.items():
            number(name, value)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}={value} is not a share; use 0.0 to 1.0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpardaConfig(Selection, Prediction, Blocks, Memory, Execution):
    """What `optimize` should build. Every default is SparDA's published constant.

    Its fields are those of five groups, each said and checked where its class is: `Selection`,
    `Prediction`, `Blocks`, `Memory` and `Execution`. All are given by keyword,

        SpardaConfig(mode="query", block_size=64, offload="never")

    or by the group, which `config.memory` and the like give back:

        SpardaConfig.of(Memory(offload="never"), mode="query")

    Raises:
        ConfigError: If a value is outside what is allowed.
    """

    def __post_init__(self) -> None:
        Selection.__post_init__(self)
        Prediction.__post_init__(self)
        Blocks.__post_init__(self)
        Memory.__post_init__(self)
        Execution.__post_init__(self)
        self._check_shared()
        self._check_speculation()
        self._check_capacity()

    @classmethod
    def of(
        cls, *groups: Selection | Prediction | Blocks | Memory | Execution, **changes: Any
    ) -> SpardaConfig:
        """Return a configuration made of groups.

        Args:
            *groups: At most one of each kind; what is not given has its defaults.
            **changes: Single fields; they win.

        Raises:
            ConfigError: If two groups are of one kind, or one is none, or a value is not allowed.
        """
        given: dict[str, Any] = {}
        for group in groups:
            if not isinstance(group, (Selection, Prediction, Blocks, Memory, Execution)):
                raise ConfigError(
                    f"{group!r} is no group of settings; give Selection, Prediction, Blocks, "
                    "Memory or Execution, and single fields by name."
                )
            mine = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
            if mine.keys() & given.keys():
                raise ConfigError(
                    f"two groups of the kind {type(group).__name__} were given; give one of each."
                )
            given |= mine
        return cls(**(given | changes))

    @property
    def selection(self) -> Selection:
        """Which blocks attention reads."""
        return self._group(Selection)

    @property
    def prediction(self) -> Prediction:
        """How hint `ema` predicts."""
        return self._group(Prediction)

    @property
    def blocks(self) -> Blocks:
        """How a sequence is cut."""
        return self._group(Blocks)

    @property
    def memory(self) -> Memory:
        """Where the KV cache lives."""
        return self._group(Memory)

    @property
    def execution(self) -> Execution:
        """How a program is made and run."""
        return self._group(Execution)

    def _group(self, kind: type[G]) -> G:
        names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names})

    def _check_shared(self) -> None:
        if self.block_size % self.shared_tokens:
            raise ConfigError(
                f"shared_tokens={self.shared_tokens} does not divide block_size={self.block_size}; "
                "tokens that read the same blocks lie in one block. Use a power of two, or 1."
            )

    def _check_speculation(self) -> None:
        if self.mode == "speculate" and self.offload == "always":
            raise ConfigError(
                "mode='speculate' attends to blocks before they are selected, so all of them have "
                "to be on the device, and offload='always' keeps them in CPU memory; pass "
                "offload='never', or use mode='exact' with hint='ema'."
            )

    def _check_capacity(self) -> None:
        if self.max_tokens is None:
            return
        whole("max_tokens", self.max_tokens, self.block_size)
        if self.max_tokens % self.block_size:
            raise ConfigError(
                f"max_tokens={self.max_tokens} is not a whole number of pages of "
                f"block_size={self.block_size} tokens; use "
                f"{round_up(self.max_tokens, self.block_size)}."
            )
        num_blocks = self.max_tokens // self.block_size
        if self.top_k is not None and self.top_k > num_blocks:
            raise ConfigError(
                f"top_k={self.top_k} is more than the {num_blocks} blocks of a cache of "
                f"max_tokens={self.max_tokens}; lower top_k to at most {num_blocks}, "
                "which are all of them, or raise max_tokens."
            )

    @property
    def num_forced(self) -> int:
        """Blocks that are read whatever their score: sink, local and current ones."""
        return self.sink_blocks + self.local_blocks + 1

    def num_selected(self, num_blocks: int) -> int:
        """Blocks that attention reads out of `num_blocks`: sink + local + current + top-k."""
        if self.mode == "dense" or self.top_k is None:
            return num_blocks
        return min(num_blocks, self.num_forced + self.top_k)

    def num_candidates(self, num_blocks: int) -> int:
        """Blocks that a token of a sparse prompt scores out of `num_blocks`; 0 where that is all.

        Those that are always read are among them.
        """
        if self.prefill_candidates is None or self.mode == "dense" or self.top_k is None:
            return 0
        return min(num_blocks, self.num_forced + self.num_proposed)

    @property
    def num_proposed(self) -> int:
        """Blocks that a look at all proposes to a token of a sparse prompt; 0 without one."""
        return math.ceil((self.prefill_candidates or 0.0) * (self.top_k or 0))

    def num_predicted(self, num_blocks: int) -> int:
        """Most blocks that mode `speculate` predicts for a step, out of `num_blocks`."""
        return min(num_blocks, self.prediction_budget(num_blocks))

    def prediction_budget(self, num_blocks: int) -> int:
        """Sink, local and current blocks, and the budget's multiple of those chosen by score."""
        scored = num_blocks if self.top_k is None else self.top_k
        return self.num_forced + math.ceil(self.speculation_budget * scored)

    @property
    def selection_starts_at(self) -> int | None:
        """Tokens of a sequence from which on a decode step leaves blocks out; None for never."""
        if self.mode == "dense" or self.top_k is None:
            return None
        return (self.num_forced + self.top_k) * self.block_size + 1

    @property
    def needs_forecast(self) -> bool:
        """Whether this configuration uses Forecast weights."""
        return self.mode == "forecast" or any(HINTS[name].needs_forecast for name in self.hints)

    @property
    def hints(self) -> tuple[str, ...]:
        """Names of the hints that are used: none but in mode `exact`."""
        if self.mode != "exact":
            return ()
        return (self.hint,) if isinstance(self.hint, str) else self.hint

    @property
    def predictor(self) -> str | None:
        """Name of what predicts the blocks of a step; None but in mode `speculate`."""
        if self.mode != "speculate":
            return None
        return self.hint if isinstance(self.hint, str) and self.hint in PREDICTORS else "ema"

    @property
    def heads_of_forecast(self) -> int:
        """F, heads of a Forecast for each KV head; 1 where nothing says another number."""
        return self.forecast_heads or 1

    @property
    def forecast_selector(self) -> str:
        """Name of the selector that scores a Forecast."""
        return forecast_rule(self.selector, self.heads_of_forecast)

    @classmethod
    def from_model(cls, model_config: Any, **changes: Any) -> SpardaConfig:
        """Return a configuration with the block sizes that a model was trained with.

        Args:
            model_config: A model's `config` with a `sparse_config` as MiniCPM4.1 has it:
                `kernel_size`, `kernel_stride`, `init_blocks`, `block_size`, `window_size` in
                tokens, and `topk`, local blocks not included. Missing ones keep their defaults.
                The short list of NOSA has no name there.
            **changes: Further fields; they win. A NOSA model needs `selector="nosa"`.

        Raises:
            ConfigError: If there is no `sparse_config`, or a value in it is not allowed.
        """
        return cls(**(_sparse_fields(model_config) | changes))

    def replace(self, **changes: Any) -> SpardaConfig:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


# Name in a checkpoint's sparse_config -> field.
_SPARSE_NAMES: Final = {
    "kernel_size": "pool_size",
    "kernel_stride": "pool_stride",
    "init_blocks": "sink_blocks",
    "block_size": "block_size",
    "window_size": "local_blocks",
    "topk": "top_k",
}


def _sparse_fields(model_config: Any) -> dict[str, Any]:
    sparse = getattr(model_config, "sparse_config", None)
    if not isinstance(sparse, dict) or not sparse:
        raise ConfigError(
            f"{type(model_config).__name__} has no sparse_config, so the model says nothing about "
            "blocks; use SpardaConfig(...)."
        )
    for name in _SPARSE_NAMES:
        value = sparse.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f"sparse_config[{name!r}]={value!r} is not a whole number of 0 or more; correct "
                "the model's config, or use SpardaConfig(...)."
            )
    fields: dict[str, Any] = {
        field: sparse[name] for name, field in _SPARSE_NAMES.items() if name in sparse
    }
    if "window_size" in sparse:
        block_size = sparse.get("block_size", SpardaConfig.block_size)
        if not block_size or sparse["window_size"] % block_size:
            raise ConfigError(
                f"sparse_config['window_size']={sparse['window_size']} tokens is no whole number "
                f"of blocks of block_size={block_size}; pass local_blocks to SpardaConfig(...)."
            )
        fields["local_blocks"] = sparse["window_size"] // block_size
    return fields


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
