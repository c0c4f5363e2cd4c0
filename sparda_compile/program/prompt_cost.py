"""What the tokens of a prompt should read, where `SpardaConfig.prefill` leaves it open.

    dense     T * (past + T / 2) * H * 4 * D FLOP, by the fastest attention, and the past over the
              link where it is in CPU memory
    sparse    T * H * K * P * 4 * D FLOP, and the products of what neighbours read and a token does
              not; scores of all windows, or of all tokens by low-bit keys: half the FLOP of dense;
              a pick among all blocks. With candidates, one query for each KV head scores all tokens
              by low-bit keys, and every head those of the candidates: two picks

All layers of a model are alike here, or near enough: the sums are over the layers that select.
Rates are shares of the machine's rate of matrix products, as measured on one H200 in autumn 2026.
In `benchmarks/results/`, `prompt-attention-variants` has that of the kernel of sparse prompts,
`prompt-pick` the time of a pick, `prompt-profile` scores, and `prompt-low-bit` scores of every
token; those of candidates have about its rate (`prompt-candidates`). How many blocks a token
changes is assumed, as for `prompt-attention-variants`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.graph.site import sites_of
from sparda_compile.kernels.selection_bytes import CANDIDATE_TOKENS
from sparda_compile.kernels.workspace import TILE_ROWS
from sparda_compile.state.strategy import strategy_of

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig
    from sparda_compile.graph.site import AttentionSite
    from sparda_compile.passes.machine import Machine
    from sparda_compile.program.captures import Captures

__all__ = ["PromptCost", "prompt_cost", "prompt_phase"]

# Worked out: with it, and the shares below, differences between prompts of 128K tokens that are
# read densely and in four sparse ways (`prefill-low-bit`, four layers) come out within 12 ms a
# layer. In 32 layers (`prefill-lengths`) a Forecast's is 210 ms, not 170: both slow down.
_DENSE_SHARE: Final = 0.79
# The kernel of sparse prompts, which reads all blocks of a dense one behind a past.
_KERNEL_SHARE: Final = 0.55
# A softmax over windows is beside its products, a Forecast has none, and few of them.
_QUERY_SCORES_SHARE: Final = 0.29
_FORECAST_SCORES_SHARE: Final = 0.11
# Products with every token by low-bit keys: of several heads for each KV head, and of one.
_TOKEN_SCORES_SHARE: Final = 0.47
_ONE_HEAD_TOKEN_SCORES_SHARE: Final = 0.34
# FLOP that matrix units would do while one block is looked at by a pick, 6.9 ps on an H200.
_PICK_FLOP: Final = 5.5e3
# The share of its scored blocks that a token changes.
_NEW_SHARE: Final = 0.1


@dataclasses.dataclass(frozen=True)
class PromptCost:
    """Microseconds that attention takes for new tokens of a prompt, all layers.

    Attributes:
        dense_us: Every token reads all before it.
        sparse_us: Each reads its own blocks, which it selects.
    """

    dense_us: float
    sparse_us: float


def prompt_phase(
    captures: Captures, config: SpardaConfig, batch_size: int, num_past: int, num_tokens: int
) -> str:
    """Return the phase in which new tokens are read.

    Args:
        captures: The model's traced forwards.
        config: What to build.
        batch_size: Sequences.
        num_past: Tokens of the longest sequence before them.
        num_tokens: T, new ones.

    Returns:
        `prefill`, or `sparse_prefill` where a token may leave blocks out and the configuration
        says so, or leaves it open and it is faster.

    Raises:
        UnsupportedInputError: If it says so, on a GPU, of a selector that selects for no prompt.
    """
    begins = config.selection_starts_at
    if config.prefill == "dense" or begins is None or num_past + num_tokens < begins:
        return "prefill"  # where each token reads all blocks, both are the same
    selects_prompts = strategy_of(config).selects_prompts
    if config.prefill == "auto":
        if not _machine(captures, config).overlaps or not selects_prompts:
            return "prefill"  # on a CPU both are references, and nothing is won
        cost = prompt_cost(captures, config, batch_size, num_past, num_tokens)
        if cost.dense_us <= cost.sparse_us:
            return "prefill"
    elif not selects_prompts and captures.get("decode").device.type != "cpu":
        named = "selector" if config.prefill_selector is None else "prefill_selector"
        raise UnsupportedInputError(
            f"prefill='sparse' with {named}={getattr(config, named)!r} runs on a CPU alone: no "
            "kernel selects by it for the tokens of a prompt. Use prefill_selector='infllm2', "
            "which selects for them by pooled keys, or prefill='auto' or 'dense', which then read "
            "all of a prompt."
        )
    return "sparse_prefill"


def prompt_cost(
    captures: Captures, config: SpardaConfig, batch_size: int, num_past: int, num_tokens: int
) -> PromptCost:
    """Return what new tokens are expected to take; arguments as for `prompt_phase`."""
    machine = _machine(captures, config)
    graph = captures.sites("decode", config).graph_module.graph
    sites = [site for site in sites_of(graph) if not site.window]
    costs = [_site_cost(site, config, machine, num_past, num_tokens) for site in sites]
    return PromptCost(
        batch_size * sum(cost.dense_us for cost in costs),
        batch_size * sum(cost.sparse_us for cost in costs),
    )


def _machine(captures: Captures, config: SpardaConfig) -> Machine:
    return captures.machine(config)


def _site_cost(
    site: AttentionSite, config: SpardaConfig, machine: Machine, num_past: int, num_tokens: int
) -> PromptCost:
    """Return the cost of one layer and one sequence."""
    flop_us = machine.tflops * 1e6
    width, seen = site.head_dim, num_past + num_tokens / 2
    pair_flop = 4.0 * width * site.num_heads  # of one token that looks at one other
    dense = num_tokens * seen * pair_flop
    if num_past:
        dense_us = dense / (_KERNEL_SHARE * flop_us)
        past_bytes = 2 * num_past * site.num_groups * width * 2
        if config.offload != "never":
            dense_us = max(dense_us, past_bytes / (machine.link_gbps * 1e3))
    else:
        dense_us = dense / (_DENSE_SHARE * flop_us)
    scored = config.top_k or 0
    selected = config.num_forced + scored
    readers = max(TILE_ROWS * site.num_groups // (site.num_heads * config.shared_tokens), 1)
    union = selected + scored * (readers - 1) * _NEW_SHARE
    attend = num_tokens * min(union * config.block_size, seen) * pair_flop / _KERNEL_SHARE
    score = _score_flop(site, config, seen) * num_tokens
    looked_at = seen / config.block_size + _num_candidates(config, seen)
    pick = _PICK_FLOP * site.num_groups * num_tokens * looked_at
    select = (score + pick) / config.shared_tokens
    return PromptCost(dense_us, (attend + select) / flop_us)


def _score_flop(site: AttentionSite, config: SpardaConfig, seen: float) -> float:
    """Return the FLOP that matrix units would do while one token scores what it has seen."""
    rule = strategy_of(config).in_prompts.chooser
    by_forecast, of_group = config.mode == "forecast", config.heads_of_forecast
    heads = site.num_groups * of_group if by_forecast else site.num_heads
    if rule is not None and rule.scores_tokens:
        one = heads == site.num_groups
        if _num_candidates(config, seen):
            return _candidate_flop(site, config, seen, heads)
        share = _ONE_HEAD_TOKEN_SCORES_SHARE if one else _TOKEN_SCORES_SHARE
        return 2.0 * heads * site.head_dim * seen / share
    windows = seen / config.pool_stride
    if by_forecast and of_group == 1:
        return 2.0 * heads * site.head_dim * windows / _FORECAST_SCORES_SHARE
    return 4.0 * heads * site.head_dim * windows / _QUERY_SCORES_SHARE


def _num_candidates(config: SpardaConfig, seen: float) -> int:
    """Return the blocks that a token scores of all that it has seen; 0 where it scores all."""
    num_blocks = int(seen / config.block_size)
    num_candidates = config.num_candidates(num_blocks)
    return num_candidates if num_candidates < num_blocks else 0


def _candidate_flop(site: AttentionSite, config: SpardaConfig, seen: float, heads: int) -> float:
    """Return the same of a look at all by one query for each KV head, and scores of candidates."""
    look = 2.0 * site.num_groups * site.head_dim * seen / _ONE_HEAD_TOKEN_SCORES_SHARE
    named = config.num_forced + config.num_proposed * (1 + (CANDIDATE_TOKENS - 1) * _NEW_SHARE)
    scored = min(named * config.block_size, seen)
    return look + 2.0 * heads * site.head_dim * scored / _TOKEN_SCORES_SHARE
