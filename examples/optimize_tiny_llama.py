"""Optimize a tiny random Llama, generate with it, and look at what was done to it.

Runs on a CPU in seconds and downloads nothing: python examples/optimize_tiny_llama.py
"""

from __future__ import annotations

import torch

import sparda_compile
from sparda_compile.testing import tiny_llama

PROMPT = b"SparDA keeps the keys and values of a long context in CPU memory. " * 12


def main() -> None:
    # Any causal LM of transformers will do, such as AutoModelForCausalLM.from_pretrained(folder).
    model = tiny_llama()
    ids = torch.tensor([list(PROMPT)])
    truth = model.generate(ids, max_new_tokens=12, do_sample=False)

    # Every block is read: the tokens are the model's own. lowering="eager" skips the compiler.
    config = sparda_compile.SpardaConfig(mode="query", top_k=None, lowering="eager")
    fast = sparda_compile.optimize(model, config)
    out = fast.generate(ids, max_new_tokens=12, do_sample=False)
    print("all blocks, same tokens:", torch.equal(out, truth))

    # A small budget; an optimized module is rebuilt for it without tracing the model again.
    fast = sparda_compile.optimize(fast, config.replace(top_k=2, local_blocks=1))
    fast.generate(ids, max_new_tokens=12, do_sample=False)
    print("small budget:", fast.sparda.stats())
    print("times traced:", fast.sparda.num_captures)

    print(sparda_compile.explain(fast, fast.sparda_config, max_tokens=1024))


if __name__ == "__main__":
    main()
