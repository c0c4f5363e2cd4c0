"""Count what hints guess of the blocks that a model reads on a text; writes JSON.

    python benchmarks/predict_text.py MODEL --text prose=GPL-3.txt --out result.json

MODEL is a folder that transformers' `save_pretrained` wrote, with its tokenizer, or smollm2. A text
is read densely up to 64 tokens before its context ends. These, and the steps behind them, are
decode steps fed with the text's own tokens: each reads the blocks that its query selects. The 64
begin the levels of the predictors, and calibrate one of them; the others count. `pages` counts what
mode `exact` would fetch with each hint, `early` or `late`, over the blocks read. Texts that the
result has from another run are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from sparda_compile import SpardaConfig
from sparda_compile.cli.targets import load_target, load_tokenizer
from sparda_compile.environment import write_result
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.guesses import GuessSums, block_mask, num_first_steps
from sparda_compile.evaluation.reading import read_ahead
from sparda_compile.evaluation.run import budget_config
from sparda_compile.forecast.weights import load_forecast
from sparda_compile.kernels.calibrate import CALIBRATION_WINDOW
from sparda_compile.kernels.mixture import learn_reference, mix_reference
from sparda_compile.kernels.predict_blocks import update_prediction_reference
from sparda_compile.training.trainer import ForecastTrainer


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with its tokenizer, or smollm2")
    parser.add_argument("--text", action="append", required=True, help="name=file")
    parser.add_argument("--context", type=int, default=6144, help="tokens before the steps")
    parser.add_argument("--steps", type=int, default=200, help="decode steps that count")
    parser.add_argument("--share", type=float, action="append", help="of the blocks [0.1, 0.25]")
    parser.add_argument("--selector", action="append", help="[infllm2]")
    parser.add_argument("--local-blocks", type=int, default=2)
    parser.add_argument("--forecast", type=Path, help="weights of a Forecast that guesses, too")
    parser.add_argument(
        "--forecast-heads", type=int, help="an untrained one guesses, of so many for each KV head"
    )
    parser.add_argument("--device", default="cpu", help="cpu runs in float32 [cpu]")
    parser.add_argument("--commit", help="of the code that runs [default: what git says]")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


# Hints of mode `exact`, in the order in which they fetch.
HINTS = {
    "none": (),
    "ema": ("ema",),
    "next_query": ("next_query",),
    "ema, then next_query": ("ema", "next_query"),
    "mixture": ("mixture",),
}


class Pages:
    """Blocks on the pages of one layer, as mode `exact` has them: the oldest ones leave.

    What its hints name is fetched early, what else is selected late; both over the blocks read.
    """

    def __init__(self, config):
        self.config = config
        self.layers = {}
        self.num_seen = {}
        self.counts = {name: [0, 0, 0] for name in HINTS}

    def add(self, number, scores, read_BGN, lengths_B):
        if "next_query" not in scores:
            return
        own, asked = scores["query"], scores["next_query"]
        never = torch.full_like(own, float("-inf"))
        fresh = (never, torch.zeros_like(never), never.new_zeros(*never.shape[:2], 2), {})
        level, trend, mixture, pages = self.layers.setdefault(number, fresh)
        self.num_seen[number] = self.num_seen.get(number, 0) + 1
        ranked = {
            "ema": level,
            "next_query": asked,
            "mixture": mix_reference(asked, level, mixture),
        }
        config = self.config
        choice = (config.block_size, config.sink_blocks, config.local_blocks)
        num_selected = config.num_selected(own.shape[-1])
        named = {
            name: block_mask(each, lengths_B, (num_selected, *choice))[0]
            for name, each in ranked.items()
        }
        most = math.ceil(num_selected * config.page_ratio)
        for name, hints in HINTS.items():
            for group, read_N in enumerate(read_BGN[0]):
                held = pages.setdefault((name, group), {})
                time_now, current = self.num_seen[number], int(lengths_B) // config.block_size
                early = sum(
                    bring(held, named[hint][group], most, time_now, current) for hint in hints
                )
                late = bring(held, read_N, most, time_now, current)
                if self.num_seen[number] > CALIBRATION_WINDOW:
                    for i, count in enumerate((early, late, int(read_N.sum()))):
                        self.counts[name][i] += count
        learn_reference(own, asked, level, lengths_B, mixture, choice)
        update_prediction_reference(own, level, trend, (config.ema_level, config.ema_trend))

    def shares(self):
        return {
            name: {"early": round(early / read, 4), "late": round(late / read, 4)}
            for name, (early, late, read) in self.counts.items()
        }


def bring(held, wanted_N, most, now, current):
    """Give blocks a page, those longest unused leave; return how many had to be fetched."""
    ids = torch.where(wanted_N)[0].tolist()
    new = [block for block in ids if block not in held]
    held.update(dict.fromkeys((block for block in ids if block in held), now))
    for block in new:
        if len(held) >= most:
            others = (each for each in held if each not in ids and each != current)
            del held[min(others, key=held.get)]
        held[block] = now
    return sum(block != current for block in new)


class Watchers:
    """Counts of a predictor that is calibrated, and of all others, over the same steps."""

    def __init__(self, config, *, has_forecast):
        names = ["ema", "next_query", "mixture", *(["forecast"] if has_forecast else [])]
        self.plain = GuessSums(names, config)
        self.calibrated = GuessSums(["ema"], config.replace(ema_calibrate=True))
        self.pages = Pages(config)
        self.names = self.plain.names
        # Levels begin as they do behind a prompt: the plain ones from fewer tokens.
        self.skipped = CALIBRATION_WINDOW - num_first_steps(config)
        self.num_seen = {}

    def begin(self):
        self.plain.begin()
        self.calibrated.begin()

    def add(self, number, scores, *step):
        self.num_seen[number] = self.num_seen.get(number, 0) + 1
        if self.num_seen[number] > self.skipped:
            self.plain.add(number, scores, *step)
        self.pages.add(number, scores, *step)
        # Both speak of the layers in which everyone guesses: not of the first one.
        if "next_query" in scores:
            self.calibrated.add(number, scores, *step)

    def guesses(self):
        """Return what each found, by its name."""
        found = [(guess.name, guess) for guess in self.plain.guesses()]
        calibrated = (guess for guess in self.calibrated.guesses() if guess.name == "ema")
        return found + [("ema_calibrated", guess) for guess in calibrated]


def perplexity(logits_SV, ids_S):
    """Return the perplexity of tokens by the logits that predict them."""
    return float(F.cross_entropy(logits_SV, ids_S).exp())


def shares_of(found):
    """Return coverage and precision by name and budget: over all layers, and by layer."""
    by_name = {}
    for name, guess in found:
        budget = by_name.setdefault(name, {}).setdefault(f"{guess.budget:g}", {"by_layer": {}})
        if guess.layer is None:
            budget |= {
                part: round(getattr(guess, part), 4)
                for part in ("coverage", "precision", "fetched")
            }
        else:
            budget["by_layer"][str(guess.layer)] = round(guess.coverage, 3)
    return by_name


def forecast_of(args, model):
    """Return the Forecast that guesses: a file's, one that nobody has trained, or None."""
    if args.forecast and args.forecast_heads is not None:
        raise SystemExit("--forecast knows its heads; leave --forecast-heads out.")
    if args.forecast:
        return load_forecast(args.forecast)
    if args.forecast_heads is None:
        return None
    # Where it starts depends on no selector; several heads are trained for few.
    config = SpardaConfig(selector="lowbit2", forecast_heads=args.forecast_heads)
    return ForecastTrainer(model, config, 1e-3).forecast()


