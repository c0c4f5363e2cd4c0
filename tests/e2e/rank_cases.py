"""What the ranks of a sharded model do; `test_ranks.py` starts them.

    python rank_cases.py FOLDER gloo                                                 four ranks
    python -m torch.distributed.run --standalone --nproc-per-node=2 rank_cases.py FOLDER nccl

`FOLDER/<family>` are the checkpoints, `FOLDER/four<rank>` and `FOLDER/two<rank>` is what each rank
says; two of the four go on when all are done. What one process says comes from the same functions.
Those of gloo are copies of one process, which has imported all and traced a model: else each would.
With `nccl` two ranks have a GPU each, and with `dying` the second of them ends in the middle.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import SpardaError
from sparda_compile.forecast.weights import load_forecast
from sparda_compile.isa.engines import DeferredEngine, DelayEngine, use_engine
from sparda_compile.program import program as program_module
from sparda_compile.program.rank_order import order_of
from sparda_compile.progress import showing
from sparda_compile.testing import tiny_llama

# A program that uses NVLink multicast can take the GPUs of a shared host out of service.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


def start(folder, name):
    """Start the cases; those of gloo see no GPU."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    is_gloo = name == "gloo"
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if is_gloo else {}
    return subprocess.Popen(
        [sys.executable, *([] if is_gloo else torchrun), __file__, folder, name],
        env={**os.environ, **NO_MULTICAST, **hidden},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SMALL = {
    "block_size": 16,
    "pool_size": 8,
    "pool_stride": 4,
    "sink_blocks": 1,
    "local_blocks": 2,
    "top_k": 2,
    "max_tokens": 192,
    "lowering": "eager",
    "offload": "always",
    "machine": "h200",
    "attend_before_repair": "always",
    "prefill": "dense",
}
FAMILIES = ("llama", "mixtral", "qwen3")
MODES = {
    "dense": {},
    "query": {},
    "forecast": {},
    "exact": {"hint": ("forecast", "previous_step")},
    "speculate": {"offload": "never", "speculate_where": "always"},
}
MODES_OF_FOUR = ("query", "forecast", "exact")
LENGTHS = (90, 37, 64)
SECOND = 21
NEW = 5
SAMPLED = 12


def prompt(vocabulary=256):
    """Return ids, mask and the tokens of a second turn."""
    generator = torch.Generator().manual_seed(3)
    width = max(LENGTHS)
    ids = torch.randint(1, vocabulary, (len(LENGTHS), width), generator=generator)
    more = torch.randint(1, vocabulary, (len(LENGTHS), SECOND), generator=generator)
    padding = width - torch.tensor(LENGTHS)
    return ids, (torch.arange(width) >= padding[:, None]).long(), more


def said(fast):
    """Return the logits of a ragged prompt, of steps, of a second turn and of one more step."""
    ids, mask, more = (each.to(fast.device) for each in prompt())
    cache, logits = fast.new_cache(), []

    def step(tokens):
        nonlocal mask
        columns = cache.get_seq_length() + tokens.shape[1] - mask.shape[1]
        beyond = mask.new_ones(len(tokens), columns)
        mask = torch.cat([mask, beyond], dim=1)
        out = fast(tokens, attention_mask=mask, past_key_values=cache)
        logits.append(out.logits)
        return out.logits[:, -1:].argmax(-1)

    token = step(ids)
    for _ in range(NEW):
        token = step(token)
    step(step(more))
    return torch.cat(logits, dim=1).cpu()


def config(mode, **changes):
    """Return the configuration of a mode."""
    return SpardaConfig(mode=mode, **{**SMALL, **MODES[mode], **changes})


def build(folder, family, model, mode, **changes):
    """Optimize a model in a mode, with the Forecast of its file where the mode takes one."""
    made = config(mode, **changes)
    forecast = load_forecast(folder / f"{family}.safetensors") if made.needs_forecast else None
    return optimize(model, made, forecast=forecast)


def all_modes(folder, model, family, modes=tuple(MODES)):
    """Return what a model says in every mode, and a module of it, which is traced once."""
    fast, found = model, {}
    for mode in modes:
        fast = build(folder, family, fast, mode)
        found[mode] = said(fast)
    return found, fast


def variants(folder, model, rank=0):
    """Return what only moves bytes, or only cuts a prompt, on `llama`."""
    fast = build(folder, "llama", model, "forecast", offload="never")
    found = {"on the device": said(fast)}
    fast = build(folder, "llama", fast, "forecast", chunk_tokens=32)
    found["in chunks"] = said(fast)
    for offload in ("always", "never"):
        fast = build(folder, "llama", fast, "forecast", kv_format="int8", offload=offload)
        found[f"int8, {offload}"] = said(fast)
    fast = build(folder, "llama", fast, "exact", hint="mixture")
    found["mixture"] = said(fast)
    with late(rank):
        found["late"] = said(build(folder, "llama", fast, "forecast"))
    fast = build(folder, "llama", fast, "forecast")
    ids = prompt()[0].to(fast.device)
    found["greedy"] = fast.generate(ids, max_new_tokens=NEW, do_sample=False).cpu()
    torch.manual_seed(11 + rank)
    settings = {"do_sample": True, "max_new_tokens": SAMPLED, "top_k": 0, "temperature": 3.0}
    return found | {"sampled": fast.generate(ids, **settings).cpu()}


@contextlib.contextmanager
def late(rank):
    """Let a rank that is not the first wait at random, and all ranks' side streams run late."""
    chance, run = random.Random(rank), program_module.Program.__call__
    engine = program_module.CudaEngine

    def slow(self, *args, **rest):
        time.sleep(chance.random() * 0.01 if rank else 0.0)
        return run(self, *args, **rest)

    program_module.Program.__call__ = slow
    program_module.CudaEngine = lambda device: DelayEngine(device, 7 + rank)
    try:
        with use_engine(DeferredEngine(None if rank == 0 else 7)):
            yield
    finally:
        program_module.Program.__call__ = run
        program_module.CudaEngine = engine


def refused(action, kinds=SpardaError):
    """Return kind and text of what an action raises."""
    try:
        action()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def other_order(graph):
    """Return what a program's ranks compare, with two collectives exchanged."""
    order = order_of(graph)
    order["the order of collectives"] = order["the order of collectives"][::-1]
    return order


def refusals(folder, model, rank):
    """Return what ranks say that do not agree."""
    fast = build(folder, "llama", model, "query")
    ids, found = prompt()[0].to(fast.device), {}
    mine = ids.clone()
    mine[0, 5] += rank
    found["other tokens"] = refused(lambda: fast.generate(mine, max_new_tokens=2))
    found["other tokens in forward"] = refused(lambda: fast(mine))
    shorter = ids[:, rank:]
    found["other length"] = refused(lambda: fast.generate(shorter, max_new_tokens=2))
    found["max_time"] = refused(lambda: fast.generate(ids, max_new_tokens=2, max_time=5.0))
    found["one alone"] = refused(
        lambda: fast.generate(ids.int() if rank else ids, max_new_tokens=2 + 500 * rank)
    )
    found["other configuration"] = refused(
        lambda: build(folder, "llama", fast, "query", top_k=2 + rank)
    )
    held = fast.new_cache()
    fast(ids, past_key_values=held)
    found["save"] = refused(lambda: held.save(folder / "cache"))
    found["load"] = refused(lambda: fast.load_cache(folder / "cache"))
    if rank:
        program_module.order_of = other_order
    fast = build(folder, "llama", fast, "query", top_k=1)
    found["other order"] = refused(lambda: fast(ids))
    program_module.order_of = order_of
    found["afterwards"] = fast.generate(ids, max_new_tokens=2).cpu()
    return found


def lost(folder, model, rank):
    """Return a module, its prompt, and what the first rank says when the second one dies."""
    fast = build(folder, "llama", model, "query")
    ids = prompt()[0].to(fast.device)
    cache = fast.new_cache()
    fast(ids, past_key_values=cache)
    token = ids[:, -1:]
    for _ in range(2):  # on GPUs the second step is a CUDA graph
        fast(token, past_key_values=cache).logits.cpu()
    if rank:
        os._exit(0)

    def steps():
        return [fast(token, past_key_values=cache).logits.cpu() for _ in range(3)]

    return fast, ids, refused(steps)


def ending(folder, model, rank):
    """Return what the first rank says when the second one dies, and when the group is gone."""
    fast, ids, said_lost = lost(folder, model, rank)
    found = {"lost": said_lost}
    dist.destroy_process_group()
    found["destroyed"] = refused(lambda: fast(ids))
    found["destroyed in generate"] = refused(lambda: fast.generate(ids, max_new_tokens=2))
    return found


def load(folder, family, changes=None):
    """Return a checkpoint that is sharded over all ranks, by transformers' plan with changes."""
    size = dist.get_world_size()
    # Both ways to ask for it; `auto` goes by what torchrun has started.
    asked = {"tp_plan": "auto"} if size == int(os.environ["WORLD_SIZE"]) else {"tp_size": size}
    plan = DistributedConfig(**({"tp_size": size, "tp_plan": changes} if changes else asked))
    return read(folder / family, distributed_config=plan)


def read(path, **settings):
    """Return a checkpoint's model; on GPUs its experts run in a way that CUDA graphs can hold."""
    model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    if torch.cuda.is_available() and path.name == "mixtral":
        model.set_experts_implementation("batched_mm")
    return model


def kv_heads(fast):
    """Return the KV heads of each layer's pool, of the last call."""
    return [layer.num_groups for layer in fast.last_cache.layout.layers]


def graphs(fast):
    """Return how many CUDA graphs the steps of a text take."""
    fast.generate(prompt()[0].to(fast.device), max_new_tokens=NEW, do_sample=False)
    return sum(program.num_graphs for program in fast.programs.compiled())


@contextlib.contextmanager
def joined(folder, size, backend="gloo", seconds=60):
    """Make a process group of the first `size` processes."""
    store = f"file://{folder / f'store{size}'}"
    rank = int(os.environ["RANK"])
    if backend == "nccl":
        torch.cuda.set_device(rank)
    wait = timedelta(seconds=seconds)
    dist.init_process_group(backend, store, timeout=wait, rank=rank, world_size=size)
    yield rank
    if dist.is_initialized():
        dist.destroy_process_group()


def few_heads(folder):
    """Return what is said of two KV heads on four ranks, by transformers itself and by us."""
    ids, found = prompt()[0][:1], {}
    model = load(folder, "few")
    with torch.no_grad():
        found["transformers"] = refused(lambda: model(ids), RuntimeError)
    found["ours"] = refused(lambda: optimize(model))
    keys = dict.fromkeys((f"model.layers.*.self_attn.{k}_proj" for k in "kv"), "replicate")
    model = load(folder, "few", keys)
    with torch.no_grad():
        found["whole keys"] = model(ids).logits
    return found | {"ours of whole keys": refused(lambda: optimize(model))}


def sibling(name):
    """Return a module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def four(folder):
    """Return what each of four ranks finds."""
    found, fast = all_modes(folder, load(folder, "llama"), "llama", MODES_OF_FOUR)
    said_of = {"llama": found, "heads": kv_heads(fast), "few heads": few_heads(folder)}
    return said_of | {"odd heads": refused(lambda: optimize(load(folder, "odd")))}


def two(folder, rank):
    """Return what each of two ranks finds, a module, and one of which all have all heads."""
    gathered = build(folder, "olmo2", load(folder, "olmo2"), "forecast")
    found = {"gathered": said(gathered), "gathered heads": kv_heads(gathered)}
    for family in reversed(FAMILIES):
        found[family], fast = all_modes(folder, load(folder, family), family)
    found["heads"] = kv_heads(fast)
    found["graphs"] = graphs(build(folder, "llama", fast, "forecast"))
    found["report"] = repr(explain(fast, config("query")))
    found["variants"] = variants(folder, fast, rank)
    return found | {"refused": refusals(folder, fast, rank)}, fast, gathered


def forked(folder, cases, size):
    """Run the cases in copies of this process, with what torchrun would say to each."""
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 100)
    sibling("rank_works")
    optimize(tiny_llama(), config("query"))
    gc.freeze()  # nothing of it is looked at again, so the copies share its memory
    start_processes(rank_of, (folder, cases, size), size, start_method="fork")


def rank_of(rank, folder, cases, size):
    """Be one of the ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    main(folder, cases)


def main(folder, cases):
    """Run cases and write what this rank found, for each number of ranks."""
    torch.set_num_threads(1)
    gc.set_threshold(50_000, 20, 100)
    if cases == "gloo":
        with joined(folder, 4) as rank:
            works = sibling("rank_works")
            found = four(folder)
            found["trained"] = works.trained_by_command(folder, rank, "--tp", "2")
            torch.save(found, folder / f"four{rank}")
        if rank > 1:
            return
        with joined(folder, 2) as rank:
            works.benchmarks(folder)
            whole = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
            replicas = works.trained(whole)
            found, fast, gathered = two(folder, rank)
            found["replicas"] = replicas
            found["gathered start"] = works.gathered_start(gathered)
            found["training"] = works.training_of_a_part(fast, rank)
            torch.save(found, folder / f"two{rank}")
            torch.save(ending(folder, fast, rank), folder / "ending")
    elif cases == "nccl":
        with joined(folder, 2, "nccl") as rank:
            torch.save(two(folder, rank)[0], folder / f"two{rank}")
    else:
        with joined(folder, 2, "nccl", seconds=15) as rank:
            os.write(2, lost(folder, load(folder, "llama"), rank)[-1].encode())
            os._exit(0)  # what else is to be ended would wait for the other rank


if __name__ == "__main__":
    with showing(False):  # a line of progress for each plan takes a thread
        is_rank, given = "RANK" in os.environ, (Path(sys.argv[1]), sys.argv[2])
        main(*given) if is_rank else forked(*given, 4)
