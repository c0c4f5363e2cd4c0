"""Many threads on one module, and on two: each call answers as it does alone; memory is flat."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from sparda_compile import SpardaConfig, optimize
from sparda_compile.module.programs import MOST_PROGRAMS
from sparda_compile.program.program import Program
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.testing import tiny_llama

NUM_THREADS, CALLS_PER_THREAD = 8, 12
TIMEOUT_S = 300
CONFIG = SpardaConfig(
    mode="query", top_k=1, local_blocks=1, block_size=16, lowering="eager", page_ratio=1.0
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of a module: prompts of several lengths, answers, and perhaps a second turn."""

    lengths: tuple[int, ...]
    num_new: int
    second_turn: int
    seed: int

    @torch.no_grad()
    def run(self, fast: Any) -> list[Tensor]:
        """Return the tokens of each turn, or the logits of one forward."""
        generator = torch.Generator().manual_seed(self.seed)
        width = max(self.lengths)
        ids = torch.randint(0, 256, (len(self.lengths), width), generator=generator)
        mask = torch.stack([(torch.arange(width) >= width - n).long() for n in self.lengths])
        if not self.num_new:
            return [fast(ids, attention_mask=mask, logits_to_keep=1).logits]
        given = {"max_new_tokens": self.num_new, "do_sample": False, "pad_token_id": 0}
        out = fast.generate(ids, attention_mask=mask, return_dict_in_generate=True, **given)
        found = [out.sequences]
        if self.second_turn:
            more = torch.randint(0, 256, (len(ids), self.second_turn), generator=generator)
            whole = torch.cat([out.sequences, more], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(ids), whole.shape[1] - width)], dim=1)
            cache = out.past_key_values
            again = fast.generate(whole, attention_mask=mask, past_key_values=cache, **given)
            found.append(again)
        return found


def calls() -> list[Call]:
    rng = random.Random(1)
    found = []
    for seed in range(CALLS_PER_THREAD):
        lengths = tuple(rng.randint(1, 90) for _ in range(rng.randint(1, 3)))
        found.append(Call(lengths, rng.randint(0, 3), rng.choice((0, 1, 7)), seed))
    return found


CALLS = calls()


def together(modules: list[Any]) -> list[list[list[Tensor]]]:
    """Run all calls in each of the threads, each in an order of its own; return what they got."""
    barrier = threading.Barrier(NUM_THREADS)
    errors: list[BaseException] = []
    found: list[list[list[Tensor]]] = [[[] for _ in CALLS] for _ in range(NUM_THREADS)]

    def work(number: int) -> None:
        order = list(range(len(CALLS)))
        random.Random(number).shuffle(order)
        try:
            barrier.wait()
            for place in order:
                found[number][place] = CALLS[place].run(modules[number % len(modules)])
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors
    return found


def living() -> tuple[int, int, int, int]:
    """Return how many tensors there are, their bytes, and how many caches and programs."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [x for x in objects if issubclass(type(x), Tensor) and x.device.type != "meta"]
    kinds = [sum(type(x) is kind for x in objects) for kind in (KVCache, Program)]
    plain = [x for x in tensors if type(x) in (Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in plain}
    return len(plain), sum(storages.values()), kinds[0], kinds[1]


def assert_equal(got: list[list[list[Tensor]]], want: list[list[Tensor]]) -> None:
    for number, answers in enumerate(got):
        for call, ours, theirs in zip(CALLS, answers, want, strict=True):
            same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
            assert all(same), f"thread {number}: {call}"


@pytest.fixture(scope="module")
def alone() -> list[list[Tensor]]:
    """Return what each call answers on a module that one thread uses."""
    fast = optimize(tiny_llama(), CONFIG)
    return [call.run(fast) for call in CALLS]


def test_eight_threads_on_one_fresh_module(alone: list[list[Tensor]]) -> None:
    fast = optimize(tiny_llama(), CONFIG)
    found = []
    for _ in range(2):
        assert_equal(together([fast]), alone)
        CALLS[0].run(fast)  # its cache is then the idle one and the one used last
        found.append(living())
    first, second = found
    assert first == second
    assert len(fast.programs.compiled()) <= MOST_PROGRAMS


def test_eight_threads_on_two_fresh_modules(alone: list[list[Tensor]]) -> None:
    model = tiny_llama()
    modules = [optimize(model, CONFIG) for _ in range(2)]
    assert_equal(together(modules), alone)


def test_many_shapes_leave_nothing_behind() -> None:
    fast = optimize(tiny_llama(), CONFIG)
    ids = torch.arange(24)[:, None]
    found = []
    for batch_size in range(1, 25):
        fast(ids[:batch_size])
        if batch_size in (MOST_PROGRAMS + 2, 24):
            fast(ids[:1])
            found.append(living())
    assert found[0] == found[1]
