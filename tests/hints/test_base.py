from __future__ import annotations

import pytest
import torch

from sparda_compile.hints import HINTS


def test_every_hint_is_registered_under_its_name():
    assert [hint.name for hint in HINTS] == list(HINTS.names())


@pytest.mark.slow
def test_wrong_hint_changes_what_is_fetched_and_not_what_is_computed(lab):
    prompt = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(0))
    wrong = {layer: -weight for layer, weight in lab.forecast.items()}
    logits, fetched = [], []
    for module in (
        lab.module(mode="query"),
        lab.module(mode="exact"),
        lab.module(mode="exact", forecast=wrong),
        lab.module(mode="exact", hint="previous_layer"),
    ):
        out = module.generate(
            prompt,
            max_new_tokens=20,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits.append(torch.cat(out.logits))
        fetched.append(module.sparda.stats().total.h2d_bytes)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    assert len(set(fetched)) == 4
    assert min(fetched) == fetched[0] > 0
