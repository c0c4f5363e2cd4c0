"""Time one Forecast training step against its floor; prints JSON.

    python benchmarks/train_forecast.py --tokens 32768 --out result.json

The floor is one forward pass of the same backbone, as transformers runs it, plus the FLOPs of one
pass of Q K^T over the visible pairs (the teacher; over pooled keys for `--teacher query`) at the
rate of a large matrix product on the same device. `ratio` is the step's time over the floor.
Weights are random and are made on the device; before timing, the fused teacher is compared with the
plain one on a short sequence. With a selector on low-bit keys both teachers compare queries with
every key, and it is the gradient of the fused loss that is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from sparda_compile import SpardaConfig
from sparda_compile.bench.shapes import ModelShape, build_model
from sparda_compile.environment import describe, write_result
from sparda_compile.training.mass_loss import backward_mass_loss, scores_low_bit_keys
from sparda_compile.training.teacher import aligned_teacher, fine_keys
from sparda_compile.training.trainer import ForecastTrainer


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=73448)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--teacher", choices=("attention", "query"), default="attention")
    parser.add_argument("--selector", default="infllm2", help="whose summary a Forecast scores")
    parser.add_argument("--forecast-heads", type=int, default=1, help="for each KV head [1]")
    parser.add_argument("--recall-queries", type=int, default=64)
    parser.add_argument("--backend", choices=("auto", "plain", "triton"), default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--commit", help="of the code that runs [default: what git says]")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def build(args, device, dtype):
    """Make the model on the device; no weight passes through CPU memory."""
    torch.manual_seed(0)
    shape = ModelShape(
        args.layers, args.hidden, args.ffn, args.heads, args.groups, args.head_dim, args.vocabulary
    )
    return build_model(shape, device, dtype)


def check_fused(args, config, device, dtype):
    """Return how far fused and plain are apart on a short sequence; None if nothing is fused."""
    if args.backend == "plain" or (args.backend == "auto" and device.type != "cuda"):
        return None
    check = check_gradient if scores_low_bit_keys(config) else check_teacher
    return check(args, config, device, dtype)


def check_gradient(args, config, device, dtype):
    """Return the difference between the two gradients, relative to their norm."""
    config = config.replace(local_blocks=1)
    query = torch.randn(1, 777, args.heads, args.head_dim, device=device).to(dtype).transpose(1, 2)
    shape = (1, args.groups * args.forecast_heads, 777, args.head_dim)
    forecast = torch.randn(shape, device=device).to(dtype)
    key = torch.randn(1, args.groups, 777, args.head_dim, device=device).to(dtype)
    found = []
    for backend in ("plain", "triton"):
        leaf = forecast.clone().requires_grad_()
        scale = args.head_dim**-0.5
        backward_mass_loss(
            leaf, query, key, config, scale, teacher=args.teacher, backend=backend
        )  # fmt: skip
        found.append(leaf.grad.float())
    difference = float((found[0] - found[1]).norm() / found[0].norm())
    if not difference < 1e-2:
        raise SystemExit(f"the fused loss is wrong (relative difference {difference}): no time")
    return difference


def check_teacher(args, config, device, dtype):
    """Return the largest difference between the two teachers."""
    del config
    shape = (1, 777, args.heads, args.head_dim)
    query = torch.randn(shape, device=device).to(dtype).transpose(1, 2)
    key = torch.randn(1, args.groups, 777, args.head_dim, device=device).to(dtype)
    inputs = (query, fine_keys(key), range(300, 777), (32, 16), args.head_dim**-0.5)
    plain, fused = (aligned_teacher(*inputs, backend=b) for b in ("plain", "triton"))
    difference = float((plain - fused).abs().max() / plain.abs().max())
    if not difference < 1e-3:
        raise SystemExit(f"the fused teacher is wrong (relative difference {difference}): no time")
    return difference


def median_s(run, device, repeats):
    """Return the median and all times of a call in seconds, after two calls to warm up."""
    times = []
    for number in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times), times


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device, dtype, size):
    """Return FLOP/s of a square matrix product."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds, _ = median_s(lambda: a @ b, device, 10)
    return 2 * size**3 / seconds


def main():
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    config = SpardaConfig(selector=args.selector, forecast_heads=args.forecast_heads)
    difference = check_fused(args, config, device, dtype)
    model = build(args, device, dtype)
    ids = torch.randint(0, args.vocabulary, (1, args.tokens), device=device)

    @torch.no_grad()
    def forward():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)

    forward_s, forward_times = median_s(forward, device, args.repeats)
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    pairs = args.tokens * (args.tokens + 1) // 2
    is_pooled = args.teacher == "query" and not scores_low_bit_keys(config)
    keys = pairs // config.pool_stride if is_pooled else pairs
    teacher_flops = 2 * args.layers * args.heads * args.head_dim * keys
    trainer = ForecastTrainer(
        model, config, 5e-4, recall_queries=args.recall_queries, teacher=args.teacher,
        backend=args.backend,
    )  # fmt: skip
    backbone_s, _ = median_s(lambda: trainer.run(ids, None), device, args.repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reports = []
    step_s, step_times = median_s(lambda: reports.append(trainer.step([ids])), device, args.repeats)
    is_cuda = device.type == "cuda"
    floor_s = forward_s + teacher_flops / rate
    result = {
        "shape": {name: v for name, v in vars(args).items() if name not in ("out", "commit")},
        "step_s": step_s,
        "step_times_s": step_times,
        "forward_s": forward_s,
        "forward_times_s": forward_times,
        "tapped_backbone_s": backbone_s,
        "teacher_flops": teacher_flops,
        "matmul_tflops": rate / 1e12,
        "floor_s": floor_s,
        "ratio": step_s / floor_s,
        "tokens_per_s": args.tokens / step_s,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else None,
        "loss": reports[-1].loss,
        "fused_difference": difference,
    }
    if args.out:
        write_result(args.out, result, args.commit)
    print(json.dumps({"environment": describe(args.commit), **result}, indent=1))


if __name__ == "__main__":
    main()