def measure(args, model, ids_1T, name, say):
    """Yield a row for each selector and share of the blocks."""
    begin = args.context - CALIBRATION_WINDOW
    forecast = forecast_of(args, model)
    reading, dense_1SV = read_ahead(model, ids_1T[:, :-1], begin)
    after_S = ids_1T[0, args.context + 1 :]
    say(f"{name}: {args.context} tokens read")
    for selector in args.selector or ("infllm2",):
        base = SpardaConfig(
            mode="query", selector=selector, top_k=None, local_blocks=args.local_blocks
        )
        for share in args.share or (0.1, 0.25):
            config = budget_config(base, args.context + args.steps, share)
            watchers = Watchers(config, has_forecast=forecast is not None)
            decoded = decode(
                model, reading, ids_1T[:, begin:-1], config, guesses=watchers, forecast=forecast
            )
            say(f"{name}: {selector}, {100 * share:g}% of the blocks")
            yield {
                "text": name,
                "selector": selector,
                "share": share,
                "num_blocks": -(-(args.context + args.steps) // config.block_size),
                "num_forced": config.num_forced,
                "num_scored": config.top_k,
                "block_size": config.block_size,
                "perplexity": {
                    "dense": perplexity(dense_1SV[0, CALIBRATION_WINDOW:], after_S),
                    "selected": perplexity(decoded.logits_BSV[0, CALIBRATION_WINDOW:], after_S),
                },
                "guesses": shares_of(watchers.guesses()),
                "pages": watchers.pages.shares(),
            }


def main():
    args = parse()
    start = time.perf_counter()

    def say(text):
        print(f"{time.perf_counter() - start:6.0f} s  {text}", flush=True)

    model = load_target(args.model).eval()
    model = (model.float() if args.device == "cpu" else model).to(args.device)
    tokenizer = load_tokenizer(args.model)
    head = {"model": Path(args.model).name, "context": args.context, "steps": args.steps}
    if args.forecast:
        head["forecast"] = args.forecast.name
    if args.forecast_heads is not None:
        head["forecast_heads"] = args.forecast_heads
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for text in args.text:
        name, _, path = text.partition("=")
        needed = args.context + args.steps + 1
        ids_1T = tokenizer(Path(path).read_text(), return_tensors="pt").input_ids[:, :needed]
        ids_1T = ids_1T.to(args.device)
        if ids_1T.shape[1] < needed:
            raise SystemExit(f"{path} has {ids_1T.shape[1]} tokens; use a text of {needed} or more")
        with torch.no_grad():
            new = list(measure(args, model, ids_1T, name, say))
        rows = [row for row in rows if row["text"] != name] + new
        write_result(args.out, {"name": "predict_text", **head, "rows": rows}, args.commit)


if __name__ == "__main__":
    main()
