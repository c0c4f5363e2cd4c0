"""The comparison behind `sparda demo`: one tiny model, every mode, what is equal and what moves.

A random Llama reads a text as bytes and goes on writing. Its own tokens, from transformers with
its dense cache, are the truth. Then every mode runs twice: with all blocks selected, where the
tokens must be the same ones, and with a small budget, where they are counted as they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import warnings
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from sparda_compile.api import optimize
from sparda_compile.config import Mode, SpardaConfig, round_up
from sparda_compile.errors import ConfigError
from sparda_compile.program.explain import build_report
from sparda_compile.testing import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.report import Report

__all__ = ["MODES", "Demo", "DemoRow", "demo_text", "run_demo"]

MODES: Final[tuple[str, ...]] = get_args(Mode)

_SETTINGS: Final[dict[str, Any]] = {
    # The CPU gains nothing by it, and shows that its tokens are right.
    "speculate": {"offload": "never", "speculate_where": "always"}
}
_TOP_K: Final = 8
_LOCAL_BLOCKS: Final = 4
_FILES: Final = ("LICENSE", "CONTRIBUTING.md", "README.md", "CHANGELOG.md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One run of the demo. What a KV cache of transformers does not count is None.

    Attributes:
        mode: A mode, or `original` for the model as it was.
        blocks: Blocks that a step selects per sequence and KV head.
        num_blocks: Blocks of the whole cache.
        agreement: Share of the new tokens that are the original's, place by place.
        must_agree: Whether all of them have to be.
        prefill_ms: Milliseconds to the first token.
        token_ms: Median milliseconds of a later token.
        hits: Selected blocks that were resident.
        misses: Selected blocks that were not.
        h2d_bytes: Bytes copied to the device.
        d2h_bytes: Bytes copied to CPU memory.
        device_bytes: Device memory of the KV cache, tables and summaries included.
        full_bytes: What all keys and values take.
    """

    mode: str
    blocks: int
    num_blocks: int
    agreement: float
    must_agree: bool
    prefill_ms: float
    token_ms: float
    hits: int | None = None
    misses: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    device_bytes: int
    full_bytes: int

    @property
    def is_right(self) -> bool:
        """Whether the tokens are what they have to be."""
        return self.agreement == 1.0 or not self.must_agree

    @property
    def hit_rate(self) -> float | None:
        """Share of selected blocks that were resident; None if none are counted."""
        if self.hits is None or self.misses is None:
            return None
        return self.hits / max(self.hits + self.misses, 1)


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        num_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        rows: The original first, then each mode.
        mismatches: What should have been equal and was not, in words.
        num_captures: Times that the model was traced, for all rows together.
        used_fresh_forecast: Whether a row ran with Forecast weights that nobody trained.
        report: What was done to the model in the last row that ran.
    """

    num_tokens: int
    new_tokens: int
    rows: tuple[DemoRow, ...]
    mismatches: tuple[str, ...]
    num_captures: int
    used_fresh_forecast: bool
    report: Report = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "num_tokens": self.num_tokens,
            "new_tokens": self.new_tokens,
            "num_captures": self.num_captures,
            "used_fresh_forecast": self.used_fresh_forecast,
            "mismatches": list(self.mismatches),
            "rows": [dataclasses.asdict(row) | {"hit_rate": row.hit_rate} for row in self.rows],
        }


def run_demo(
    *,
    modes: Sequence[str] = MODES,
    num_tokens: int = 8192,
    new_tokens: int = 24,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Run the original model and every mode on one text.

    Args:
        modes: Modes to run.
        num_tokens: Tokens of the prompt, one for each byte of text.
        new_tokens: Tokens to generate.
        seed: Seed of the model's weights.
        progress: Called with what is being done, before each run.

    Raises:
        ConfigError: If a mode is not known, or there is no such amount of text.
    """
    with _one_thread():
        return _run(modes, num_tokens, new_tokens, seed, progress)


