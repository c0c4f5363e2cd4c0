"""Programs of a benchmark compiled ahead, several at a time, into Inductor's own cache.

Compiling takes most of the time that a benchmark has, on one core, while the GPU waits. Here each
program is compiled by a process of its own:

    model     every weight a view of one buffer: a compiler looks at shapes alone, and so many
              processes fit one GPU
    program   as `sparda bench decode` builds it; not run, so that no KV cache is made

A benchmark that builds the same program later finds it in the cache, on the same GPU, with the same
versions and the same code of this package.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.bench.decode import VARIANTS, DecodeSetting, build_variant
from sparda_compile.bench.shapes import SHAPES, ModelShape, build_model
from sparda_compile.errors import ConfigError
from sparda_compile.program.captures import Captures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

__all__ = ["Target", "build_hollow_model", "compile_apart", "compile_here"]


@dataclasses.dataclass(frozen=True)
class Target:
    """One program to compile.

    Attributes:
        shape: A key of `SHAPES`.
        batch_size: Sequences.
        variant: One of `decode.VARIANTS`.
        max_tokens: Tokens per sequence that the KV cache holds.
    """

    shape: str
    batch_size: int
    variant: str
    max_tokens: int

    def __post_init__(self) -> None:
        """Check the names."""
        if self.variant not in VARIANTS:
            raise ConfigError(
                f"variant {self.variant} is not known; use one of {', '.join(VARIANTS)}."
            )

    def __str__(self) -> str:
        """Return what a progress line says."""
        return f"{self.shape} batch {self.batch_size} {self.variant}"


def build_hollow_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model of that shape whose weights are all views of one buffer."""
    model: Any = build_model(shape, torch.device("meta"), dtype)
    most = max(weight.numel() for weight in model.parameters())
    buffer = torch.randn(most, device=device).mul_(0.02).to(dtype)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            view = buffer[: weight.numel()].view(weight.shape)
            setattr(module, name, torch.nn.Parameter(view))
    rotary = model.model.rotary_emb
    with torch.device(device):
        model.model.rotary_emb = type(rotary)(model.config)
    hollow: nn.Module = model.eval()
    return hollow


def compile_here(targets: Sequence[Target], device: str, say: Callable[[str], None]) -> None:
    """Compile programs one after another in this process."""
    captures: dict[str, Captures] = {}
    for target in targets:
        if target.shape not in captures:
            say(f"building and tracing {target.shape}")
            shape = SHAPES[target.shape]
            model = build_hollow_model(shape, torch.device(device), torch.bfloat16)
            captures[target.shape] = Captures(model, {})
        say(f"compiling {target}")
        setting = DecodeSetting(target.batch_size, target.max_tokens)
        build_variant(captures[target.shape], target.variant, setting).compile()


def compile_apart(
    targets: Sequence[Target], jobs: int, say: Callable[[str], None]
) -> list[tuple[Target, float, str | None]]:
    """Compile each program in a process of its own, `jobs` of them at a time.

    Args:
        targets: What to compile.
        jobs: Processes at a time; they share the cores.
        say: Told of each that has ended.

    Returns:
        Seconds of each, and the end of what it printed if it failed.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}

    def run(target: Target) -> tuple[Target, float, str | None]:
        command = [sys.executable, "-m", "sparda_compile", "bench", "compile", "--jobs", "1"]
        command += ["--shape", target.shape, "--batch", str(target.batch_size)]
        command += ["--variant", target.variant, "--tokens", str(target.max_tokens)]
        begin = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        seconds = round(time.perf_counter() - begin, 1)
        failure = None if done.returncode == 0 else (done.stderr + done.stdout)[-2000:]
        say(f"{target} {'failed after' if failure else 'took'} {seconds} s")
        return target, seconds, failure

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, targets))
