"""Further families of transformers: all blocks selected, each equals its original.

By default each family meets one attention implementation and three prompts, and each form that has
windows one more; with SPARDA_MATRIX=all in the environment every form of every family meets both
implementations, all prompts and, in its plain form, every mode.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.testing import FAMILIES, build_form

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparda_compile.testing.building import AttnImplementation

pytestmark = [
    pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

IS_FULL = os.environ.get("SPARDA_MATRIX") == "all"
MODES = ("query", "dense", "forecast", "exact") if IS_FULL else ("query",)
LENGTHS: tuple[tuple[int, ...], ...] = ((1,), (65,), (40, 65, 7))
if IS_FULL:
    LENGTHS = ((1,), (63,), (64,), (65,), (300,), (300, 65, 130))
NEW_TOKENS = 20 if IS_FULL else 3
# Share of the spread of the logits by which float32 may round otherwise.
ROUNDING = 2e-5


def cases() -> list[tuple[str, str, AttnImplementation]]:
    """Return family, form and attention implementation of each test."""
    found: list[tuple[str, str, AttnImplementation]] = []
    for number, (name, family) in enumerate(FAMILIES.items()):
        kinds = family.attentions
        if IS_FULL:
            found += [(name, form, attn) for form in ("", *family.forms) for attn in kinds]
            continue
        forms = [form for form in ("", *family.forms) if form in ("", "window")]
        found += [(name, form, kinds[(number + i) % len(kinds)]) for i, form in enumerate(forms)]
    return found


def prompts(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Return prompts side by side, padded on the left, and a mask where they differ in length."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        ids[row, width - length :] = torch.randint(0, 256, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask} if len(lengths) > 1 else {"input_ids": ids}


@torch.no_grad()
def answer(model: Any, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return greedy tokens [B, N] and the logits [B, N, V] that they were chosen by."""
    given = prompts(lengths)
    out = model.generate(
        **given, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, given["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    limit = ROUNDING * float(want.max() - want.min())
    far = float((got - want).abs().max())
    assert far < limit, f"{what}: logits are off by {far:.2g}, more than {limit:.2g}"


def assert_same_answer(model: nn.Module, fast: Any, lengths: tuple[int, ...]) -> None:
    """Fail unless logits agree, up to where a row chose another token of as good as equal rank."""
    tokens, logits = answer(fast, lengths)
    their_tokens, their_logits = answer(model, lengths)
    assert tokens.shape == their_tokens.shape
    for row in range(len(lengths)):
        same = (tokens[row] == their_tokens[row]).int().cumprod(0)
        until = min(int(same.sum()) + 1, NEW_TOKENS)
        assert_close(
            logits[row, :until], their_logits[row, :until], f"prompts of {lengths}, row {row}"
        )


# Forms meet mode query alone.
RUNS = [(mode, *case) for mode in MODES for case in cases() if mode == "query" or not case[1]]


@pytest.mark.parametrize(("mode", "name", "form", "attn"), RUNS)
def test_family_equals_its_original(
    name: str, form: str, attn: AttnImplementation, mode: str, models_page: Any
) -> None:
    model = build_form(name, form, attn_implementation=attn)
    config = SpardaConfig(
        mode=mode,  # type: ignore[arg-type]
        top_k=None,
        block_size=16 if form else 64,
        lowering="eager",
        max_tokens=512,
    )
    fast = optimize(model, config)
    for lengths in LENGTHS:
        assert_same_answer(model, fast, lengths)
    given = prompts(LENGTHS[-1])
    real = given["attention_mask"].bool()
    with torch.no_grad():
        assert_close(fast(**given).logits[real], model(**given).logits[real], "one forward")
    if not form:
        sites = fast.programs.latest_plan("decode").sites
        row = models_page.rows()[type(model).__name__]
        assert row[3] == models_page.sites(sites), "write docs/models.md: SPARDA_UPDATE_GOLDEN=1"


def test_every_family_is_tried() -> None:
    assert {name for name, _, _ in cases()} == FAMILIES.keys()
    assert len(FAMILIES) >= 12