def _run(
    modes: Sequence[str],
    num_tokens: int,
    new_tokens: int,
    seed: int,
    progress: Callable[[str], None],
) -> Demo:
    configs = list(_configs(modes, num_tokens + new_tokens))
    ids = torch.tensor([list(demo_text(num_tokens))])
    progress("original model")
    model = tiny_llama(seed=seed, max_position_embeddings=2 * (num_tokens + new_tokens))
    truth, times = _generate(model, ids, new_tokens)
    outputs: dict[tuple[str, bool], Tensor] = {("original", True): truth}
    fast: OptimizedModule | None = None
    rows: list[DemoRow] = []
    for config in configs:
        budget = "all blocks" if config.top_k is None else "a small budget"
        progress(f"mode {config.mode}, {budget}")
        fast = _optimize(fast or model, config)
        tokens, spent = _generate(fast, ids, new_tokens)
        outputs[config.mode, config.top_k is None] = tokens
        rows.append(_row(fast, config, _agreement(tokens, truth), spent))
    assert fast is not None
    full_bytes, num_blocks = rows[0].full_bytes, rows[0].num_blocks
    original = DemoRow(
        mode="original",
        blocks=num_blocks,
        num_blocks=num_blocks,
        agreement=1.0,
        must_agree=True,
        prefill_ms=times[0],
        token_ms=times[1],
        device_bytes=full_bytes,
        full_bytes=full_bytes,
    )
    return Demo(
        num_tokens=num_tokens,
        new_tokens=new_tokens,
        rows=(original, *rows),
        mismatches=tuple(_mismatches(rows, outputs)),
        num_captures=fast.sparda.num_captures,
        used_fresh_forecast=any(config.needs_forecast for config in configs),
        report=build_report(
            model, fast.programs.latest_plan("prefill"), fast.programs.latest_plan("decode")
        ),
    )


def demo_text(num_bytes: int) -> bytes:
    """Return so many bytes of text: the repository's own, then the package's source.

    Raises:
        ConfigError: If there is not so much.
    """
    root = Path(__file__).resolve().parents[2]
    names = _FILES if (root / "pyproject.toml").is_file() else ()
    text = b"".join((root / name).read_bytes() for name in names if (root / name).is_file())
    if len(text) < num_bytes:
        text += b"".join(_sources(resources.files("sparda_compile")))
    if len(text) < num_bytes:
        raise ConfigError(
            f"tokens={num_bytes} is more than the {len(text)} bytes of text that the demo has; "
            f"use {len(text)} or less."
        )
    return text[:num_bytes]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: for tensors as small as these, more threads only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sources(folder: Any) -> Iterator[bytes]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.name.endswith(".py"):
            yield entry.read_bytes()


def _configs(modes: Sequence[str], num_tokens: int) -> Iterator[SpardaConfig]:
    base = SpardaConfig(local_blocks=_LOCAL_BLOCKS, lowering="eager")
    capacity = round_up(num_tokens, base.block_size)
    top_k = min(_TOP_K, capacity // base.block_size)
    for mode in modes:
        config = base.replace(mode=mode, max_tokens=capacity, top_k=None, **_SETTINGS.get(mode, {}))
        yield config
        if config.mode != "dense":
            yield config.replace(top_k=top_k)


def _optimize(model: Any, config: SpardaConfig) -> OptimizedModule:
    with warnings.catch_warnings():
        # The demo says so itself, once.
        warnings.filterwarnings("ignore", message="Forecast weights are not trained")
        return optimize(model, config)


class _Clock:
    """A streamer that notes when each token came; the prompt is the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: Any, ids: Tensor, new_tokens: int) -> tuple[Tensor, tuple[float, float]]:
    """Return the new tokens, milliseconds to the first, and the median of the others."""
    clock = _Clock()
    out = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=clock
    )
    spans = [1e3 * (b - a) for a, b in zip(clock.times, clock.times[1:], strict=False)]
    tokens: Tensor = out[0, ids.shape[1] :]
    return tokens, (spans[0], statistics.median(spans[1:] or [0.0]))


def _agreement(tokens: Tensor, truth: Tensor) -> float:
    return float((tokens == truth).float().mean())


def _row(
    fast: OptimizedModule, config: SpardaConfig, agreement: float, times: tuple[float, float]
) -> DemoRow:
    layout = fast.programs.latest_plan("decode").layout
    dense = dataclasses.replace(layout, config=config.replace(mode="dense"))
    total = fast.sparda.stats().total
    return DemoRow(
        mode=config.mode,
        blocks=layout.num_selected,
        num_blocks=layout.num_blocks,
        agreement=agreement,
        must_agree=layout.num_selected == layout.num_blocks,
        prefill_ms=times[0],
        token_ms=times[1],
        hits=total.hits,
        misses=total.misses,
        h2d_bytes=total.h2d_bytes,
        d2h_bytes=total.d2h_bytes,
        device_bytes=layout.num_bytes(on_host=False),
        full_bytes=sum(dense.tensors(layer)["pages"].num_bytes for layer in dense.layers),
    )


def _mismatches(rows: list[DemoRow], outputs: dict[tuple[str, bool], Tensor]) -> Iterator[str]:
    for row in rows:
        if not row.is_right:
            yield (
                f"mode {row.mode} reads all blocks, but only {100 * row.agreement:.0f}% of its "
                "tokens are the original's"
            )
    query, exact = outputs.get(("query", False)), outputs.get(("exact", False))
    if query is not None and exact is not None and not torch.equal(query, exact):
        yield "mode exact does not give the tokens of mode query at the same budget"
