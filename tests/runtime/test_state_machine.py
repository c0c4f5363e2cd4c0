"""The cache's ops in random order against a model made of lists.

The model holds every key and value by row and group, and works the pages out again in plain
Python: who is resident, in which page, stamped when. After each step all of it must agree.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from sparda_compile import SpardaConfig
from sparda_compile.isa.counters import COUNTERS
from sparda_compile.isa.engines import DeferredEngine, ImmediateEngine, use_engine
from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.runtime.append import (
    advance_lengths,
    append_kv,
    extend_kv,
    update_summary,
)
from sparda_compile.runtime.block_table import plan_pages
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.runtime.transfer import (
    fetch_blocks,
    fork_stream,
    offload_blocks,
    prefetch_blocks,
    store_blocks,
    wait_blocks,
)
from sparda_compile.state.layout import CacheLayout, LayerShape

ROWS, GROUPS, DIM, SIZE = 2, 2, 3, 16
POOL, STRIDE = 8, 4
SINK, LOCAL, TOP_K = 1, 1, 2
SELECTED = SINK + LOCAL + 1 + TOP_K
SEEDS = st.integers(0, 1 << 20)


@dataclasses.dataclass
class Pages:
    """The pages of one row and group: what each holds and when it was last stamped."""

    blocks: list[int]
    stamps: list[int]

    def assign(self, ids, stamp, is_lru, written=None):
        """Give every block a page; return the blocks that had none."""
        stay = {*ids, written}
        victims = sorted(
            (page for page, block in enumerate(self.blocks) if block < 0 or block not in stay),
            key=lambda page: (self.stamps[page] >= 0, max(self.stamps[page], stamp - 254), page),
        )
        absent = [block for block in ids if block not in self.blocks]
        victims = sorted(victims[: len(absent)])
        if is_lru:
            for block in ids:
                if block in self.blocks:
                    self.stamps[self.blocks.index(block)] = stamp
        for block, page in zip(absent, victims, strict=False):
            self.blocks[page], self.stamps[page] = block, stamp
        assert set(ids) <= set(self.blocks), "the model itself ran out of pages"
        return absent


class CacheMachine(RuleBasedStateMachine):
    """Decode steps, prefills, resets and growth of one layer's cache."""

    engine_of = staticmethod(lambda seed: ImmediateEngine())

    @initialize(
        seed=SEEDS,
        num_blocks=st.sampled_from([SELECTED, 8, 12, 16]),
        page_ratio=st.sampled_from([1.0, 1.5]),
        eviction=st.sampled_from(["lru", "fifo"]),
        offload=st.sampled_from(["always", "always", "never"]),
    )
    def start(self, seed, num_blocks, page_ratio, eviction, offload):
        self.engine = self.engine_of(seed)
        config = SpardaConfig(
            mode="exact",
            selector="quest",
            block_size=SIZE,
            pool_size=POOL,
            pool_stride=STRIDE,
            sink_blocks=SINK,
            local_blocks=LOCAL,
            top_k=TOP_K,
            page_ratio=page_ratio,
            eviction=eviction,
            offload=offload,
        )
        layer = LayerShape(0, "sparse", GROUPS, DIM, 0, torch.float32)
        self.kv = KVCache(
            CacheLayout(config, (layer,), ROWS, num_blocks * SIZE), torch.device("cpu")
        )
        self.forget()

    def forget(self):
        """Make the model that of an empty cache; what was in memory before is NaN."""
        num_pages = self.kv.layout.num_pages
        self.k = [torch.zeros(GROUPS, 0, DIM) for _ in range(ROWS)]
        self.v = [torch.zeros(GROUPS, 0, DIM) for _ in range(ROWS)]
        self.pages = {
            (row, group): Pages([-1] * num_pages, [-1] * num_pages)
            for row in range(ROWS)
            for group in range(GROUPS)
        }
        self.counts = [0] * len(COUNTERS)
        for name in ("pages", "host"):
            self.tensor(name).fill_(float("nan"))

    def tensor(self, name):
        return self.kv.state[f"sparda_{name}_0"]

    @property
    def tables(self):
        return [self.tensor(n) for n in ("block_table", "page_block", "page_stamp")]

    @property
    def lengths(self):
        return self.kv.state["sparda_lengths"]

    @property
    def is_lru(self):
        return self.kv.layout.config.eviction == "lru"

    def room(self):
        return self.kv.layout.max_tokens - max(k.shape[1] for k in self.k)

    def draw_kv(self, rng, num_tokens):
        # Whole numbers: their means are exact in any order of addition.
        shape = (2, ROWS, GROUPS, num_tokens, DIM)
        return torch.tensor(
            [rng.randrange(-64, 65) for _ in range(torch.Size(shape).numel())]
        ).float().view(shape)  # fmt: skip

    def draw_ids(self, rng, forced):
        """Return ids [B, G, K] and the same as lists; any that exist, and those that must be."""
        ids = torch.full((ROWS, GROUPS, SELECTED), -1, dtype=torch.int32)
        if self.kv.layout.num_blocks < SELECTED:
            ids = ids[..., : self.kv.layout.num_blocks]
        lists = {}
        for row, group in self.pages:
            current = self.k[row].shape[1] // SIZE
            picked = {m for m in range(current + 1) if m < SINK or m >= current - LOCAL}
            picked = picked if forced else set()
            others = [m for m in range(current + 1) if m not in picked]
            rng.shuffle(others)
            picked |= set(others[: rng.randint(0, SELECTED - len(picked))])
            lists[row, group] = sorted(picked)
            ids[row, group, : len(picked)] = torch.tensor(sorted(picked), dtype=torch.int32)
        return ids, lists

    def plan(self, ids, lists, is_hint, stream):
        """Plan, and do the same to the model; return the op's results."""
        counters, eviction = self.tensor("counters"), self.kv.layout.config.eviction
        fork = fork_stream([ids], 0) if stream == COPY else None
        plan = plan_pages(
            ids, self.lengths, *self.tables, counters, SIZE, eviction, is_hint, stream, fork
        )
        for (row, group), pages in self.pages.items():
            length, wanted = self.k[row].shape[1], lists[row, group]
            current = length // SIZE
            absent = pages.assign(wanted, length, self.is_lru, written=current)
            num_fetched = sum(block < current for block in absent)
            if is_hint:
                self.counts[2] += num_fetched
            else:
                self.counts[0] += len(wanted) - num_fetched
                self.counts[1] += num_fetched
                self.counts[3] += num_fetched
        return plan

    def take_in(self, kv, tokens):
        for summary, names in (
            ("pooled_keys", ("pooled_k", "recent_k")),
            ("key_bounds", ("key_bounds",)),
        ):
            tensors = [self.tensor(name) for name in names]
            num_blocks = self.kv.layout.num_blocks
            update_summary(
                kv[0], self.lengths, tokens, tensors, summary, num_blocks, SIZE, POOL, STRIDE
            )

    @precondition(lambda self: self.room() > 0)
    @rule(seed=SEEDS, num_steps=st.integers(4, 24))
    def decode(self, seed, num_steps):
        rng = random.Random(seed)
        for _ in range(min(num_steps, self.room())):
            self.step(rng, rng.choice([None, COMPUTE, COPY]))
            self.tables_agree_with_the_model()

    def step(self, rng, hint_stream):
        """One token per row, as a program of mode `exact` (or, without a hint, `query`) does."""
        hinted = hint_stream is not None
        pools = (self.tensor("host"), self.tensor("pages"))
        with use_engine(self.engine):
            if hinted:
                ids, lists = self.draw_ids(rng, forced=False)
                _, _, blocks, pages, _ = self.plan(ids, lists, True, hint_stream)
                ticket = prefetch_blocks(blocks, pages, *pools, 1)
                wait_blocks(ticket, [pools[1], *self.tables], [blocks, pages], 1)
            ids, lists = self.draw_ids(rng, forced=True)
            page_ids, is_miss, blocks, pages, tail = self.plan(ids, lists, False, COMPUTE)
            kv = self.draw_kv(rng, 1)
            if hinted:
                append_kv(*kv, tail, self.lengths, pools[1])
                ticket = prefetch_blocks(blocks, pages, *pools, 2)
                self.take_in(kv, [])
                wait_blocks(ticket, [pools[1]], [blocks, pages], 2)
            else:
                fetch_blocks(blocks, pages, *pools)
                append_kv(*kv, tail, self.lengths, pools[1])
                self.take_in(kv, [])
            for row in range(ROWS):
                self.k[row] = torch.cat([self.k[row], kv[0, row]], dim=1)
                self.v[row] = torch.cat([self.v[row], kv[1, row]], dim=1)
            self.check_selected(lists, page_ids, is_miss, tail)
            self.store([], tail, [], in_line=not hinted)
            advance_lengths(None, self.lengths)
        self.kv.advance(1, 1)

    def check_selected(self, lists, page_ids, is_miss, tail):
        """Every selected block is where the plan says, token for token."""
        for (row, group), wanted in lists.items():
            assert page_ids[row, group, len(wanted) :].eq(-1).all()
            assert not is_miss[row, group, len(wanted) :].any()
            for block, page in zip(wanted, page_ids[row, group].tolist(), strict=False):
                assert self.pages[row, group].blocks[page] == block
                self.check_block(self.tensor("pages")[row, group, page], row, group, block)
            assert tail[row, group] == page_ids[row, group, len(wanted) - 1]
        if not self.kv.layout.offload:
            assert not is_miss.any()

    def check_block(self, stored, row, group, block):
        tokens = slice(block * SIZE, (block + 1) * SIZE)
        want = torch.stack([self.k[row][group, tokens], self.v[row][group, tokens]])
        assert torch.equal(stored[:, : want.shape[1]], want), (row, group, block)

    def store(self, new_kv, tail, tokens, in_line):
        """Write full blocks to the host; the model counts them once its tokens are in."""
        host, pages, counters = (self.tensor(n) for n in ("host", "pages", "counters"))
        if not self.kv.layout.offload:
            return
        table = self.tensor("block_table") if tokens else None
        args = (new_kv, tail, tokens, self.lengths, table, pages, host, counters)
        if in_line:
            store_blocks(*args)
        else:
            ticket = offload_blocks(*args, 3, fork_stream([pages], 4))
            wait_blocks(ticket, [host], [], 3)
        before = self.lengths.tolist()
        self.counts[4] += GROUPS * sum(
            k.shape[1] // SIZE - n // SIZE for k, n in zip(self.k, before, strict=True)
        )

    @precondition(lambda self: self.room() > 0)
    @rule(seed=SEEDS, num_tokens=st.integers(1, 70), in_line=st.booleans())
    def prefill(self, seed, num_tokens, in_line):
        """Many tokens at once, behind what is there; any of them may be padding."""
        num_tokens = min(num_tokens, self.room())
        rng = random.Random(seed)
        share = rng.choice([0.0, 0.5, 1.0, 1.0])
        mask = torch.tensor([[rng.random() < share for _ in range(num_tokens)] for _ in self.k])
        mask[rng.randrange(ROWS)] = True
        kv = self.draw_kv(rng, num_tokens)
        eviction = self.kv.layout.config.eviction
        tokens = number_tokens(mask, self.lengths)
        with use_engine(self.engine):
            extend_kv(
                *kv,
                None,
                tokens,
                self.lengths,
                self.tensor("pages"),
                *self.tables,
                SINK,
                LOCAL,
                eviction,
            )
            self.take_in(kv, tokens)
            for row in range(ROWS):
                self.keep_resident(row, int(mask[row].sum()))
                self.k[row] = torch.cat([self.k[row], kv[0, row][:, mask[row]]], dim=1)
                self.v[row] = torch.cat([self.v[row], kv[1, row][:, mask[row]]], dim=1)
            self.store(list(kv), None, tokens, in_line)
            advance_lengths(mask, self.lengths)
        self.kv.advance(num_tokens, num_tokens)

    def keep_resident(self, row, num_tokens):
        length = self.k[row].shape[1]
        total = length + num_tokens
        first, last = length // SIZE, (total - 1) // SIZE
        touched = range(first, last + 1)
        if self.kv.layout.num_pages < self.kv.layout.num_blocks:
            touched = [m for m in touched if m < SINK or m >= last - LOCAL or m == first]
        for group in range(GROUPS):
            self.pages[row, group].assign(list(touched), max(total - 1, 0), self.is_lru)

    @precondition(lambda self: self.room() < SIZE)
    @rule()
    def reset(self):
        self.kv.reset()
        self.forget()

    @precondition(lambda self: self.kv.layout.num_blocks < 20)
    @rule(more=st.integers(1, 4))
    def grow(self, more):
        layout = self.kv.layout
        larger = dataclasses.replace(layout, max_tokens=layout.max_tokens + more * SIZE)
        self.kv = self.kv.grow(larger)
        for pages in self.pages.values():
            free = larger.num_pages - len(pages.blocks)
            pages.blocks += [-1] * free
            pages.stamps += [-1] * free

    @invariant()
    def nothing_is_pending(self):
        assert getattr(self.engine, "num_pending", 0) == 0

    @invariant()
    def tables_agree_with_the_model(self):
        table, page_block, page_stamp = self.tables
        assert self.lengths.tolist() == [k.shape[1] for k in self.k]
        assert self.tensor("counters").tolist() == self.counts
        for (row, group), pages in self.pages.items():
            assert page_block[row, group].tolist() == pages.blocks
            assert page_stamp[row, group].tolist() == pages.stamps
            # No block has two pages, and the two tables are each other's inverse.
            used = {block: page for page, block in enumerate(pages.blocks) if block >= 0}
            assert len(used) == sum(block >= 0 for block in pages.blocks)
            assert table[row, group].tolist() == [
                used.get(block, -1) for block in range(table.shape[-1])
            ]
            length = self.k[row].shape[1]
            assert not length % SIZE or length // SIZE in used
            for block, page in used.items():
                self.check_block(self.tensor("pages")[row, group, page], row, group, block)
            for block in range(length // SIZE):
                if self.kv.layout.offload:
                    self.check_block(self.tensor("host")[row, group, block], row, group, block)
                else:
                    assert block in used

    @invariant()
    def summaries_agree_with_the_model(self):
        pooled, bounds = self.tensor("pooled_k"), self.tensor("key_bounds")
        for row, keys in enumerate(self.k):
            for j in range((keys.shape[1] - POOL) // STRIDE + 1):
                window = keys[:, j * STRIDE : j * STRIDE + POOL]
                assert torch.equal(pooled[row, :, j], window.mean(1))
            for m in range(bounds.shape[2]):
                block = keys[:, m * SIZE : (m + 1) * SIZE]
                low = torch.full((GROUPS, DIM), float("inf"))
                high = -low
                if block.shape[1]:
                    low, high = block.amin(1), block.amax(1)
                assert torch.equal(bounds[row, :, m], torch.stack([low, high], dim=1))


class LateCopies(CacheMachine):
    """The same with copies that run as late as they may, or at random before that."""

    engine_of = staticmethod(lambda seed: DeferredEngine(None if seed % 3 == 0 else seed))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [CacheMachine, LateCopies])
def test_cache_against_lists(machine):
    # Most of a case is drawn from seeds, so a smaller one would say no more.
    phases = (Phase.explicit, Phase.generate)
    run_machine(machine, settings=settings(max_examples=14, stateful_step_count=16, phases=phases))
