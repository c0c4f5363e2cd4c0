from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.cases import Budget, make_cases
from sparda_compile.evaluation.text.oracle import oracle_selector

BASE = SpardaConfig(mode="query", top_k=None, block_size=16, local_blocks=1)


QUARTER = (Budget(share=0.25),)


def cases(*bases, budgets=QUARTER, prefills=("dense",), oracle=False):
    with oracle_selector():
        return make_cases(bases, 320, budgets, prefills, oracle=oracle)


def test_budgets():
    # 320 tokens are 20 blocks, of which sink, local and current ones are 3.
    assert Budget(share=0.25).config(BASE, 320).top_k == 2
    assert Budget(top_k=4).config(BASE, 320).top_k == 4
    assert [str(Budget(share=0.125)), str(Budget(top_k=4))] == ["12.5%", "top 4"]
    with pytest.raises(ConfigError, match="fewer than the 3 that are always read"):
        Budget(share=0.1).config(BASE, 320)


def test_every_configuration_at_every_budget_and_prompt():
    bases = [BASE, BASE.replace(mode="exact", selector="quest", hint=("ema", "next_query"))]
    budgets = (Budget(share=0.25), Budget(top_k=4))
    found = cases(*bases, budgets=budgets, prefills=("dense", "sparse"), oracle=True)
    assert [case.name for case in found] == [
        f"{name} {budget}{ending}"
        for budget in ("25%", "top 4")
        for name, endings in (
            ("oracle", [""]),
            ("query infllm2", ["", ", sparse prompt"]),
            ("exact quest by ema+next_query", ["", ", sparse prompt"]),
        )
        for ending in endings
    ]
    by_name = {case.name: case.config for case in found}
    assert by_name["query infllm2 25%, sparse prompt"].prefill == "sparse"
    assert by_name["query infllm2 25%"].prefill == "dense"
    oracle = by_name["oracle top 4"]
    assert (oracle.mode, oracle.selector, oracle.top_k) == ("query", "oracle", 4)


def test_who_selects_for_a_prompt_is_named():
    base = BASE.replace(selector="lowbit2", prefill_selector="infllm2")
    found = cases(base, prefills=("dense", "sparse"))
    names = ["query lowbit2 25%", "query lowbit2 25%, sparse prompt by infllm2"]
    assert [case.name for case in found] == names


def test_candidates_of_a_prompt_are_named():
    base = BASE.replace(selector="lowbit2", prefill_candidates=1.5)
    found = cases(base, prefills=("dense", "sparse"), oracle=True)
    names = [
        "oracle 25%",
        "query lowbit2 25%",
        "query lowbit2 25%, sparse prompt of 1.5x candidates",
    ]
    assert [case.name for case in found] == names


def test_mode_dense_has_no_budget():
    budgets = (Budget(share=0.25), Budget(share=0.5))
    (case,) = cases(BASE.replace(mode="dense"), budgets=budgets, prefills=("dense", "sparse"))
    assert (case.name, case.config.mode, case.config.prefill) == ("module, dense", "dense", "dense")
