"""Mode `exact` beside `query` on the real model: logits of every step, bit by bit; prints JSON.

A document's first tokens are read, then both modes go on greedily for the same number of steps.
Hints are `ema` and the Forecast that the package ships, the selector is `lowbit2`, and pages are
so few that hints and selections fetch in most steps. `make real-model` installs the model.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from real_text import options, read, result_of

from sparda_compile import SpardaConfig, optimize

CASES: dict[str, dict[str, Any]] = {
    "query": {"mode": "query"},
    "exact": {"mode": "exact", "hint": ("ema", "forecast")},
}


def main() -> None:
    """Run both modes and compare them."""
    given = options(__doc__.splitlines()[0])
    model, ids, forecast = read(given)
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
    result = result_of(given, "exact_on_text", rows=rows, steps_that_differ=int(differs.sum()))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
