"""A cache that is saved and loaded goes on bit for bit, and only where it may."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ConfigError, KVCacheError
from sparda_compile.module.saved_cache import FORMAT_VERSION, CacheFile, SavedCache
from sparda_compile.testing import build, tiny_llama

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1, "top_k": 3,
    "machine": "h200", "lowering": "eager", "prefill": "dense", "offload": "always",
}  # fmt: skip
ON_DEVICE = {"offload": "never", "speculate_where": "always"}
CASES = {
    "dense": {"mode": "dense"},
    "query": {"mode": "query"},
    "lowbit2, fixed size": {"mode": "query", "selector": "lowbit2", "max_tokens": 256},
    "lowbit4, prompts by infllm2": {
        "mode": "query", "selector": "lowbit4", "prefill": "sparse", "prefill_selector": "infllm2",
    },
    "forecast": {"mode": "forecast"},
    "int8": {"mode": "query", "kv_format": "int8"},
    "values4": {"mode": "query", "kv_format": "values4"},
    "fp8 on the device": {"mode": "query", "kv_format": "fp8", "offload": "never"},
    "pages of runs": {"mode": "query", "kv_format": "int4", "page_format": "stored"},
    "pages of runs on the device": {
        "mode": "query", "kv_format": "int8", "page_format": "stored", "offload": "never",
    },
    "all hints": {
        "mode": "exact",
        "hint": ("ema", "forecast", "previous_step", "previous_layer"),
    },
    "mixture": {"mode": "exact", "hint": "mixture"},
    "ema, calibrated": {"mode": "exact", "hint": "ema", "selector": "quest", "ema_calibrate": True},
    "speculate": {"mode": "speculate", **ON_DEVICE},
    "union": {"mode": "speculate", "repair": "union", **ON_DEVICE},
    "windows": {"mode": "query"},
}  # fmt: skip
PAST = 120


@pytest.fixture(scope="module")
def traced(traced_llama):
    return {"llama": traced_llama, "windows": optimize(build("gemma3"), SpardaConfig(
        mode="dense", lowering="eager"
    ))}  # fmt: skip


@pytest.fixture(scope="module")
def make(traced):
    def made(model="llama", **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a Forecast that nobody has trained
            return optimize(traced[model], SpardaConfig(**{**SMALL, **settings}))

    return made


@pytest.fixture(scope="module")
def text():
    """Return ids of two sequences, one of them padded, and their mask."""
    ids = torch.randint(2, 250, (2, PAST + 60), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(PAST + 60) >= torch.tensor([[0], [53]])).long()
    return ids, mask


def read(fast, cache, text, begin, end):
    ids, mask = text
    return fast(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits


def first_turn(fast, text):
    cache = fast.new_cache(200)
    read(fast, cache, text, 0, PAST)
    for column in range(PAST, PAST + 10):
        read(fast, cache, text, column, column + 1)
    return cache


def second_turn(fast, cache, text):
    """Return the logits of new tokens of a turn, and of steps behind it."""
    turns = [(PAST + 10, PAST + 40), *((n, n + 1) for n in range(PAST + 40, PAST + 60))]
    return [read(fast, cache, text, *turn)[:, -1] for turn in turns]


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_goes_on_as_if_it_had_not_been_saved(make, text, name, tmp_path):
    model = "windows" if name == "windows" else "llama"
    fast, other = make(model, **CASES[name]), make(model, **CASES[name])
    cache = first_turn(fast, text)
    path = cache.save(tmp_path / "new" / "turn.safetensors")
    loaded = other.load_cache(path)
    assert loaded.owner() is other
    for key, tensor in cache.kv.state.items():
        if not key.startswith(("sparda_pages", "sparda_host")):
            assert torch.equal(loaded.kv.state[key], tensor), key
    assert (loaded.get_seq_length(), loaded.kv.longest) == (PAST + 10, PAST + 10)
    assert loaded.kv.lengths() == cache.kv.lengths() == [PAST + 10, PAST + 10 - 53]
    assert loaded.kv.stats().total == cache.kv.stats().total
    wanted = torch.stack(second_turn(fast, cache, text))
    assert torch.equal(torch.stack(second_turn(other, loaded, text)), wanted)


@pytest.fixture(scope="module")
def query(make):
    return make(mode="query")


@pytest.fixture(scope="module")
def saved(query, text, tmp_path_factory):
    """Return a file, which no test changes, and the logits behind it."""
    cache = first_turn(query, text)
    path = cache.save(tmp_path_factory.mktemp("saved") / "turn.safetensors")
    return path, torch.stack(second_turn(query, cache, text))


def test_it_may_be_loaded_with_more_room(query, make, text, saved):
    path, wanted = saved
    for fast, asked, room in ((query, 700, 1024), (make(mode="query", max_tokens=768), None, 768)):
        cache = fast.load_cache(path, asked)
        assert cache.get_max_cache_shape() == room
        assert torch.equal(torch.stack(second_turn(fast, cache, text)), wanted)


def test_it_knows_the_tokens_that_were_passed_in(query, text, saved):
    ids, mask = text
    cache = query.load_cache(saved[0])
    assert cache.has_padding
    cache.check_ids(ids)
    cache.check_mask(mask)
    with pytest.raises(KVCacheError, match="differs from the tokens of the cache"):
        cache.check_ids(ids.flip(0))
    ids = ids.clone()
    out = query.generate(
        ids[:, : PAST + 20], attention_mask=mask[:, : PAST + 20], cache=cache,
        max_new_tokens=3, min_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert out.shape == (2, PAST + 23)


def test_budgets_set_by_hand_and_by_it_are_kept(make, text, tmp_path):
    fast = make(**CASES["speculate"])
    cache = fast.new_cache()
    cache.set_budgets({1: 4})
    read(fast, cache, text, 0, PAST)
    loaded = fast.load_cache(cache.save(tmp_path / "turn"))
    assert loaded.budgets == {1: 4}
    read(fast, loaded, text, PAST, PAST + 1)
    budget = [int(loaded.kv.state[f"sparda_budget_{layer}"]) for layer in range(2)]
    assert budget == [3 + 5, 4]


def test_memory_that_others_left_is_not_written(make, text, tmp_path):
    """Blocks in CPU memory keep what an earlier text put there until they are filled again."""
    fast = make(mode="query", offload="always")
    cache = first_turn(fast, text)
    cache.reset()
    ids, mask = text
    fast(ids[:, :40], attention_mask=mask[:, -40:] * torch.tensor([[1], [1]]), cache=cache)
    host = load_file(cache.save(tmp_path / "turn"))["sparda_host_0"]
    assert host.shape[2] == 2
    assert (cache.kv.host_blocks["sparda_host_0"][:, :, 2:7] != 0).any()
    short = load_file(cache.save(tmp_path / "turn"))["sparda_pages_0"]
    assert short.shape[2] == 3


def test_a_file_holds_what_was_read_and_not_what_there_is_room_for(query, make, text, tmp_path):
    sizes = []
    for room in (512, 4096):
        fast = make(mode="query", offload="never")
        cache = fast.new_cache(room)
        read(fast, cache, text, 0, PAST)
        tensors = load_file(cache.save(tmp_path / "turn"))
        sizes.append(tensors["sparda_pages_0"].shape[2])
    assert sizes == [8, 8]


def test_nothing_to_save(query, text, tmp_path):
    cache = query.new_cache()
    with pytest.raises(KVCacheError, match="holds no token"):
        cache.save(tmp_path / "turn")
    read(query, cache, text, 0, 20)
    with pytest.raises(ConfigError, match="is a folder"):
        cache.save(tmp_path)
    cache.kv.is_broken = True
    with pytest.raises(KVCacheError, match="began and did not end"):
        cache.save(tmp_path / "turn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 4}, "the setting top_k is 3 in the file and 4 here"),
        ({"mode": "exact"}, "the setting mode is 'query' in the file and 'exact' here"),
        ({"hint": ("ema", "next_query")}, r"the setting hint is .* and \['ema', 'next_query'\]"),
        ({"eviction": "fifo"}, "the setting eviction is 'lru' in the file and 'fifo' here"),
        ({"kv_format": "int4"}, "the setting kv_format is 'model' in the file and 'int4' here"),
        ({"offload": "never"}, "full blocks in CPU memory: True in the file and False here"),
        ({"max_tokens": 256}, "a saved cache, need 512 tokens .* max_tokens=256"),
    ],
)
def test_other_settings_are_refused(make, saved, settings, words):
    with pytest.raises(KVCacheError, match=words):
        make(**{"mode": "query", **settings}).load_cache(saved[0])


def test_what_decides_no_state_may_differ(make, text, saved):
    fast = make(mode="query", machine="h100", expected_overlap=0.5, chunk_tokens=64, progress=False)
    cache = fast.load_cache(saved[0])
    assert torch.equal(torch.stack(second_turn(fast, cache, text)), saved[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 3}, "layers with attention are 2 in the file and 3 here"),
        ({"num_key_value_heads": 4}, "of layer 0, num_groups is 2 in the file and 4 here"),
        ({"seed": 1}, r"the weights are others: of 2\d tensors \d+ differ, one of them model"),
    ],
)
def test_other_models_are_refused(saved, change, words):
    model = tiny_llama(**{"num_hidden_layers": 2, **change})
    fast = optimize(model, SpardaConfig(**{**SMALL, "mode": "query"}))
    with pytest.raises(KVCacheError, match=f"(?s){words}.*load it with a module of the same"):
        fast.load_cache(saved[0])


class TestFiles:
    """Files that are none, of another form, or changed."""

    def changed(self, path, to, tensors=lambda t: t, **fields):
        with safe_open(path, framework="pt") as file:
            kept = json.loads(file.metadata()["sparda_cache"])
        for name, value in fields.items():
            kept[name] = value
        kept = {name: value for name, value in kept.items() if value is not ...}
        save_file(tensors(load_file(path)), to, metadata={"sparda_cache": json.dumps(kept)})
        return to

    def test_no_file(self, query, tmp_path):
        with pytest.raises(KVCacheError, match="is no file; pass one that SpardaCache"):
            query.load_cache(tmp_path / "none")
        for path in (None, 3):
            with pytest.raises(KVCacheError, match=f"'{path}' is no file"):
                query.load_cache(path)
        with pytest.raises(ConfigError, match="max_tokens='big' is not a whole number"):
            query.load_cache(tmp_path / "none", "big")
        (tmp_path / "text").write_text("no tensors")
        save_file({"a": torch.zeros(1)}, tmp_path / "other")
        for name, words in (("text", "header"), ("other", "its metadata has no sparda_cache")):
            with pytest.raises(KVCacheError, match=f"(?i)cannot be read as .*{words}"):
                query.load_cache(tmp_path / name)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"format_version": FORMAT_VERSION + 1}, "format_version is 3, this version reads 2"),
            ({"format_version": 1}, "format_version is 1, this version reads 2"),
            ({"longest": ...}, "its fields are"),
            ({"num_columns": "many"}, "num_columns='many' is not a whole number"),
            ({"weights": []}, "weights is a list"),
        ],
    )
    def test_descriptions(self, query, saved, tmp_path, fields, words):
        path = self.changed(saved[0], tmp_path / "turn", **fields)
        with pytest.raises(KVCacheError, match=words):
            query.load_cache(path)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: t.pop("sparda_page_stamp_1"), r"\['sparda_page_stamp_1'\] are missing"),
            (lambda t: t.update(more=torch.zeros(1)), r"and \['more'\] unknown"),
            (lambda t: t.update(sparda_pooled_k_0=torch.zeros(2)), r"sparda_pooled_k_0 is \(2,\)"),
            (
                lambda t: t.update(sparda_lengths=t["sparda_lengths"].long()),
                "of torch.int64, not",
            ),
            (lambda t: t["sparda_lengths"].fill_(9000), "lengths .* are not 0 to 512"),
            (lambda t: t["sparda_block_table_1"].fill_(40), "contradict each other"),
            (lambda t: t["sparda_page_block_0"].fill_(-1), "sparda_page_block_0 contradict"),
        ],
    )
    def test_tensors(self, query, saved, tmp_path, change, words):
        def edit(tensors):
            change(tensors)
            return tensors

        path = self.changed(saved[0], tmp_path / "turn", edit)
        with pytest.raises(KVCacheError, match=words):
            query.load_cache(path)


def test_its_description_says_what_it_is(saved):
    file = CacheFile.open(saved[0])
    info = file.info
    assert (info.model, info.batch_size, info.max_tokens) == ("LlamaForCausalLM", 2, 512)
    assert SavedCache.from_json(json.dumps(dataclasses.asdict(info))) == info
    assert sum(mask.shape[1] for _, mask in file.passed) == PAST + 10
