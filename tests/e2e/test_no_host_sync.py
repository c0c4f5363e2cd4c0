"""No step asks the device for a number: no `.item()`, at any layer, in decode and in prefill."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.kernels import begin_prediction
from sparda_compile.module.version import Version
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.testing import build

SMALL = {"top_k": 2, "sink_blocks": 1, "local_blocks": 1, "block_size": 16, "lowering": "eager"}
CPU = torch.device("cpu")


ATEN = torch.ops.aten
# What reads a value, or makes a tensor whose size hangs on values.
READS = {ATEN._local_scalar_dense, ATEN.item, ATEN.is_nonzero, ATEN.equal}
SIZES = {
    ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive,
}  # fmt: skip
INDEXES = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


class CountSyncs(TorchDispatchMode):
    """Counts reads of a tensor's value into Python, and what sizes a tensor by values.

    Args:
        sizes: Whether to count the latter; references use it, of which kernels take the place.
    """

    def __init__(self, *, sizes: bool = True) -> None:
        super().__init__()
        self.sizes = sizes
        self.num_syncs = 0

    def __enter__(self):
        # On the CPU it reads memory and calls no op.
        self._tolist = tolist = torch.Tensor.tolist

        def counted(tensor):
            self.num_syncs += 1
            return tolist(tensor)

        torch.Tensor.tolist = counted
        return super().__enter__()

    def __exit__(self, *args):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        by_mask = packet in INDEXES and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        sizes_by_value = func is ATEN.repeat_interleave.Tensor
        by_size = self.sizes and (packet in SIZES or by_mask or sizes_by_value)
        if packet in READS or by_size:
            self.num_syncs += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def traced(traced_llama):
    return sparda_compile.optimize(traced_llama, SpardaConfig(mode="query", **SMALL))


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize(
    ("mode", "hint"),
    [
        ("dense", "forecast"),
        ("query", "forecast"),
        ("forecast", "forecast"),
        ("exact", "forecast"),
        ("exact", "previous_step"),
        ("exact", "previous_layer"),
        ("exact", "ema"),
    ],
)
def test_decode_reads_no_value_into_python(traced, mode, hint, offload, monkeypatch):
    # Of one decode step, token ids are looked at where that waits for no device: on a CPU.
    monkeypatch.setattr("sparda_compile.module.optimized.check_ids", lambda ids, vocabulary: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparda_compile.optimize(
            traced, SpardaConfig(mode=mode, hint=hint, offload=offload, **SMALL)
        )
    cache = fast.new_cache(512)
    fast(torch.randint(0, 256, (2, 62)), past_key_values=cache)
    with CountSyncs(sizes=False) as counted:
        for _ in range(4):  # 62 to 66: a block fills and a new one begins
            fast(torch.randint(0, 256, (2, 1)), past_key_values=cache)
    assert counted.num_syncs == 0


class OnPaper:
    """A prefill as a GPU runs it: kernels, interpreted, and blocks in CPU memory by address."""

    def __init__(self, model, **settings):
        config = SpardaConfig(**{"mode": "query", **SMALL, **settings})
        self.fast = sparda_compile.optimize(model, config)
        self.program = self.fast.programs.get("prefill", 2, 512, last_only=True)
        self.kv, self.other = (KVCache(self.program.plan.layout, CPU) for _ in range(2))

    def turn(self, monkeypatch, *mask):
        """Take in tokens by the reference and by the kernels, and compare logits and state."""
        mask = torch.stack(mask)
        ids = torch.randint(1, 250, mask.shape)
        positions = torch.arange(self.kv.num_columns, self.kv.num_columns + len(mask[0]))
        given = None if mask.all() else mask
        call = (ids, positions.expand_as(ids).contiguous(), given)
        want = self.program(*call, self.kv)
        addresses = {name: _as_address(host) for name, host in self.other.host_blocks.items()}
        with monkeypatch.context() as patch, CountSyncs() as counted:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
            for name, address in addresses.items():
                patch.setitem(self.other.state, name, address)
            got = self.program(*call, self.other)
        assert counted.num_syncs == 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for name, tensor in self.kv.state.items():
            torch.testing.assert_close(self.other.state[name], tensor, rtol=1e-4, atol=1e-4)
        for kv in (self.kv, self.other):
            kv.advance(mask.shape[1], int(mask.sum(1).max()))


def _as_address(host):
    if not host.numel():
        return host
    step = host.stride(1) * host.element_size()
    return (
        host.data_ptr() + torch.arange(host[:, :, 0, 0, 0, 0].numel()).view(host.shape[:2]) * step
    )


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"offload": "always", "selector": "infllm2", "page_ratio": 1.0}),
        ("llama", {"offload": "always", "selector": "quest", "eviction": "fifo"}),
        ("llama", {"offload": "always", "selector": "lowbit2", "prefill": "dense"}),
        ("llama", {"offload": "always", "selector": "lowbit2", "prefill_selector": "infllm2"}),
        ("llama", {"offload": "never"}),
        ("llama", {"mode": "exact", "hint": "ema"}),
        ("llama", {"mode": "exact", "hint": "ema", "selector": "quest"}),
        ("gemma3", {"offload": "always"}),
    ],
)
def test_prefill_reads_no_value_into_python(model, settings, traced_llama, monkeypatch):
    """Of a ragged prompt and of later turns, whole or padded, which leave the reference's state."""
    monkeypatch.setattr(begin_prediction, "WINDOW", 5)  # of the last tokens, each scored by itself
    paper = OnPaper(traced_llama if model == "llama" else build(model), **settings)
    column = torch.arange(90)
    paper.turn(monkeypatch, column >= 31, column < 80)
    paper.turn(monkeypatch, column[:40] >= 0, column[:40] % 10 == 0)
    paper.turn(monkeypatch, column[:20] >= 0, column[:20] >= 0)
    fresh = OnPaper(paper.fast, **settings)
    fresh.turn(monkeypatch, column >= 0, column >= 0)


