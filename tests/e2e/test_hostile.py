"""Whatever is passed in: the original's result, or a SpardaError; nothing else, and never silence.

Hypothesis draws configurations, ids, masks, positions and sequences of calls. The oracle is the
model itself, since selection covers everything. A call that the original does not take either has
to be refused with a sentence. SPARDA_MATRIX=all in the environment draws many more.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import SpardaError
from sparda_compile.registry import HINTS
from sparda_compile.testing import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

FACTOR = 40 if os.environ.get("SPARDA_MATRIX") == "all" else 1
FAMILIES = ("llama", "gemma3", "gpt2")
MAX_TOKENS = 128
CONFIG = SpardaConfig(
    mode="query", top_k=None, block_size=16, lowering="eager", max_tokens=MAX_TOKENS
)
LENGTHS = st.sampled_from((1, 2, 15, 16, 17, 40))


@functools.cache
def pair(family: str) -> tuple[Any, Any]:
    """Return a model and what became of it."""
    model = build(family)
    return model, optimize(model, CONFIG)


def seeded(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def outcome(model: Any, **call: Any) -> Any:
    """Return an output, or the error that a call ended in."""
    try:
        with torch.no_grad():
            return model(**call)
    except Exception as error:  # noqa: BLE001 - what it is, is what is tested
        return error


def assert_honest(got: Any, want: Any, real: torch.Tensor | None) -> bool:
    """Fail unless ours equals the original's or is a SpardaError; return whether it ran.

    Args:
        got: Output or error of the optimized module.
        want: Output or error of the original.
        real: [B, T] bool, which tokens count; None for all.
    """
    if isinstance(got, Exception):
        if not isinstance(got, SpardaError):
            raise AssertionError(f"not a sentence: {type(got).__name__}: {got}") from got
        assert len(str(got)) > 20
        return False
    assert not isinstance(want, Exception), f"ran where the original raises {want!r}"
    assert got.logits.shape == want.logits.shape
    ours, theirs = got.logits, want.logits
    if real is not None:
        ours, theirs = ours[real], theirs[real]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    return True


# Values for the fields of a configuration; a few of each are wrong.
JUNK = st.sampled_from(
    (None, "3", "", 2.5, -1, 0, True, math.nan, math.inf, 1 << 62, (), [1], b"a")
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(("dense", "query", "forecast", "exact")),
    "selector": st.sampled_from(("infllm2", "quest", "nosa", "lowbit2", "lowbit4")),
    "prefill_selector": st.sampled_from((None, "infllm2", "quest", "lowbit2")),
    "prefill_candidates": st.sampled_from((None, 1, 1.5, 4.0, 0.5)),
    "hint": st.sampled_from((*HINTS.names(), ("ema", "forecast"), ("previous_step", "next_query"))),
    "forecast_rank": st.sampled_from((1, 4, 1000)),
    "forecast_heads": st.sampled_from((1, 2, 3)),
    "top_k": st.sampled_from((0, 1, 8, 62)),
    "short_list": st.sampled_from((0, 2, 23)),
    "sink_blocks": st.sampled_from((0, 1, 3, 100)),
    "local_blocks": st.sampled_from((0, 1, 8, 32)),
    "block_size": st.sampled_from((16, 32, 48, 64, 128, 24)),
    "pool_size": st.sampled_from((8, 16, 32, 64, 7)),
    "pool_stride": st.sampled_from((4, 8, 16, 5)),
    "max_tokens": st.sampled_from((16, 48, 96, 128, 192, 384, 100)),
    "offload": st.sampled_from(("auto", "always", "never")),
    "device_bytes": st.sampled_from((1, 1 << 12, 1 << 30)),
    "host_bytes": st.sampled_from((1, 1 << 12, 1 << 30)),
    "page_ratio": st.sampled_from((1, 1.0, 1.5, 100.0, 0.5)),
    "eviction": st.sampled_from(("lru", "fifo")),
    "machine": st.sampled_from(("cpu", "h100", "h200", "a100")),
    "expected_overlap": st.sampled_from((0, 0.0, 0.9, 1.0, 1.1)),
    "cuda_graph": st.booleans(),
    "disable_passes": st.sampled_from(((), ("schedule_transfers",), ("no_such_pass",))),
}


@st.composite
def configurations(draw: st.DrawFn, junk: float) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True))
    fields = {name: draw(FIELDS[name]) for name in names}
    if names and draw(st.floats(0, 1)) < junk:
        fields[draw(st.sampled_from(names))] = draw(JUNK)
    return fields


@settings(max_examples=100 * FACTOR)
@given(fields=configurations(junk=0.8))
def test_a_configuration_is_made_or_refused(fields: dict[str, Any]) -> None:
    try:
        config = SpardaConfig(**fields)
    except SpardaError as error:
        assert any(name in str(error) for name in fields), error  # noqa: PT017
        return
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.replace() == config


@settings(max_examples=12 * FACTOR)
@given(fields=configurations(junk=0.0))
def test_a_configuration_that_selects_everything_equals_the_original(
    fields: dict[str, Any],
) -> None:
    model, base = pair("llama")
    ids = seeded((2, 42))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    try:
        config = SpardaConfig(**fields, lowering="eager")
        selected = config.num_selected(1 << 20)
        if selected * config.block_size < ids.shape[1]:
            config = config.replace(top_k=None)
        fast = optimize(base, config)
    except SpardaError:
        return
    ours, theirs = None, None
    for begin, end in ((0, 40), (40, 41), (41, 42)):
        call = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        got = outcome(fast, **call, past_key_values=ours)
        want = outcome(model, **call, past_key_values=theirs)
        if not assert_honest(got, want, mask[:, begin:end].bool()):
            return
        ours, theirs = got.past_key_values, want.past_key_values


def ids_of(kind: str, batch: int, num: int) -> Any:
    ids = seeded((batch, num))
    wrong = {
        "int32": lambda: ids.int(),
        "float": lambda: ids.float(),
        "bool": lambda: ids.bool(),
        "uint8": lambda: ids.to(torch.uint8),
        "one dimension": lambda: ids[0],
        "three dimensions": lambda: ids[None],
        "empty": lambda: ids[:, :0],
        "no batch": lambda: ids[:0],
        "negative": lambda: ids - 300,
        "beyond": lambda: ids + 256,
        "meta": lambda: ids.to("meta"),
        "list": lambda: ids.tolist(),
        "none": lambda: None,
        "strided": lambda: ids.repeat_interleave(2, 1)[:, ::2],
    }
    return wrong[kind]() if kind in wrong else ids


IDS = ("plain",) * 14 + (
    "int32", "float", "bool", "uint8", "one dimension", "three dimensions", "empty", "no batch",
    "negative", "beyond", "meta", "list", "none", "strided",
)  # fmt: skip


def mask_of(kind: str, batch: int, num: int) -> Any:
    mask = torch.ones(batch, num, dtype=torch.int64)
    hidden = torch.arange(num)[None] < (torch.arange(batch) % num)[:, None]
    left = (~hidden).long()
    made = {
        "none": lambda: None,
        "left": lambda: left,
        "right": lambda: left.flip(1),
        "holes": lambda: (torch.arange(num)[None] % 3 != 1).long().expand(batch, num),
        "zero": lambda: mask * 0,
        "one row of zeros": lambda: mask * (torch.arange(batch) > 0).long()[:, None],
        "bool": lambda: ~hidden,
        "float": lambda: left.float(),
        "additive": lambda: torch.where(hidden, -math.inf, 0.0),
        "twos": lambda: left * 2,
        "long": lambda: torch.ones(batch, num + 3, dtype=torch.int64),
        "short": lambda: mask[:, :-1],
        "other batch": lambda: torch.ones(batch + 1, num, dtype=torch.int64),
        "one dimension": lambda: mask[0],
        "four dimensions": lambda: torch.ones(batch, 1, num, num, dtype=torch.bool).tril(),
        "nan": lambda: mask * math.nan,
        "list": lambda: mask.tolist(),
        "meta": lambda: mask.to("meta"),
    }
    return made[kind]() if kind in made else mask


MASKS = ("none",) * 4 + ("left",) * 4 + ("ones",) * 2 + (
    "right", "holes", "zero", "one row of zeros", "bool", "float", "additive", "twos", "long",
    "short", "other batch", "one dimension", "four dimensions", "nan", "list", "meta",
)  # fmt: skip


def positions_of(kind: str, batch: int, num: int) -> Any:
    positions = torch.arange(num).expand(batch, num)
    made = {
        "shifted": lambda: positions + 50,
        "repeated": lambda: positions // 2,
        "zero": lambda: positions * 0,
        "negative": lambda: positions - 3,
        "huge": lambda: positions + (1 << 40),
        "beyond the table": lambda: positions + 5000,
        "one row": lambda: positions[:1],
        "one dimension": lambda: positions[0],
        "wrong length": lambda: torch.arange(num + 1).expand(batch, num + 1),
        "one column": lambda: positions[:, :1],
        "other batch": lambda: positions[:1].expand(batch + 2, num),
        "float": lambda: positions + 0.5,
        "int32": lambda: positions.int(),
        "bool": lambda: positions.bool(),
        "list": lambda: positions.tolist(),
        "meta": lambda: positions.to("meta"),
    }
    return made[kind]() if kind in made else None


POSITIONS = ("none",) * 10 + (
    "shifted", "repeated", "zero", "negative", "huge", "beyond the table", "one row",
    "one dimension", "wrong length", "one column", "other batch", "float", "int32", "bool", "list",
    "meta",
)  # fmt: skip
KEEP = (0,) * 8 + (1, 3, 1000, -2, True, 1.5, "1", None)


def real_tokens(mask: Any, kept: Any, shape: torch.Size) -> torch.Tensor | None:
    """Return which of the logits that both gave are those of real tokens."""
    if mask is None:
        return None
    real = mask.bool()[:, -shape[1] :] if mask.dim() == 2 else None
    del kept
    return real


@settings(max_examples=60 * FACTOR)
@given(
    family=st.sampled_from(FAMILIES),
    batch=st.sampled_from((1, 2, 3)),
    num=LENGTHS,
    ids=st.sampled_from(IDS),
    mask=st.sampled_from(MASKS),
    positions=st.sampled_from(POSITIONS),
    keep=st.sampled_from(KEEP),
)
def test_one_forward(
    family: str, batch: int, num: int, ids: str, mask: str, positions: str, keep: Any
) -> None:
    model, fast = pair(family)
    call = {
        "input_ids": ids_of(ids, batch, num),
        "attention_mask": mask_of(mask, batch, num),
        "position_ids": positions_of(positions, batch, num),
        "logits_to_keep": keep,
    }
    got, want = outcome(fast, **call), outcome(model, **call)
    shown = call["attention_mask"]
    shape = torch.Size((1, 1)) if isinstance(got, Exception) else got.logits.shape
    real = None if isinstance(got, Exception) else real_tokens(shown, keep, shape)
    assert_honest(got, want, real)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("prompt", "token", "token", "turn", "reset", "fresh")),
        st.sampled_from(("full",) * 4 + ("none", "new", "changed")),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=30 * FACTOR)
@given(
    family=st.sampled_from(FAMILIES),
    padding=st.sampled_from(((0,), (0, 3), (5, 0, 9))),
    steps=STEPS,
)
def test_a_conversation(
    family: str, padding: tuple[int, ...], steps: list[tuple[str, str]]
) -> None:
    model, fast = pair(family)
    batch = len(padding)
    ours, theirs, mask = fast.new_cache(), None, None
    for number, (kind, said) in enumerate(steps):
        if kind in ("reset", "fresh"):
            ours.reset() if kind == "reset" else None
            ours, theirs, mask = (ours if kind == "reset" else fast.new_cache()), None, None
            continue
        num = {"prompt": 20, "token": 1, "turn": 7}[kind]
        ids = seeded((batch, num + number))[:, :num]
        new = torch.ones(batch, num, dtype=torch.int64)
        if mask is None and num == 20:
            new = torch.stack([(torch.arange(num) >= n).long() for n in padding])
        mask = new if mask is None else torch.cat([mask, new], dim=1)
        shown = {"full": mask, "none": None, "new": new, "changed": mask.clone()}[said]
        if said == "changed":
            shown[0, 0] = 1 - shown[0, 0]
        if said == "none":
            mask = torch.cat([mask[:, :-num], torch.ones_like(new)], dim=1)
        call = {"input_ids": ids, "attention_mask": shown}
        got = outcome(fast, **call, past_key_values=ours)
        if isinstance(got, SpardaError):
            return
        want = outcome(model, **call, past_key_values=theirs)
        changed_first = said == "changed" and mask.shape[1] == num
        if changed_first:
            mask = shown
        assert_honest(got, want, mask[:, -num:].bool())
        theirs = want.past_key_values
