"""One fresh process of `sparda bench start`: from the first import to the tokens of each prompt.

    imports -> model (not counted) -> optimize -> for each scenario: first use, the same again

What is found is handed on piece by piece, so that a process which is stopped loses only what it
was at. Importing this module imports neither torch nor transformers: that is measured.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import ConfigError, DevicePoolFullError, HostPoolFullError
from sparda_compile.progress import stage_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparda_compile.progress import StageTimes

__all__ = ["TOKENS", "Job", "Scenario", "Stopwatch", "main", "run_job"]

# A name for each new token; its time is that after the one before.
TOKENS: Final = ("first", "second", "third", "fourth")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Prompts of one call.

    Attributes:
        batch_size: Sequences.
        num_tokens: Tokens of each prompt.
    """

    batch_size: int
    num_tokens: int

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return f"{self.batch_size}x{self.num_tokens}"

    @classmethod
    def parse(cls, text: str) -> Scenario:
        """Return the scenario of a text such as 4x1024.

        Raises:
            ConfigError: If it is none.
        """
        batch_size, x, num_tokens = text.partition("x")
        if not (x and batch_size.isdecimal() and num_tokens.isdecimal()):
            raise ConfigError(
                f"--scenario {text} is not known; use sequences x tokens of a prompt, such as "
                "4x1024."
            )
        found = cls(int(batch_size), int(num_tokens))
        if min(found.batch_size, found.num_tokens) < 1:
            raise ConfigError(f"--scenario {text} is empty; use 1 or more of both.")
        return found


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        program: `sparda`, `dynamic` or `static`: transformers' caches.
        shape: A key of `SHAPES`.
        num_layers: Decoder layers of the model.
        device: `cpu` or `cuda`.
        mode: As in SpardaConfig.
        lowering: As in SpardaConfig.
        scenarios: In order, each as `Scenario.parse` reads it.
    """

    program: str
    shape: str
    num_layers: int
    device: str
    mode: str
    lowering: str
    scenarios: tuple[str, ...]


def main() -> None:
    """Do the job of the command line: JSON of a `Job`, a file for what is found, when it began."""
    begun = time.time()
    job, path, asked = sys.argv[1:4]
    with Path(path).open("a", encoding="utf-8", buffering=1) as file:

        def tell(found: dict[str, Any]) -> None:
            file.write(json.dumps(_rounded(found)) + "\n")

        tell({"import_s": {"python": begun - float(asked)}})
        run_job(Job(**json.loads(job)), tell)


def run_job(job: Job, tell: Callable[[dict[str, Any]], None]) -> None:
    """Do a job in this process.

    Args:
        job: What to do.
        tell: Given `import_s`, `model_s`, `optimize` and then `scenario` after `scenario`.
    """
    tell({"import_s": dict(_imports(job))})
    import torch

    from sparda_compile.bench.timing import wait_for

    device = torch.device(job.device)
    begin = time.perf_counter()
    model = _build(job)
    wait_for(device)
    tell({"model_s": time.perf_counter() - begin})
    if job.program == "sparda":
        with stage_times() as times:
            begin = time.perf_counter()
            model = _optimize(model, job)
            wait_for(device)
            seconds = time.perf_counter() - begin
        tell({"optimize": {"total_s": seconds, **_stages(times), **_compilations(model)}})
    for index, text in enumerate(job.scenarios):
        found: dict[str, Any] = {"scenario": text}
        try:
            found |= _measure(model, job, Scenario.parse(text), seed=index)
        except (torch.OutOfMemoryError, DevicePoolFullError, HostPoolFullError) as error:
            found["skipped"] = f"out of memory: {str(error).splitlines()[0]}"
        _free(job.device)
        tell(found | _compilations(model))


def _imports(job: Job) -> Iterator[tuple[str, float]]:
    """Import what a user of the program imports; yields names and seconds."""
    begin = time.perf_counter()
    import torch  # noqa: F401

    yield "torch", time.perf_counter() - begin
    begin = time.perf_counter()
    from transformers import LlamaForCausalLM  # noqa: F401 - the module itself is lazy

    yield "transformers", time.perf_counter() - begin
    if job.program == "sparda":
        begin = time.perf_counter()
        from sparda_compile import optimize  # noqa: F401

        yield "sparda_compile", time.perf_counter() - begin


def _build(job: Job) -> Any:
    """Return the model on its device: bf16 on a GPU, fp32 on a CPU."""
    import torch

    from sparda_compile.bench.shapes import SHAPES, build_model

    shape = dataclasses.replace(SHAPES[job.shape], num_layers=job.num_layers)
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    torch.manual_seed(0)
    model: Any = build_model(shape, torch.device(job.device), dtype)
    # Random weights could name any token, also the one that ends a sequence.
    model.generation_config.eos_token_id = None
    return model


def _optimize(model: Any, job: Job) -> Any:
    from sparda_compile import SpardaConfig, optimize

    offload = "never" if job.mode == "speculate" else "always"
    config = SpardaConfig(mode=job.mode, lowering=job.lowering, offload=offload)  # type: ignore[arg-type]
    return optimize(model, config)


def _measure(model: Any, job: Job, scenario: Scenario, seed: int) -> dict[str, Any]:
    """Generate from one prompt, and from the same again."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (scenario.batch_size, scenario.num_tokens)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(job.device)
    settings: dict[str, Any] = {"cache_implementation": "static"} if job.program == "static" else {}
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {}
    for use in ("first_use", "repeat"):
        with stage_times() as times:
            found[use] = _generate(model, ids, settings)
        found[use] |= _stages(times)
    if job.device == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return found


class Stopwatch:
    """A streamer for any batch size: notes when each token is on the CPU."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.has_prompt = False

    def put(self, tokens: Any) -> None:
        """Take in the prompt, and then the next token of each sequence."""
        del tokens
        if self.has_prompt:
            self.times.append(time.perf_counter())
        self.has_prompt = True

    def end(self) -> None:
        """Take in that there are no more."""


def _generate(model: Any, ids: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return seconds to each token after the one before, and of the whole call."""
    import torch

    from sparda_compile.bench.timing import wait_for

    wait_for(ids.device)
    watch = Stopwatch()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(TOKENS),
        do_sample=False,
        streamer=watch,
        **settings,
    )
    wait_for(ids.device)
    total = time.perf_counter() - watch.times[0]
    gaps = [after - before for before, after in pairwise(watch.times)]
    return {"token_s": dict(zip(TOKENS, gaps, strict=True)), "total_s": total}


def _stages(times: StageTimes) -> dict[str, Any]:
    return {"stage_s": times.seconds, "stage_counts": times.counts}


def _compilations(model: Any) -> dict[str, Any]:
    """Return how many programs the library has compiled so far, as it says it itself."""
    sparda = getattr(model, "sparda", None)
    return {} if sparda is None else {"num_compilations": sparda.num_compilations}


def _free(device: str) -> None:
    """Give back the memory of a call, so that none fails for what another one left."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _rounded(value: Any) -> Any:
    """Return plain data with its numbers as precise as they are: to a tenth of a millisecond."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value
