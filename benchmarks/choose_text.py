"""Compare ways to choose the KV blocks that are read on a text; writes JSON.

    python benchmarks/choose_text.py MODEL --document news=NEWS.txt --calibrate other.txt \
        --out result.json

MODEL is a folder that transformers' `save_pretrained` wrote, with its tokenizer, or smollm2; it has
to be built as Llama is. A document is read densely, in the model's dtype, but for its last
`--scored` tokens. These are run at once in float32, layer by layer in plain PyTorch: each token
sees the blocks that a decode step at its position would choose, so the layers behind see what that
has cost. Texts to calibrate by are read alike: their ends give each layer and KV head its bits and
its budget, and do not count.

The ways to choose are in `choose_ways.py`. All read the first 64 tokens, the block being written,
128 tokens before it, and as many tokens of chosen blocks, whatever their size. Documents that the
result has from another run are kept.

Dimensions: L layers, G KV heads, R query heads of a group, T scored tokens, S all tokens, N blocks,
P tokens of a block, D head dim.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from choose_ways import (
    BLOCK,
    LOCAL_TOKENS,
    METHODS,
    NEVER,
    SHARES,
    SINK_TOKENS,
    Step,
    choose,
    low_bit,
    may_choose,
    oracle,
)
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparda_compile.cli.targets import load_target, load_tokenizer
from sparda_compile.environment import write_result
from sparda_compile.evaluation.text.intervals import ratio_estimate


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model with its tokenizer, or smollm2")
    parser.add_argument("--document", action="append", required=True, help="domain=file")
    parser.add_argument("--calibrate", action="append", type=Path, required=True, help="file")
    parser.add_argument("--tokens", type=int, default=6144, help="of each document")
    parser.add_argument("--scored", type=int, default=192, help="the last of them, that count")
    parser.add_argument("--method", action="append", choices=METHODS, help="[all]")
    parser.add_argument("--commit", help="of the code that runs [default: what git says]")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Text:
    """A document read densely: its keys and values, and what the model says of its end."""

    def __init__(self, reader, model, ids_1S, num_scored):
        self.model = model
        read = reader(ids_1S[:, : -num_scored - 1], use_cache=True, logits_to_keep=1)
        layers = (read.cache if "cache" in read else read.past_key_values).layers
        self.past = [(layer.keys[0].float(), layer.values[0].float()) for layer in layers]
        self.new, self.targets = ids_1S[:, -num_scored - 1 : -1], ids_1S[0, -num_scored:]
        self.dense = self.run(lambda step: None)

    def run(self, read, block=BLOCK):
        """Return log probabilities [T, V]; `read(step)` says which blocks, None: all."""
        model, num = self.model, self.new.shape[1]
        config, start = model.config, self.past[0][0].shape[1]
        positions = torch.arange(start, start + num)
        hidden = model.model.embed_tokens(self.new)
        cos, sin = model.model.rotary_emb(hidden, positions[None])
        causal = torch.arange(start + num) <= positions[:, None]
        for number, layer in enumerate(model.model.layers):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (
                each(normed).view(1, num, -1, config.head_dim).transpose(1, 2)
                for each in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            k, v = (
                torch.cat(pair, 1) for pair in zip(self.past[number], (k[0], v[0]), strict=True)
            )
            q = q[0].unflatten(0, (k.shape[0], -1))
            mask = read(Step(number, q, k, v, positions, block))
            seen = causal
            if mask is not None:
                seen = mask.repeat_interleave(block, -1)[..., : start + num] & causal
                seen = seen[:, None]
            k, v = (part[:, None].expand(*q.shape[:2], -1, -1) for part in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            hidden = hidden + attention.o_proj(out.flatten(0, 1).transpose(0, 1).flatten(1)[None])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.lm_head(model.model.norm(hidden))[0].log_softmax(-1)


def calibrate(texts, counts):
    """Return bits [L, G] and budgets [L, G] of other texts' attention, for each K of `counts`.

    Budgets fill in order of the mass that one more block brings, from best to worst block, until
    their sum is L * G * K. Bits go to the heads whose choice loses most mass with few.
    """
    curves, lost = {}, {}

    def watch(step):
        mass = oracle(step, None).masked_fill(~may_choose(step), 0.0) / step.q.shape[1]
        ordered = mass.sort(-1, descending=True).values
        curves.setdefault(step.layer, []).append(ordered.mean(1))
        for bits in (1, 2):
            near = low_bit(bits)(step, None).masked_fill(~may_choose(step), NEVER)
            order = near.argsort(-1, descending=True)
            for num in counts:
                found = mass.gather(-1, order[..., :num]).sum(-1)
                missing = (ordered[..., :num].sum(-1) - found).mean(1)
                lost.setdefault((bits, num), {}).setdefault(step.layer, []).append(missing)

    for text in texts:
        text.run(watch)

    def mean(by_layer):
        return torch.stack([torch.stack(by_layer[n]).mean(0) for n in sorted(by_layer)])

    gain_LGN = mean(curves)
    return {
        num: {
            "num_chosen": num,
            "by_head": filled(gain_LGN, num),
            "by_layer": filled(gain_LGN.sum(1, keepdim=True), num).expand(gain_LGN.shape[:2]),
            "bits_1_4": most(mean(lost[1, num]), 1 / 3, 4, 1),
            "bits_2_4": most(mean(lost[2, num]), 1 / 2, 4, 2),
        }
        for num in counts
    }


def filled(gain_LGN, chosen):
    """Return how many blocks each gets, [L, G], if the best gains count first; 1 or more."""
    first, rest = gain_LGN[..., :1], gain_LGN[..., 1:]
    total = (chosen - 1) * first.numel()
    border = rest.flatten().sort(descending=True).values[total - 1]
    return 1 + (rest >= border).sum(-1)


def most(lost_LG, share, many, few):
    """Return `many` bits for the share of heads that lose most, `few` for the others, [L, G]."""
    border = lost_LG.flatten().sort(descending=True).values[round(share * lost_LG.numel()) - 1]
    return torch.where(lost_LG >= border, many, few)


def measure(text, name, share, tuned):
    """Return what one way to choose costs one document."""
    method = METHODS[name]
    factor = BLOCK // method.block
    layers, groups = len(text.past), text.past[0][0].shape[0]
    num_LG = torch.full((layers, groups), tuned["num_chosen"] * factor)
    if method.budgets:
        num_LG = tuned[method.budgets]
    log_probs = text.run(
        lambda step: choose(step, method.score(step, tuned), num_LG[step.layer]), method.block
    )
    kl = (text.dense.exp() * (text.dense - log_probs)).sum(-1)
    return {
        "method": name,
        "share": share,
        "nll": float(F.nll_loss(log_probs, text.targets, reduction="sum")),
        "kl": float(kl.sum()),
        "top1": int((log_probs.argmax(-1) == text.dense.argmax(-1)).sum()),
    }


def rows_of(documents):
    """Return a row for each way and share, over all documents, with 95% intervals over them."""
    rows = []
    keys = {(case["method"], case["share"]): None for doc in documents for case in doc["cases"]}
    for name, share in keys:
        held = [
            (doc, {(case["method"], case["share"]): case for case in doc["cases"]})
            for doc in documents
        ]
        held = [(doc, cases) for doc, cases in held if (name, share) in cases]
        counts = [doc["scored"] for doc, _ in held]
        mine = [cases[name, share] for _, cases in held]
        other = [cases.get(("lowbit2", share)) for _, cases in held]
        row = {"method": name, "share": share, "documents": len(held)}
        row["kl"] = estimate([case["kl"] for case in mine], counts)
        ratio = [case["nll"] - doc["nll"] for case, (doc, _) in zip(mine, held, strict=True)]
        row["perplexity"] = math.exp(sum(case["nll"] for case in mine) / sum(counts))
        row["ratio"] = [math.exp(each) for each in estimate(ratio, counts)]
        row["top1"] = estimate([case["top1"] for case in mine], counts)
        if name != "lowbit2" and all(other):
            less = [case["kl"] - base["kl"] for case, base in zip(mine, other, strict=True)]
            row["kl_minus_lowbit2"] = estimate(less, counts)
        by_domain = {}
        for case, (doc, _) in zip(mine, held, strict=True):
            by_domain.setdefault(doc["domain"], []).append(case["kl"] / doc["scored"])
        row["kl_by_domain"] = {key: sum(each) / len(each) for key, each in by_domain.items()}
        rows.append(row)
    return rows


def estimate(sums, counts):
    found = ratio_estimate(sums, counts)
    return [found.value, found.low, found.high]


@torch.no_grad()
def main():
    args = parse()
    start = time.perf_counter()

    def say(words):
        print(f"{time.perf_counter() - start:6.0f} s  {words}", flush=True)

    reader, tokenizer = load_target(args.model).eval(), load_tokenizer(args.model)
    model = copy.deepcopy(reader).float()

    def read(path):
        raw = path.read_bytes()
        ids_1S = tokenizer(raw.decode(errors="ignore"), return_tensors="pt").input_ids
        if ids_1S.shape[1] < args.tokens + 1:
            raise SystemExit(f"{path} has {ids_1S.shape[1]} tokens; use more than {args.tokens}")
        return Text(reader, model, ids_1S[:, : args.tokens + 1], args.scored), raw

    num_blocks = -(-args.tokens // BLOCK)
    forced = (SINK_TOKENS + LOCAL_TOKENS) // BLOCK + 1
    chosen = {share: math.ceil(share * num_blocks) - forced for share in SHARES}
    saved = args.out.with_suffix(".calibration.pt")
    if not saved.exists():
        texts = (read(path)[0] for path in args.calibrate)
        torch.save(calibrate(texts, tuple(chosen.values())), saved)
    tuned = {share: torch.load(saved)[num] for share, num in chosen.items()}
    say(f"budgets and bits of {len(args.calibrate)} texts")
    head = {"model": Path(args.model).name, "tokens": args.tokens, "num_blocks": num_blocks}
    head["chosen"] = {str(share): num for share, num in chosen.items()}
    for share in SHARES:
        head[f"calibrated_{share}"] = {
            key: each.tolist() for key, each in tuned[share].items() if torch.is_tensor(each)
        }
    documents = json.loads(args.out.read_text())["documents"] if args.out.exists() else []
    for given in args.document:
        domain, _, path = given.partition("=")
        document = next((each for each in documents if each["name"] == Path(path).name), None)
        done = {(case["method"], case["share"]) for case in document["cases"]} if document else ()
        todo = [
            (name, share)
            for share in SHARES
            for name in args.method or METHODS
            if share in METHODS[name].shares and (name, share) not in done
        ]
        if not todo:
            continue
        text, raw = read(Path(path))
        if document is None:
            document = {"name": Path(path).name, "domain": domain, "scored": args.scored}
            document |= {"sha256": hashlib.sha256(raw).hexdigest(), "cases": []}
            document["nll"] = float(F.nll_loss(text.dense, text.targets, reduction="sum"))
            documents.append(document)
        for name, share in todo:
            document["cases"].append(measure(text, name, share, tuned[share]))
        say(f"{domain}: {len(todo)} cases")
        result = {"name": "choose_text", **head, "rows": rows_of(documents)}
        write_result(args.out, {**result, "documents": documents}, args.commit)


if __name__ == "__main__":
    main()
