"""Measure what selectors cost a model on texts, by an optimized module; writes JSON.

    python benchmarks/select_text.py MODEL --text prose=GPL-3.txt --out result.json

MODEL is a folder that transformers' `save_pretrained` wrote, with its tokenizer. The model reads
the context densely, once for all; its keys and values go to a cache of each module
(`new_cache(past=...)`). Decode steps behind it are fed with the text's own tokens, and what each
predicts is compared with the dense model: perplexity, KL in nats, equal first choices. Rows that
the result has from another run are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sparda_compile import SpardaConfig, optimize
from sparda_compile.environment import write_result

LOCAL_BLOCKS = 2


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with its tokenizer")
    parser.add_argument("--text", action="append", required=True, help="name=file")
    parser.add_argument("--context", type=int, default=5744, help="tokens before the steps")
    parser.add_argument("--steps", type=int, default=192, help="decode steps that count")
    parser.add_argument("--top-k", type=int, action="append", help="blocks by score [6, 20]")
    parser.add_argument("--mode", default="query", choices=["query", "forecast", "exact"])
    parser.add_argument("--selector", action="append", help="[infllm2, lowbit2, lowbit4]")
    parser.add_argument("--commit", help="of the code that runs [default: what git says]")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def step_logits(fast, keys_values, ids, context):
    """Return the logits of every step, [S, V]."""
    past = DynamicCache([(k.clone(), v.clone()) for k, v in keys_values])
    cache = fast.new_cache(past=past)
    steps = ids[:, context:-1].split(1, dim=1)
    return torch.stack([fast(step, past_key_values=cache).logits[0, -1] for step in steps])


def compared(logits, dense, targets):
    """Return what a selection did to the predictions of some tokens."""
    ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return {
        "perplexity": float(F.cross_entropy(logits, targets).exp()),
        "kl": float(kl.mean()),
        "kl_p90": float(kl.quantile(0.9)),
        "top1": float((logits.argmax(-1) == dense.argmax(-1)).float().mean()),
    }


@torch.no_grad()
def measure(model, name, ids, sha256, args, result):
    """Add the rows of a text to a result."""
    out = model(ids[:, : args.context], use_cache=True, logits_to_keep=1)
    keys_values = [
        (layer.keys.clone(), layer.values.clone()) for layer in out.past_key_values.layers
    ]
    dense = model(ids[:, args.context : -1], past_key_values=out.past_key_values).logits[0]
    targets, fast = ids[0, args.context + 1 :], None
    plain = float(F.cross_entropy(dense, targets).exp())
    result["texts"][name] = {"sha256": sha256, "perplexity": plain}
    known = {(row["text"], row["mode"], row["selector"], row["top_k"]) for row in result["rows"]}
    for top_k in args.top_k or [6, 20]:
        for selector in args.selector or ["infllm2", "lowbit2", "lowbit4"]:
            if (name, args.mode, selector, top_k) in known:
                continue
            config = SpardaConfig(
                mode=args.mode, selector=selector, top_k=top_k, local_blocks=LOCAL_BLOCKS,
                lowering="eager", offload="never",
            )  # fmt: skip
            fast = optimize(fast or model, config)
            row = {
                "text": name,
                "mode": args.mode,
                "selector": selector,
                "top_k": top_k,
                "num_read": config.num_forced + top_k,
                "num_blocks": -(-(ids.shape[1] - 1) // config.block_size),
                **compared(step_logits(fast, keys_values, ids, args.context), dense, targets),
            }
            result["rows"].append(row)
            print(row, flush=True)
            write_result(args.out, result, commit=args.commit)


def main():
    args = parse()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result = {"name": "select_text", "model": Path(args.model).name, "texts": {}, "rows": []}
    result |= {"context": args.context, "steps": args.steps}
    if args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
        result |= {name: found[name] for name in ("texts", "rows")}
    for each in args.text:
        name, _, file = each.partition("=")
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.context + args.steps + 1]
        if ids.shape[1] <= args.context + args.steps:
            raise SystemExit(f"{file} has {ids.shape[1]} tokens; take a longer text")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        measure(model, name, ids, sha256, args, result)


if __name__ == "__main__":
    main()
