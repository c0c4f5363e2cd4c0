"""What surrounds a call: modes, defaults, threads, interrupts."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.ambient import check_autocast, neutral
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "autocast to the model's dtype": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def fast(model):
    return optimize(model, CONFIG)


def prompt(num_tokens=30, batch_size=1, seed=0):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(0, 256, (batch_size, num_tokens), generator=generator, device="cpu")


def generated(module, ids):
    return module.generate(ids, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("name", [n for n in SURROUNDINGS if n != "autocast to the model's dtype"])
@pytest.mark.parametrize("builds", [False, True])
def test_a_call_leaves_nothing_of_its_surroundings(model, name, builds):
    ids = prompt()
    want = generated(model, ids)
    mine = None if builds else optimize(model, CONFIG)
    with SURROUNDINGS[name]():
        mine = mine or optimize(model, CONFIG)
        logits = mine(ids).logits
    assert torch.equal(generated(mine, ids), want)
    assert torch.equal(mine(ids).logits, logits)
    assert logits.dtype == torch.float32
    assert all(not t.is_inference() for t in mine.last_cache.state.values())


def test_a_turn_inside_inference_mode_and_the_next_outside(model, fast):
    ids = prompt(60)
    cache = fast.new_cache()
    with torch.inference_mode():
        fast(ids[:, :50], past_key_values=cache)
    got = fast(ids[:, 50:], past_key_values=cache).logits
    with torch.no_grad():
        want = model(ids).logits[:, 50:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast_to_another_dtype_is_refused(fast):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UnsupportedInputError, match=r"autocast to torch.bfloat16 is on"):
            fast(prompt())
        check_autocast("cpu", torch.bfloat16)
        with neutral():
            assert not torch.is_autocast_enabled("cpu")
    check_autocast("cpu", torch.float32)


@neutral()
def inside():
    made = torch.empty(1)
    assert (made.dtype, made.device.type) == (torch.float32, "cpu")
    assert not made.is_inference()
    raise ValueError("from inside")


def test_neutral_puts_everything_back():
    with torch.inference_mode(), default_dtype(torch.float64), torch.device("meta"):
        with pytest.raises(ValueError, match="from inside"):
            inside()
        made = torch.empty(1)
        assert (made.dtype, made.device.type) == (torch.float64, "meta")
        assert made.is_inference()


@pytest.mark.parametrize("num_modules", [1, 2])
def test_threads_on_fresh_modules(model, num_modules):
    modules = [optimize(model, CONFIG) for _ in range(num_modules)]
    prompts = [prompt(40 + 13 * n, 1 + n % 2, seed=n) for n in range(8)]
    want = [generated(model, ids) for ids in prompts]
    got = [None] * len(prompts)

    def serve(n):
        try:
            for _ in range(3):
                got[n] = generated(modules[n % num_modules], prompts[n])
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            got[n] = error

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [g for g in got if not torch.is_tensor(g)] == []
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


class TestInterrupts:
    @pytest.fixture
    def interrupted(self, fast, monkeypatch):
        """A cache of 40 tokens whose next step was interrupted in its middle."""
        cache = fast.new_cache()
        fast(prompt(40), past_key_values=cache)
        program = fast.program("decode", 1, cache.kv.layout.max_tokens, last_only=True)
        fast(prompt(1), past_key_values=cache)
        call = program.lowered.calls[len(program.lowered.calls) // 2]
        function = call.function

        def stop(*args, **kwargs):
            call.function = function
            raise KeyboardInterrupt

        call.function = stop
        with pytest.raises(KeyboardInterrupt):
            fast(prompt(1), past_key_values=cache)
        return fast, cache

    def test_a_half_done_step_breaks_its_cache(self, interrupted):
        fast, cache = interrupted
        for _ in range(2):
            with pytest.raises(KVCacheError, match="began and did not end"):
                fast(prompt(1), past_key_values=cache)
        with pytest.raises(KVCacheError, match="began and did not end"):
            fast.generate(prompt(60), past_key_values=cache, max_new_tokens=2)

    def test_it_is_whole_again_after_a_reset(self, interrupted, model):
        fast, cache = interrupted
        cache.reset()
        assert cache.get_seq_length() == 0
        ids = prompt(70)
        got = fast.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
        assert torch.equal(got, generated(model, ids))

    def test_others_are_not_touched(self, interrupted, model):
        fast, _ = interrupted
        assert torch.equal(generated(fast, prompt()), generated(model, prompt()))