@pytest.mark.parametrize(("num_hidden", "num_syncs"), [(None, 0), (0, 1), (3, 2)])
def test_a_prompt_looks_at_its_mask_before_it_is_read(traced, num_hidden, num_syncs, monkeypatch):
    """Whether it hides any, and then how many are left; a later turn looks at the past once."""
    fast = sparda_compile.optimize(traced, SpardaConfig(mode="query", **SMALL))
    monkeypatch.setattr("sparda_compile.module.optimized.check_ids", lambda ids, vocabulary: None)
    # It looks at the values of the model's buffers, before the prompt too.
    monkeypatch.setattr(Version, "check", lambda self, thorough=False: None)
    logits = torch.zeros(2, 1, 4)
    monkeypatch.setattr("sparda_compile.module.optimized.read_prompt", lambda *_, **__: logits)
    cache = fast.new_cache(512)
    for turn in (1, 2):
        ids, mask = torch.ones(2, 20, dtype=torch.long), torch.ones(2, 20 * turn)
        mask[0, : num_hidden or 0] = 0
        given = {} if num_hidden is None else {"attention_mask": mask}
        given["position_ids"] = torch.arange(20)[None]  # else the model is asked how it counts
        with CountSyncs() as counted:
            fast(ids, past_key_values=cache, logits_to_keep=1, **given)
        seen = num_syncs if turn == 1 else 2 * (num_hidden is not None)
        assert counted.num_syncs == seen


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_prefill_never_waits_for_a_gpu(model, offload):
    config = SpardaConfig(mode="query", offload=offload, **SMALL)
    fast = sparda_compile.optimize(build(model).to("cuda"), config)
    program = fast.programs.get("prefill", 2, 512, last_only=True)
    kv = KVCache(program.plan.layout, torch.device("cuda"))
    ids = torch.randint(1, 250, (2, 90), device="cuda")
    positions = torch.arange(90, device="cuda").expand(2, -1).contiguous()
    masks = [None, positions >= torch.tensor([[40], [0]], device="cuda")]
    program(ids, positions, masks[1], kv)  # compiles, and is proved
    kv.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for turn, mask in enumerate((*masks, *masks)):
            program(ids, positions + 90 * turn, mask, kv)
            kv.advance(90, 90)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: int(x.sum()),
        lambda x: x.nonzero(), lambda x: torch.where(x > 0), lambda x: x[x > 0],
        lambda x: bool(x.all()), lambda x: x.repeat_interleave(x.int()),
        lambda x: torch.equal(x, x), lambda x: x.index_put_((x > 0,), x[0]), lambda x: x.unique(),
    ],
)  # fmt: skip
def test_the_counter_counts(read):
    x = torch.ones(3)
    with CountSyncs() as counted:
        read(x)
    assert counted.num_syncs >= 1
