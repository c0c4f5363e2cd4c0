"""The programs that read prompts, on a tiny model and a CPU."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.bench import prompt_programs
from sparda_compile.bench.prompt_programs import (
    OURS,
    PREFILL_BACKENDS,
    PromptPrograms,
    fill_dynamic,
    prompt_of,
)
from sparda_compile.bench.shapes import SHAPES

BEGINS = 129  # eight blocks of 16 are all that a token reads


@pytest.fixture
def programs(prompts):
    yield prompts
    prompts.drop()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    ("tokens", "with_past", "phase", "size"),
    [
        (40, False, "prefill", (0, 40)),
        (BEGINS - 1, False, "prefill", (0, BEGINS - 1)),
        (BEGINS, False, "sparse_prefill", (0, BEGINS - 1)),
        (300, False, "sparse_prefill", (0, BEGINS - 1)),
        (1, True, "decode", (BEGINS - 2, 1)),
        (40, True, "sparse_prefill", (BEGINS - 40, 39)),
        (4000, True, "sparse_prefill", (BEGINS - 64, 63)),
    ],
)
def test_ours_equal_the_model_where_all_blocks_are_read(
    programs, name, tokens, with_past, phase, size
):
    found = programs.compare(name, tokens, 512, with_past=with_past)
    if name == "dense":
        assert found["phase"] == ("decode" if tokens == 1 else "prefill")
    else:
        assert (found["phase"], found["past"], found["tokens"]) == (phase, *size)
    assert found["relative_difference"] < 0.02
    assert found["same_token"]


def test_what_is_compared_has_the_cache_that_is_measured(programs):
    programs.compare("sparse_query", 200, 1000, with_past=False)
    compared = programs.ours("sparse_query").last_cache
    programs.generate("sparse_query", prompt_of(970, 256, torch.device("cpu")), 30)
    assert programs.ours("sparse_query").last_cache is compared


def test_wrong_logits_are_an_error(programs, monkeypatch):
    own = PromptPrograms._theirs_at
    monkeypatch.setattr(
        PromptPrograms, "_theirs_at", lambda *args, **more: own(*args, **more).roll(1)
    )
    with pytest.raises(AssertionError, match="dense and the model differ by"):
        programs.compare("dense", 40, 512, with_past=False)


def test_program_that_never_ran_is_an_error(programs, monkeypatch):
    real = prompt_programs._sizes
    # Without the hidden column every token reads all blocks, and the dense program runs.
    monkeypatch.setattr(
        prompt_programs, "_sizes", lambda *args: (0, real(*args)[1] - 1, real(*args)[2])
    )
    with pytest.raises(AssertionError, match="never a sparse_prefill"):
        programs.compare("sparse_query", 200, 512, with_past=False)


def test_times_of_all_tokens(programs):
    ids = prompt_of(20, 256, torch.device("cpu"))
    for name in ("dense", "transformers_flash"):
        times = programs.generate(name, ids, 5)
        assert len(times) == 5
        assert min(times) > 0


def test_first_token_alone_has_the_cache_of_all(programs):
    ids = prompt_of(40, 256, torch.device("cpu"))
    for name in ("sparse_query", "transformers_flash"):
        assert len(programs.first_token(name, ids, 30)) == 1
    capacity = programs.ours("sparse_query").last_cache.layout.max_tokens
    programs.generate("sparse_query", ids, 30)
    assert programs.ours("sparse_query").last_cache.layout.max_tokens == capacity >= 70


def test_modules_are_kept_until_they_are_dropped(programs):
    first = programs.ours("dense")
    assert programs.ours("dense") is first
    other = programs.ours("sparse_query")
    assert other.captures is first.captures
    programs.drop()
    assert programs.ours("dense") is not first
    settings = programs.settings
    programs.configure(**settings, chunk_tokens=64)
    assert programs.ours("dense").sparda_config.chunk_tokens == 64
    programs.configure(**settings)


@pytest.mark.parametrize(("phase", "found"), [("sparse_prefill", "sparse"), ("prefill", "dense")])
def test_what_auto_makes_of_a_prompt(programs, monkeypatch, phase, found):
    assert programs.auto(1 << 20) == "dense"  # on a CPU nothing is won

    def chosen(captures, config, batch_size, num_past, num_tokens):
        assert captures is programs.ours("dense").captures
        assert (config.mode, config.prefill, config.block_size) == ("forecast", "auto", 16)
        assert (batch_size, num_past, num_tokens) == (1, 0, 700)
        return phase

    monkeypatch.setattr(prompt_programs, "prompt_phase", chosen)
    assert programs.auto(700) == found


def test_bytes_of_a_cache(programs):
    programs.generate("sparse_forecast", prompt_of(40, 256, torch.device("cpu")), 2)
    layout = programs.ours("sparse_forecast").last_cache.layout
    for on_host in (True, False):
        found = programs.kv_bytes("sparse_forecast", on_host=on_host)
        assert found == layout.num_bytes(on_host=on_host) > 0
        assert programs.kv_bytes("transformers_flash", on_host=on_host) == 0


def test_attention_that_torch_has_not_is_named(programs, monkeypatch):
    assert programs.forbids("dense", 40, with_past=False) is None
    assert programs.forbids("transformers_flash", 40, with_past=True) is None
    reason = programs.forbids("transformers_cudnn", 40, with_past=False)
    assert reason.startswith("torch has no such attention here: ")
    assert not reason.endswith(".")
    monkeypatch.setattr(PromptPrograms, "_probe", lambda *args: "asked again")
    assert programs.forbids("transformers_cudnn", 4000, with_past=False) == reason
    assert programs.forbids("transformers_cudnn", 1, with_past=True) == "asked again"


def test_past_is_always_the_same(programs):
    one, two = (fill_dynamic(programs.model, 10) for _ in range(2))
    assert one.get_seq_length() == 10
    assert len(one.layers) == SHAPES["tiny"].num_layers
    for a, b in zip(one.layers, two.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert a.keys.dtype == torch.bfloat16
    assert not torch.equal(one.layers[0].keys, one.layers[1].keys)


def test_fastest_backends_of_a_prompt_are_among_all():
    assert set(PREFILL_BACKENDS) < set(prompt_programs.BACKENDS)
