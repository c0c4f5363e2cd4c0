"""All blocks read, beside the model itself, on the real model: tokens of a text; prints JSON.

The model goes on greedily behind a document's first tokens. Each mode then reads the same text, a
token a step, and says at each step which token it would take: where it says another, the gap
between the model's two best logits is noted. `make real-model` installs the model.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from real_text import options, read, result_of

from sparda_compile import SpardaConfig, optimize

if TYPE_CHECKING:
    from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "query": {"mode": "query"},
    "forecast": {"mode": "forecast"},
    "exact": {"mode": "exact", "hint": ("ema", "forecast")},
}


def main() -> None:
    """Let the model go on, and ask each mode what it would say."""
    given = options(__doc__.splitlines()[0])
    model, ids, forecast = read(given)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=given.steps, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    own = torch.stack(out.logits)[:, 0].float()
    blocks = -(-(given.tokens + given.steps) // 64)
    rows = {}
    for name, case in CASES.items():
        config = SpardaConfig(
            selector="lowbit2", local_blocks=2, top_k=blocks, offload="always",
            max_tokens=64 * blocks, lowering=given.lowering, **case,
        )  # fmt: skip
        fast = optimize(model, config, forecast=forecast if config.needs_forecast else None)
        began = time.perf_counter()
        found = said(fast, out.sequences, given.tokens)
        rows[name] = compared(own, found) | {"seconds": round(time.perf_counter() - began, 1)}
    result = result_of(given, "budget_on_text", rows=rows)
    print(json.dumps(result, indent=1))


def said(fast: Any, ids: Tensor, num_tokens: int) -> Tensor:
    """Return the logits [S, V], float32, of a prompt's last token and of each step but the last.

    Args:
        fast: An optimized module.
        ids: [1, T + S], the prompt and what the model went on with.
        num_tokens: T.
    """
    cache = fast.new_cache()
    turns = [ids[:, :num_tokens], *ids[:, num_tokens:-1].split(1, 1)]
    with torch.no_grad():
        outs = [fast(turn, past_key_values=cache, logits_to_keep=1) for turn in turns]
    return torch.stack([out.logits[0, -1] for out in outs]).float()


def compared(own: Tensor, found: Tensor) -> dict[str, Any]:
    """Return how far apart two runs' logits [S, V] are, and the steps at which tokens differ."""
    differs = own.argmax(-1) != found.argmax(-1)
    best = own.topk(2).values
    return {
        "largest_difference": float((own - found).abs().max()),
        "steps_that_differ": [
            {"step": step, "gap": float(best[step, 0] - best[step, 1])}
            for step in differs.nonzero()[:, 0].tolist()
        ],
        "least_gap_of_the_others": float((best[:, 0] - best[:, 1])[~differs].min()),
    }


if __name__ == "__main__":
    main()
