"""Train the small model that the package ships: it looks things up in up to 16K tokens and more.

A Llama (or, with --arch qwen3, a Qwen3) learns the tasks of `sparda_compile.evaluation` from
scratch. Retrieval is learned fast where each sequence asks many questions and only the answers
count, so a training sequence is a haystack with up to 64 questions behind it; sequences are short
at first, and positions jump between records, so that distances of 32K tokens are met from the
start. Stages end when they are mastered. Everything is written under --out, and a second call
with the same --out goes on where the first one stopped:

    python examples/train_small_model.py --out runs/small --max-minutes 8          one GPU
    python examples/train_small_model.py --out runs/toy --preset toy               one CPU core
    python examples/train_small_model.py --out runs/more --start DIR --pooled-loss 1 --budget 0.1
    python examples/train_small_model.py --out runs/f --model DIR --forecast-steps 600
    sparda eval runs/more/model --mode query --mode forecast --forecast runs/f/forecast.safetensors

Afterwards `--out` holds model/config.json, model/model.safetensors (fp16), summary.json, log.jsonl
and checkpoint.pt. `--start DIR` begins with the weights of a model that was trained before, at the
long stages, each to its end. With `--budget` the questions of most long sequences attend to no more
than that share of the blocks; with `--drop-evidence` a share of these misses the answer's block in
all layers that look it up but the last. `--forecast-steps N` also trains the Forecast,
forecast.safetensors; with --model it does so for a model that was trained before.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shlex
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_model_recipe import (
    GOALS,
    OTHERS,
    PRESETS,
    Stage,
    answer_logits,
    attention_losses,
    build_model,
    deployed,
    hidden_evidence,
    lookups,
    other_task,
    training_positions,
)
from torch.nn import functional as F

from sparda_compile.evaluation.haystack import Maker
from sparda_compile.evaluation.tasks import make_batch
from sparda_compile.evaluation.vocabulary import NUM_KEYS


class Run:
    """Everything that a checkpoint holds."""

    def __init__(self, args):
        self.args = args
        self.preset = dataclasses.replace(PRESETS[args.preset], pool_size=args.pool_size)
        self.device = torch.device(args.device)
        self.is_cuda = self.device.type == "cuda"
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = build_model(self.preset, args.arch, args.seed).to(self.device)
        decay = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
            lr=self.preset.learning_rate, betas=(0.9, 0.98), fused=self.is_cuda,
        )  # fmt: skip
        self.stage_id, self.step, self.elapsed = 0, 0, 0.0
        if (self.out / "checkpoint.pt").exists():
            self.resume()
        elif args.start:
            self.model.load_state_dict(load_model(args.start, torch.float32).state_dict())
            self.stage_id = next(i for i, s in enumerate(self.preset.stages) if self.is_long(s))
        # A fresh generator for each start: a resumed run does not see the first batches again.
        self.generator = torch.Generator(self.device).manual_seed(1000 * self.step + args.seed)
        self.rng = random.Random(1000 * self.step + args.seed)

    def is_long(self, stage):
        return stage.length >= self.preset.stages[-1].length / 3

    def resume(self):
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage_id, self.step, self.elapsed = state["stage"], state["step"], state["elapsed"]
        say(f"resumed at step {self.step}, stage {self.stage_id}, {self.elapsed:.0f} s")

    def save(self):
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stage": self.stage_id,
            "step": self.step,
            "elapsed": self.elapsed,
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        os.replace(partial, self.out / "checkpoint.pt")

    def autocast(self):
        if self.is_cuda:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def learning_rate(self, progress):
        warmup = min(1.0, (self.step + 1) / 100)
        decay = min(1.0, max((1.0 - progress) / 0.3, 0.02))
        return self.args.learning_rate * warmup * decay

    def pick_stage(self):
        """Return the stage of this step: the present one, or one before it lest it be lost."""
        if self.stage_id > 1 and self.rng.random() < 0.25:
            return self.preset.stages[self.rng.randrange(1, self.stage_id)]
        return self.preset.stages[self.stage_id]

    def train_step(self, stage, progress):
        """Return the losses of answers and blocks, and the share of right answers.

        None if the step was not one of lookups.
        """
        maker = Maker(stage.batch_size, stage.length, self.generator)
        is_lookup = self.rng.random() >= stage.other_tasks
        if is_lookup:
            batch = lookups(stage, maker, self.rng, self.args.full_share)
        else:
            batch = other_task(maker, self.rng)
        jump = self.rng.random() < stage.jumps
        positions = training_positions(batch.ids_BT, self.preset.max_position, jump, self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress)
        extra = []
        layers = self.model.model.layers

        asked = (batch.answer_positions_A - 1).expand_as(batch.evidence_BA)
        pool_size = self.preset.pool_size

        def watch(number, x, rotation):
            """Tie names to values in the first layer, and find them in the lookup layers."""
            if not batch.copies:
                return
            found = batch.evidence_BA
            if number == 0:
                pairs = attention_losses(layers[0], x, rotation, found, found - 1, pool_size, 1)
            elif number in self.preset.lookup_layers:
                pairs = attention_losses(layers[number], x, rotation, asked, found, pool_size)
            else:
                return
            weights = (self.args.attention_loss, self.args.pooled_loss)
            extra.extend(zip(weights, pairs, strict=True))

        is_sparse = self.is_long(stage) and self.rng.random() < self.args.sparse_share
        config = deployed(self.preset, stage.length, self.args.budget if is_sparse else None)
        hidden = {}
        if self.args.drop_evidence and is_lookup and config is not None:
            places = hidden_evidence(batch, self.args.drop_evidence, self.generator)
            hidden = dict.fromkeys(self.preset.lookup_layers[:-1], places)
        with self.autocast():
            logits = answer_logits(self.model, batch, positions, watch, config, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answers_BA.flatten())
        (loss + sum(weight * part for weight, part in extra)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        right = (logits.detach().argmax(-1) == batch.answers_BA).float().mean()
        # The last pair is that of the last lookup layer.
        return (loss.detach(), extra[-1][1].detach(), right) if is_lookup else None


def train(run):
    args, preset = run.args, run.preset
    limit = 60.0 * args.max_minutes
    before, start = run.elapsed, time.perf_counter()
    last_save = last_print = start
    recent = collections.deque(maxlen=40)
    while run.elapsed < limit:
        present = preset.stages[run.stage_id]
        stage = run.pick_stage()
        found = run.train_step(stage, run.elapsed / limit)
        if stage is present and found is not None:
            recent.append(torch.stack(found))
        run.step += 1
        if run.step % 20 or not recent:
            continue
        mean_loss, blocks_loss, accuracy = torch.stack(list(recent)).mean(0).tolist()
        now = time.perf_counter()
        run.elapsed = before + now - start
        status = (
            f"{run.elapsed:6.0f} s  step {run.step:6d}  length {present.length:6d}  "
            f"loss {mean_loss:.4f}  blocks {blocks_loss:.3f}  answers {100 * accuracy:5.1f}%"
        )
        if now - last_print > args.print_seconds:
            last_print = now
            say(status)
        is_last = run.stage_id == len(preset.stages) - 1
        is_mastered = accuracy > preset.mastered and len(recent) == recent.maxlen
        is_mastered &= not args.start
        if not is_last and (is_mastered or run.elapsed > present.end * limit):
            say(status + "  stage done")
            run.stage_id += 1
            recent.clear()
        if now - last_save > args.save_seconds:
            samples = preset.eval_samples // 4
            scores = evaluate(run, preset.eval_lengths, samples)
            log(run, {"scores": scores | evaluate_sparse(run, samples)})
            run.save()
            last_save = time.perf_counter()
            before -= last_save - now  # Testing and saving are not training time.
    run.save()


@torch.no_grad()
def evaluate(run, lengths, samples, tasks=GOALS, budget=None):
    """Return the share of sequences with every answer right, by task, length and budget."""
    run.model.eval()
    scores = {}
    for task in tasks:
        for length in lengths:
            size = max(1, min(samples, 2**18 // length if run.is_cuda else 16))
            config = deployed(run.preset, length, budget)
            right = []
            for seed in range(-(-samples // size)):
                batch = make_batch(task, batch_size=size, length=length, seed=10_000 + seed)
                batch = dataclasses.replace(
                    batch,
                    ids_BT=batch.ids_BT.to(run.device),
                    answer_positions_A=batch.answer_positions_A.to(run.device),
                )
                positions = torch.arange(length, device=run.device).expand_as(batch.ids_BT)
                with run.autocast():
                    logits = answer_logits(run.model, batch, positions, config=config)
                right += (logits.argmax(-1) == batch.answers_BA).all(1).tolist()
            name = f"{task}@{length}" + (f" {100 * budget:g}%" if config else "")
            scores[name] = sum(right) / len(right)
    run.model.train()
    say("        " + "  ".join(f"{name} {100 * score:.1f}" for name, score in scores.items()))
    return scores


def evaluate_sparse(run, samples):
    """Return what `evaluate` does, with the budget, for the lengths that it is large enough for."""
    budget = run.args.budget
    lengths = [n for n in run.preset.eval_lengths if deployed(run.preset, n, budget)]
    return evaluate(run, lengths, samples, budget=budget) if lengths else {}


def export(run, scores):
    """Write config and fp16 weights, with the command in their metadata."""
    folder = run.out / "model"
    folder.mkdir(exist_ok=True)
    run.model.config.save_pretrained(folder)
    weights = {
        name: tensor.detach().to(torch.float16).contiguous().cpu()
        for name, tensor in run.model.state_dict().items()
        if name != "lm_head.weight"
    }
    metadata = {
        "format": "pt",
        "command": shlex.join(["python", "examples/train_small_model.py", *sys.argv[1:]]),
        "seed": str(run.args.seed),
        "steps": str(run.step),
        "torch": torch.__version__,
    }
    save_file(weights, folder / "model.safetensors", metadata=metadata)
    size = (folder / "model.safetensors").stat().st_size
    summary = metadata | {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "bytes": size,
        "seconds": round(run.elapsed, 1),
        "device": torch.cuda.get_device_name() if run.is_cuda else "cpu",
        "scores": scores,
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(f"wrote {folder}: {summary['parameters']} parameters, {size / 1e6:.1f} MB")


def load_model(folder, dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def train_forecast(run, folder):
    """Train the Forecast on the questions of sequences as long and as full as those measured."""
    from sparda_compile import train_forecast as train_projections
    from sparda_compile.training.checkpoint import checkpoint_path

    preset = run.preset
    # Only half precision has a fast attention kernel on a GPU, and bfloat16 keeps small gradients.
    model = load_model(folder, torch.bfloat16 if run.is_cuda else torch.float32)

    def token_batches():
        while True:
            tokens = run.rng.choice(preset.forecast_lengths)
            maker = Maker(preset.forecast_batch, tokens, run.generator)
            stage = Stage(tokens, preset.forecast_batch, NUM_KEYS, preset.forecast_queries, 1.0)
            yield lookups(stage, maker, run.rng, run.args.full_share).ids_BT

    def on_step(report):
        if report.step % 50 == 0 or report.step == 1:
            parts = "  ".join(
                f"{layer}: {report.losses[layer]:.3f} {100 * report.recalls[layer]:.0f}%"
                for layer in report.losses
            )
            say(f"{report.seconds:.3f} s  step {report.step:6d}  loss and recall by layer  {parts}")
            log(run, dataclasses.asdict(report))

    out = run.out / "forecast.safetensors"
    steps, rate = run.args.forecast_steps, run.args.forecast_rate
    # The last third is slow, so that what it ends with is no longer shaken.
    for last, lr in ((max(1, 2 * steps // 3), rate), (steps, rate / 5)):
        train_projections(
            model.to(run.device).eval(),
            token_batches(),
            config=deployed(preset, preset.forecast_lengths[0], run.args.budget or 0.1),
            steps=last,
            lr=lr,
            last_tokens=3 * preset.forecast_queries,
            teacher=run.args.teacher,
            out=out,
            resume=checkpoint_path(out) if last == steps > 1 else None,
            save_every=steps,
            on_step=on_step,
            progress=False,
        )
    say(f"wrote {out}")


def log(run, entry):
    entry = {"step": run.step, "seconds": round(run.elapsed, 1)} | entry
    with (run.out / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def say(text):
    print(text, flush=True)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder that everything is written under")
    parser.add_argument("--arch", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full")
    parser.add_argument("--max-minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--print-seconds", type=float, default=10.0)
    parser.add_argument("--attention-loss", type=float, default=0.5)
    parser.add_argument("--pooled-loss", type=float, default=0.1)
    parser.add_argument("--full-share", type=float, default=0.25, help="of the fullest sequences")
    parser.add_argument("--budget", type=float, help="share of the blocks that questions attend to")
    parser.add_argument("--sparse-share", type=float, default=0.75, help="of the long sequences")
    parser.add_argument(
        "--drop-evidence", type=float, default=0.0, help="share of sparse lookups that miss it"
    )
    parser.add_argument("--pool-size", type=int, default=32, help="keys that a pooled key is of")
    parser.add_argument("--forecast-steps", type=int, default=0)
    parser.add_argument("--teacher", choices=("attention", "query"), default="attention")
    parser.add_argument("--forecast-rate", type=float, default=2e-3, help="its learning rate")
    parser.add_argument("--learning-rate", type=float, help="[default: the preset's]")
    parser.add_argument("--start", help="folder of a model to go on with")
    parser.add_argument("--model", help="folder of a trained model, instead of training one")
    args = parser.parse_args(arguments)
    if args.drop_evidence and len(PRESETS[args.preset].lookup_layers) < 2:
        parser.error(f"preset {args.preset} has one lookup layer, so none may miss the evidence")
    args.learning_rate = args.learning_rate or PRESETS[args.preset].learning_rate
    return args


def main():
    args = parse()
    torch.set_float32_matmul_precision("high")
    if args.device == "cpu":
        torch.set_num_threads(1)
    run = Run(args)
    if not args.model:
        train(run)
        # Once before it is tested, so that a run that is cut off leaves what it learned.
        export(run, {})
        scores = evaluate(run, run.preset.eval_lengths, run.preset.eval_samples)
        scores |= evaluate(run, run.preset.eval_lengths[-2:-1], 64, ("multi_query", *OTHERS))
        scores |= evaluate_sparse(run, run.preset.eval_samples)
        log(run, {"scores": scores})
        export(run, scores)
    if args.forecast_steps:
        train_forecast(run, args.model or run.out / "model")


if __name__ == "__main__":
    main()
