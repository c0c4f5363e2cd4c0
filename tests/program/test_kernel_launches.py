"""What a step launches, found on fake tensors: of a decode, and of prompts that are then read."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.jit import KernelInterface

import sparda_compile
from sparda_compile import SpardaConfig
from sparda_compile.graph.fake_runner import FakeRunner
from sparda_compile.graph.nodes import fake_value
from sparda_compile.kernels import workspace
from sparda_compile.kernels.gpu.launch import Launch
from sparda_compile.program.kernel_launches import launches_of
from sparda_compile.registry import HINTS
from sparda_compile.runtime.kv_cache import KVCache
from sparda_compile.testing import tiny_nosa

CONFIG = SpardaConfig(
    top_k=2, local_blocks=1, block_size=16, pool_size=8, pool_stride=4, machine="h200",
    offload="always", lowering="eager", mode="query",
)  # fmt: skip
CPU = torch.device("cpu")
ALWAYS = {"_select_pages", "_append_kv", "_append_pooled_keys", "_partials"}
COPIES = {"_gather", "_store_tail"}
INFLLM2 = {"_infllm2_logits", "_infllm2_blocks"}
LOW_BIT = {"_low_bit_masses", "_append_low_bit_keys"}
CASES = {
    "query": ({}, {*ALWAYS, *COPIES, *INFLLM2}),
    "forecast": ({"mode": "forecast"}, {*ALWAYS, *COPIES, "_score_forecast"}),
    "exact": ({"mode": "exact", "hint": "previous_step"}, {*ALWAYS, *COPIES, *INFLLM2}),
    "exact, early": (
        {"mode": "exact", "hint": "previous_step", "attend_before_repair": "always"},
        {*ALWAYS, *COPIES, *INFLLM2, "_merge"},
    ),
    "ema": (
        {"mode": "exact", "hint": "ema", "attend_before_repair": "always"},
        {*ALWAYS, *COPIES, *INFLLM2, "_merge", "_predict_blocks", "_update_prediction"},
    ),
    "quest": (
        {"selector": "quest"},
        {*ALWAYS, *COPIES, "_score_quest", "_append_key_bounds"} - {"_append_pooled_keys"},
    ),
    "lowbit2": (
        {"selector": "lowbit2"},
        {*ALWAYS, *COPIES, *LOW_BIT, "_low_bit_scores"} - {"_append_pooled_keys"},
    ),
    "lowbit4 by forecast": (
        {"mode": "forecast", "selector": "lowbit4"},
        {*ALWAYS, *COPIES, *LOW_BIT} - {"_append_pooled_keys"},
    ),
    "resident": ({"offload": "never"}, {*ALWAYS, *INFLLM2}),
    "int8": ({"kv_format": "int8"}, {*ALWAYS, *INFLLM2, "_gather_packed", "_store_tail_packed"}),
    "resident int4": (
        {"kv_format": "int4", "offload": "never"}, {*ALWAYS, *INFLLM2, "_store_tail_packed"}
    ),
    "int8, small pages": (
        {"kv_format": "int8", "page_format": "stored"},
        {*ALWAYS, *INFLLM2, "_gather", "_store_tail_packed"},
    ),
    "values8": (
        {"kv_format": "values8"},
        {*ALWAYS, *INFLLM2, "_append_low_bit_keys", "_gather_packed", "_store_tail_packed"},
    ),
}  # fmt: skip


@pytest.fixture
def found(traced_llama, monkeypatch):
    # The kernels' own wrappers run; only the device that they ask for is not there.
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)

    def of(batch_size=1, max_tokens=512, phase="decode", sizes=(), **settings):
        fast = sparda_compile.optimize(traced_llama, CONFIG.replace(**settings))
        program = fast.programs.get(phase, batch_size, max_tokens, last_only=True)
        return launches_of(program.plan.graph_module.graph, CPU, batch_size, *sizes)

    return of


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_a_mode(found, case):
    settings, names = CASES[case]
    assert {launch.kernel.__name__ for launch in found(**settings)} == names


def test_sizes_are_those_of_the_cache(found):
    for batch_size, max_tokens in ((1, 512), (3, 512), (3, 4096)):
        (select,) = (
            it for it in found(batch_size, max_tokens) if it.kernel.__name__ == "_select_pages"
        )
        scores, lengths = select.args[:2]
        assert scores.shape == (batch_size, 2, max_tokens // 16)
        assert lengths.shape == (batch_size,)
        assert select.grid == (batch_size * 2,)


def test_layers_launch_the_same(found):
    launches = found()
    assert len(launches) == len({launch.kernel for launch in launches})


def test_splits_are_those_of_the_batch(found):
    for batch_size, several in ((1, True), (4096, False)):
        launches = found(batch_size, 4096, mode="exact", hint="previous_step", top_k=64)
        (merge,) = (it for it in launches if it.kernel.__name__ == "_merge")
        assert merge.args[0].shape[:2] == (batch_size, 2)
        assert (merge.args[0].shape[2] > 1) == several


class Prompt:
    """A prompt as a GPU reads it: by kernels, and blocks in CPU memory by address.

    No launch depends on a value (`e2e/test_no_host_sync.py`), so kernels are noted and do not run;
    but for the one whose numbers torch takes as indexes.
    """

    def __init__(self, fast, phase, batch_size, max_tokens=512):
        self.program = fast.programs.get(phase, batch_size, max_tokens, last_only=True)
        self.graph, self.batch_size = self.program.plan.graph_module.graph, batch_size
        self.kv = KVCache(self.program.plan.layout, CPU)
        for node in self.graph.nodes:
            host = self.kv.host_blocks.get(node.name)
            if host is None or not host.numel():
                continue
            mode = FakeRunner.of(fake_value(node).fake_mode)
            pairs = torch.arange(host.shape[0] * host.shape[1]).view(host.shape[:2])
            address = host.data_ptr() + pairs * host.stride(1) * host.element_size()
            self.kv.state[node.name] = address
            node.meta["val"] = mode.new(address.shape, address.stride(), address.dtype, CPU)

    def collected(self, num_tokens):
        """Return the forms of kernels that are found before the prompt is read."""
        past = self.kv.most_past
        launches = launches_of(self.graph, CPU, self.batch_size, num_tokens, past)
        forms = [(it.kernel.__name__, it.form) for it in launches]
        assert len(forms) == len(set(forms))
        return set(forms)

    def launched(self, num_tokens, monkeypatch, *, hides):
        """Read a prompt; returns the forms of kernels that were launched."""
        launches = []

        def noted(kernel, grid):
            def run(*args, **options):
                launches.append(Launch(kernel, grid, args, options))
                if kernel.__name__ == "_number_tokens":
                    kernel.run(*args, grid=grid, warmup=False, **options)

            return run

        ids = torch.randint(2, 250, (self.batch_size, num_tokens))
        positions = self.kv.num_columns + torch.arange(num_tokens).expand_as(ids).contiguous()
        mask = torch.arange(num_tokens).expand_as(ids) >= 3 if hides else None
        with monkeypatch.context() as patch:
            patch.setattr(KernelInterface, "__getitem__", noted)
            patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
            self.program(ids, positions, mask, self.kv)
        self.kv.advance(num_tokens, num_tokens - 3 * hides)
        return {(it.kernel.__name__, it.form) for it in launches}


STORED = {"_number_tokens", "_keep_blocks", "_extend_kv", "_store_prefix"}
PACKED = {"_pack_blocks", "_tile_unions", "_attend_tokens"}
SELECTED = {"_token_blocks", "_pick_tokens"}
POOLED = {"_extend_pooled_keys"}
STAGED = {"_mark_blocks", "_place_blocks", "_gather_listed", "_copy_pages"}
TURN = {*STAGED, *PACKED} - {"_mark_blocks", "_tile_unions"}
SPARSE = {*STORED, *PACKED, *SELECTED, *POOLED}
LOW_BIT_SPARSE = {
    *STORED, *PACKED, "_extend_low_bit_keys", "_unpack_keys", "_token_masses", "_mass_scores",
    "_pick_tokens",
}  # fmt: skip
CANDIDATES = {"_candidate_masses", "_pick_candidates"}
# What a hint keeps of a prompt's last token.
PREDICTED = dict.fromkeys(("ema", "mixture"), INFLLM2 | {"_update_prediction"})
PROMPTS = {
    "dense": (
        "prefill", {"mode": "dense", "offload": "never"}, {*STORED} - {"_store_prefix"},
        {*STORED, *TURN} - {"_store_prefix", "_gather_listed"},
    ),
    "dense first": ("prefill", {}, {*STORED, *POOLED}, {*STORED, *POOLED, *TURN}),
    "dense first, lowbit2": (
        "prefill", {"selector": "lowbit2"}, {*STORED, "_extend_low_bit_keys"},
        {*STORED, "_extend_low_bit_keys", *TURN},
    ),
    "query": ("sparse_prefill", {}, {*SPARSE, "_token_sums"}, {*SPARSE, "_token_sums", *STAGED}),
    "quest": (
        "sparse_prefill", {"selector": "quest"},
        {*SPARSE, "_extend_key_bounds"} - POOLED, {*SPARSE, "_extend_key_bounds", *STAGED} - POOLED,
    ),
    "lowbit2": (
        "sparse_prefill", {"selector": "lowbit2"}, LOW_BIT_SPARSE, {*LOW_BIT_SPARSE, *STAGED},
    ),
    "lowbit2, candidates": (
        "sparse_prefill", {"selector": "lowbit2", "prefill_candidates": 1.0},
        {*LOW_BIT_SPARSE, *CANDIDATES}, {*LOW_BIT_SPARSE, *CANDIDATES, *STAGED},
    ),
    "lowbit4 behind lowbit2": (
        "sparse_prefill", {"selector": "lowbit2", "prefill_selector": "lowbit4"}, LOW_BIT_SPARSE,
        {*LOW_BIT_SPARSE, *STAGED},
    ),
    "lowbit2 by forecast": (
        "sparse_prefill", {"mode": "forecast", "selector": "lowbit2"}, LOW_BIT_SPARSE,
        {*LOW_BIT_SPARSE, *STAGED, "_pick_past", "_pick_near"} - {"_pick_tokens"},
    ),
    "forecast": (
        "sparse_prefill", {"mode": "forecast"},
        SPARSE, {*SPARSE, *STAGED, "_pick_past", "_pick_near"} - {"_pick_tokens"},
    ),
    "resident": (
        "sparse_prefill", {"offload": "never"}, {*SPARSE, "_token_sums"} - {"_store_prefix"},
        {*SPARSE, "_token_sums", *STAGED} - {"_store_prefix", "_gather_listed"},
    ),
    "shared": (
        "sparse_prefill", {"shared_tokens": 8},
        {*SPARSE, "_token_sums"}, {*SPARSE, "_token_sums", *STAGED},
    ),
    "int8": (
        "prefill", {"kv_format": "int8"},
        {*STORED, *POOLED, "_store_prefix_packed"} - {"_store_prefix"},
        {*STORED, *POOLED, *TURN, "_store_prefix_packed", "_gather_listed_packed"}
        - {"_store_prefix", "_gather_listed"},
    ),
    "values4": (
        "prefill", {"kv_format": "values4"},
        {*STORED, *POOLED, "_extend_low_bit_keys", "_store_prefix_packed"} - {"_store_prefix"},
        {
            *STORED, *POOLED, *TURN, "_extend_low_bit_keys", "_store_prefix_packed",
            "_gather_listed_packed",
        } - {"_store_prefix", "_gather_listed"},
    ),
    "resident int4": (
        "sparse_prefill", {"offload": "never", "kv_format": "int4"},
        {*SPARSE, "_token_sums", "_store_prefix_packed"} - {"_store_prefix"},
        {*SPARSE, "_token_sums", *STAGED, "_store_prefix_packed"}
        - {"_store_prefix", "_gather_listed"},
    ),
    "int8, small pages": (
        "sparse_prefill", {"kv_format": "int8", "page_format": "stored"},
        {*SPARSE, "_token_sums", "_store_prefix_packed", "_extend_tail"}
        - {"_store_prefix", "_extend_kv"},
        {
            *SPARSE, "_token_sums", *STAGED, "_store_prefix_packed", "_extend_tail",
            "_gather_listed_packed",
        } - {"_store_prefix", "_extend_kv", "_gather_listed", "_copy_pages"},
    ),
    "calibrated": (
        "prefill", {"mode": "exact", "hint": "ema", "ema_calibrate": True},
        {*STORED, *POOLED, *PREDICTED["ema"], "_judge_rows", "_rate_candidates"},
        {*STORED, *POOLED, *PREDICTED["ema"], "_judge_rows", "_rate_candidates", *TURN},
    ),
    **{
        f"exact, {hint}": (
            "sparse_prefill", {"mode": "exact", "hint": hint},
            {*SPARSE, "_token_sums", *names}, {*SPARSE, "_token_sums", *STAGED, *names},
        )
        for hint, names in ((name, PREDICTED.get(name, ())) for name in HINTS.choices())
    },
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_launches_what_was_found(case, batch_size, traced_llama, monkeypatch):
    """Behind nothing and behind a past, whole and padded: each kernel in the forms that it has."""
    phase, settings, first, later = PROMPTS[case]
    fast = sparda_compile.optimize(traced_llama, CONFIG.replace(**settings))
    prompt = Prompt(fast, phase, batch_size)
    for num_tokens, hides, names in ((97, False, first), (48, True, later)):
        with monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "is_cuda", True, raising=False)
            found = prompt.collected(num_tokens)
        assert {name for name, _ in found} == names
        assert prompt.launched(num_tokens, monkeypatch, hides=hides) == found


@pytest.mark.parametrize("case", PROMPTS)
def test_no_turn_compiles_what_the_one_before_has_compiled(case, traced_llama, monkeypatch):
    """Triton compiles anew where a number becomes a multiple of 16, or 1.

    So there is a past and a prompt for each power of two that divides its length.
    """
    phase, settings, *_ = PROMPTS[case]
    fast = sparda_compile.optimize(traced_llama, CONFIG.replace(**settings))
    graph = fast.programs.get(phase, 1, 8192, last_only=True).plan.graph_module.graph
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)

    def forms(num_tokens, num_past):
        launches = launches_of(graph, CPU, 1, num_tokens, num_past)
        return {(it.kernel.__name__, it.form) for it in launches}

    first = forms(200, 4600)
    for num_past in (4648, 4624, 4768, 4672, 4736, 4864, 5376):
        assert forms(200, num_past) == first
    for num_tokens in (193, 202, 220, 255):
        assert forms(num_tokens, 4600) == first


def test_a_prompt_of_nosa(monkeypatch):
    settings = {"selector": "nosa", "short_list": 1}
    prompt = Prompt(
        sparda_compile.optimize(tiny_nosa(), CONFIG.replace(**settings)), "sparse_prefill", 1
    )
    for num_tokens in (97, 48):
        with monkeypatch.context() as patch:
            patch.setattr(FakeTensor, "is_cuda", True, raising=False)
            found = prompt.collected(num_tokens)
        assert prompt.launched(num_tokens, monkeypatch, hides=False) == found


@pytest.mark.parametrize("num_tokens", [32768, 32767])
def test_a_long_prompt_picks_in_tiles_of_each_width_and_else_has_one_form(
    found, num_tokens, monkeypatch
):
    """Scores of so many tokens are made in chunks, and their unions: no chunk compiles anew."""
    for name in ("SCORE_BYTES", "UNION_BYTES"):
        monkeypatch.setattr(workspace, name, 64 << 20)
    launches = found(
        max_tokens=32768, phase="sparse_prefill", sizes=(num_tokens,), offload="never",
        mode="forecast",
    )  # fmt: skip
    picks = [it for it in launches if it.kernel.__name__ == "_pick_tokens"]
    place = picks[0].kernel.arg_names.index("BLOCKS")
    assert [it.args[place] for it in picks] == [512, 1024, 2048]
    others = [it.kernel.__name__ for it in launches if it not in picks]
    assert len(others) == len(set(others)) == len(SPARSE) - 2


def test_an_op_that_asks_for_numbers_is_left_to_its_launch(found, monkeypatch, caplog):
    """As a selector without a kernel does; what comes behind it is found all the same."""
    monkeypatch.setattr("sparda_compile.kernels.gpu.select_tokens.covers", lambda *_: False)
    with caplog.at_level("DEBUG", "sparda_compile.program"):
        launches = found(phase="sparse_prefill", sizes=(97,), offload="never")
    assert "select_tokens" in caplog.text
    names = {it.kernel.__name__ for it in launches}
    assert names == {*SPARSE} - SELECTED - {"_store_prefix"}
