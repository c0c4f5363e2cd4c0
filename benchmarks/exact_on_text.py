"""Mode `exact` beside `query` on the real model: logits of every step, bit by bit; prints JSON.

A document's first tokens are read, then both modes go on greedily for the same number of steps.
Hints are `ema` and the Forecast that the package ships, the selector is `lowbit2`, and pages are
so few that hints and selections fetch in most steps. `make real-model` installs the model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.cli.real_model import forecast_file, load_real_model, load_real_tokenizer
from sparda_compile.environment import describe
from sparda_compile.forecast.weights import load_forecast

CASES: dict[str, dict[str, Any]] = {
    "query": {"mode": "query"},
    "exact": {"mode": "exact", "hint": ("ema", "forecast")},
}


def main() -> None:
    """Run both modes and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--commit")
    given = parser.parse_args()
    tokenizer, model = load_real_tokenizer(), load_real_model()
    model = model.to(given.device, getattr(torch, given.dtype))
    text = given.document.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"])[None, : given.tokens].to(given.device)
    path = forecast_file(Path("smollm2"))
    assert path is not None
    forecast = load_forecast(path)
    logits, rows = {}, {}
    for name, case in CASES.items():
        config = SpardaConfig(
            selector="lowbit2", local_blocks=2, top_k=2, page_ratio=1.5, offload="always",
            max_tokens=-(-(given.tokens + given.steps) // 64) * 64, lowering=given.lowering, **case,
        )  # fmt: skip
        fast = optimize(model, config, forecast=forecast if config.needs_forecast else None)
        began = time.perf_counter()
        out = fast.generate(
            ids, max_new_tokens=given.steps, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        logits[name] = torch.stack(out.logits)
        stats = fast.sparda.stats()
        rows[name] = {
            "seconds": round(time.perf_counter() - began, 1),
            "stats": str(stats).splitlines()[0],
        }
    differs = (logits["query"] != logits["exact"]).flatten(1).any(1)
    result = {
        "environment": describe(given.commit),
        "name": "exact_on_text",
        "settings": {k: v for k, v in vars(given).items() if k not in ("document", "commit")},
        "document": given.document.name,
        "rows": rows,
        "steps_that_differ": int(differs.sum()),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
