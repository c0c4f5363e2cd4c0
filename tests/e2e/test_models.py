"""Every family, every mode: a full budget generates the tokens of the original model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.testing import TINY_MODELS, tiny_llama

if TYPE_CHECKING:
    from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning")

MODES = ("dense", "query", "forecast", "exact")
PROMPTS = (1, 63, 64, 65, 700)
RAGGED = (700, 65, 130)
# Two blocks fill on the way, whatever the prompt.
NEW_TOKENS = 20
# One plain, one with sliding layers beside full ones.
EVERY_RUN = ("llama", "gemma3")
EAGER_LENGTHS = (RAGGED, (1,), (65,))
# Room for the longest prompt and its tokens, so that all prompts share two programs per batch.
CONFIG = SpardaConfig(
    mode="dense", top_k=None, block_size=16, lowering="eager", offload="always", max_tokens=768
)
# A difference this small, as a share of the spread of the logits, may go either way in fp32.
NEAR_TIE = 1e-4


@dataclasses.dataclass
class Answer:
    """Greedy tokens [B, N] and the logits [B, N, V] that they were chosen by."""

    tokens: Tensor
    logits: Tensor


@dataclasses.dataclass
class Subject:
    """A model, what became of it in each mode, and its own answers, each made once."""

    model: nn.Module
    modes: dict[str, Any]
    num_traced: int
    answers: dict[Any, Answer] = dataclasses.field(default_factory=dict)

    @property
    def dense(self) -> Any:
        return self.modes["dense"]

    def fast(self, mode: str) -> Any:
        if mode not in self.modes:
            self.modes[mode] = optimize(self.dense, CONFIG.replace(mode=mode))
        return self.modes[mode]

    def answer(self, lengths: tuple[int, ...], num_tokens: int) -> Answer:
        if (lengths, num_tokens) not in self.answers:
            self.answers[lengths, num_tokens] = reference(self.model, lengths, num_tokens)
        return self.answers[lengths, num_tokens]


def prompt(num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + num_tokens)
    return torch.randint(0, 256, (1, num_tokens), generator=generator)


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return prompts of these lengths side by side, padded on the left, and their mask."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length)[0]
        mask[row, width - length :] = 1
    return ids, mask


@torch.no_grad()
def reference(model: nn.Module, lengths: tuple[int, ...], num_tokens: int) -> Answer:
    """Return what the original answers; a module without `generate` answers row by row."""
    if not hasattr(model, "generate"):
        rows = [whole_forwards(model, prompt(length), num_tokens) for length in lengths]
        return Answer(torch.cat([r.tokens for r in rows]), torch.cat([r.logits for r in rows]))
    ids, mask = padded(lengths)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return Answer(out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1))


def whole_forwards(model: nn.Module, ids: Tensor, num_tokens: int) -> Answer:
    num_prompt, logits = ids.shape[1], []
    for _ in range(num_tokens):
        logits.append(model(ids)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return Answer(ids[:, num_prompt:], torch.stack(logits, dim=1))


def answer_of(fast: Any, lengths: tuple[int, ...], num_tokens: int) -> Tensor:
    ids, mask = padded(lengths)
    given = {"attention_mask": mask} if len(lengths) > 1 else {}
    out = fast.generate(ids, max_new_tokens=num_tokens, do_sample=False, **given)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    return out[:, ids.shape[1] :]


def assert_same_tokens(got: Tensor, want: Answer) -> None:
    """Fail unless rows agree, or first differ where the original itself was undecided."""
    assert got.shape == want.tokens.shape
    for row, (ours, theirs) in enumerate(zip(got.tolist(), want.tokens.tolist(), strict=True)):
        step = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), None
        )
        if step is None:
            continue
        logits = want.logits[row, step].double()
        best = logits.topk(2).values
        margin = float((best[0] - best[1]) / (logits.max() - logits.min()))
        assert margin < NEAR_TIE, (
            f"row {row} differs from step {step}: {ours[step]} is not {theirs[step]}, which led by "
            f"{margin:.2g} of the spread"
        )
        assert ours[step] == int(logits.topk(2).indices[1])


def subjects(names: tuple[str, ...], attn: str) -> list[Any]:
    return [pytest.param((name, attn), id=f"{name}-{attn}") for name in names]


# The plain module calls torch's attention whatever is asked for.
WITH_EAGER = tuple(name for name in TINY_MODELS if name != "plain")


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest, traced: Any) -> Subject:
    found = traced(*request.param)
    assert found.fast.sparda_config == CONFIG
    return Subject(found.model, {"dense": found.fast}, found.fast.sparda.num_captures)


def budget_runs() -> list[Any]:
    """Return every length in every mode for the families whose layers differ in kind.

    Every other family meets every mode and every length, and every mode meets every length in some
    of them: what happens to blocks hangs on mode and length, not on where a model's numbers are.
    """
    single = [(n,) for n in PROMPTS]
    runs = []
    for i, name in enumerate(TINY_MODELS):
        for j, mode in enumerate(MODES):
            few = [single[(i + 2 * j) % 5], single[(i + 2 * j + 1) % 5]]
            if j == i % len(MODES):
                few.append(RAGGED)
            every = [*single, RAGGED] if name in EVERY_RUN else few
            runs += [
                pytest.param((name, "sdpa"), mode, lengths, id=f"{name}-{mode}-{lengths}")
                for lengths in every
            ]
    return runs


@pytest.mark.parametrize(("subject", "mode", "lengths"), budget_runs(), indirect=["subject"])
def test_full_budget_generates_the_same_tokens(
    subject: Subject, mode: str, lengths: tuple[int, ...]
) -> None:
    got = answer_of(subject.fast(mode), lengths, NEW_TOKENS)
    assert_same_tokens(got, subject.answer(lengths, NEW_TOKENS))
    # A prefill and a decode, and what other tests of the worker had traced before.
    assert subject.dense.sparda.num_captures == max(subject.num_traced, 2)


@pytest.mark.parametrize("subject", subjects(tuple(TINY_MODELS), "sdpa"), indirect=True)
def test_page_says_which_attentions_are_found(subject: Subject, models_page: Any) -> None:
    sites = subject.fast("query").programs.latest_plan("decode").sites
    row = models_page.rows()[type(subject.model).__name__]
    assert row[3] == models_page.sites(sites), "write docs/models.md: SPARDA_UPDATE_GOLDEN=1"


# Those without a norm on their queries; phi3 and gpt2 have one projection for all three.
LINEAR_QUERIES = ("llama", "qwen2", "phi3", "glm4", "gpt2", "minicpm4", "plain")
QUERY_WEIGHTS = ("q_proj.weight", "qkv_proj.weight", "attn.c_attn.weight", "query.weight")


@pytest.mark.parametrize("subject", subjects(LINEAR_QUERIES, "sdpa"), indirect=True)
def test_untrained_forecast_is_the_mean_of_the_query_rows(subject: Subject) -> None:
    fast = subject.fast("forecast")
    for site in fast.programs.latest_plan("decode").sites:
        (rows,) = (
            weight.T if "c_attn" in name else weight
            for name, weight in subject.model.named_parameters()
            if f".{site.layer}." in name and name.endswith(QUERY_WEIGHTS)
        )
        heads = rows.detach()[: site.num_heads * site.head_dim].unflatten(0, (-1, site.head_dim))
        want = heads.unflatten(0, (site.num_groups, -1)).mean(1).flatten(0, 1)
        got = fast.state_dict()[f"sparda_forecast.{site.layer}"]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WITH_EAGER)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_eager_attention_becomes_the_same_program(
    traced: Any, rewrite: Any, name: str, phase: str
) -> None:
    """So what holds above for sdpa holds for eager: every mode, every prompt, ragged batches.

    Once attention is replaced, both forms leave the same ops on the same weights, and the same
    sites; the passes that follow look at nothing else. `rewrite` says what is compared.
    """
    sdpa, eager = (traced(name, attn) for attn in ("sdpa", "eager"))
    state = eager.model.state_dict()
    assert all(torch.equal(state[key], w) for key, w in sdpa.model.state_dict().items())
    ours, theirs = (rewrite(one.fast.captures, phase) for one in (eager, sdpa))
    assert ours.lines == theirs.lines
    assert {site.form for site in ours.sites} == {"eager"}


EAGER_RUNS = [
    pytest.param((name, "eager"), MODES[i % 4], EAGER_LENGTHS[i % 3], id=f"{name}-{MODES[i % 4]}")
    for i, name in enumerate(WITH_EAGER)
]


@pytest.mark.parametrize(("subject", "mode", "lengths"), EAGER_RUNS, indirect=["subject"])
def test_full_budget_with_eager_attention(
    subject: Subject, mode: str, lengths: tuple[int, ...]
) -> None:
    """Each family once: what the test above proves equal does run, and equals its own original."""
    got = answer_of(subject.fast(mode), lengths, NEW_TOKENS)
    assert_same_tokens(got, subject.answer(lengths, NEW_TOKENS))


@pytest.fixture(scope="module")
def llama() -> Any:
    return optimize(
        tiny_llama(), SpardaConfig(mode="query", top_k=4, lowering="eager", max_tokens=512)
    )


def test_prompt_lengths_share_programs(llama: Any) -> None:
    for num_tokens in (7, 33, 64, 100, 128, 2, 1):
        answer_of(llama, (num_tokens,), 3)
        assert llama.sparda.num_compilations == {"prefill": 1, "decode": 1}
    assert llama.sparda.num_captures == 2


def test_batch_sizes_share_captures(llama: Any) -> None:
    answer_of(llama, (7,), 2)
    before, num_captures = llama.sparda.num_compilations, llama.sparda.num_captures
    answer_of(llama, (5, 9), 2)
    answer_of(llama, (5, 9), 2)
    after = llama.sparda.num_compilations
    assert after == {phase: count + 1 for phase, count in before.items()}
    answer_of(llama, (5, 9, 7), 2)
    assert llama.sparda.num_captures == num_captures


def test_all_logits_need_a_program_and_a_capture_of_their_own(llama: Any) -> None:
    answer_of(llama, (7,), 2)
    fast = optimize(llama, SpardaConfig(mode="query", top_k=4, lowering="eager", max_tokens=512))
    answer_of(fast, (7,), 2)
    before, num_captures = fast.sparda.num_compilations, fast.sparda.num_captures
    for num_tokens in (7, 30):
        fast(prompt(num_tokens))
        assert fast.sparda.num_compilations == before | {"prefill": before["prefill"] + 1}
        assert fast.sparda.num_captures == num_captures + 1


def test_reserved_capacity_comes_in_few_sizes() -> None:
    fast = optimize(tiny_llama(), SpardaConfig(mode="query", lowering="eager"))
    before = fast.sparda.num_compilations
    for num_tokens in (7, 33, 64, 100, 128, 2):
        answer_of(fast, (num_tokens,), 3)
        assert fast.sparda.num_compilations == {p: n + 1 for p, n in before.items()}
    answer_of(fast, (600,), 3)
    assert fast.sparda.num_compilations == {p: n + 2 for p, n in before.items()}
    assert fast.sparda.num_captures == 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_gemma3_keeps_its_sliding_layers_dense(traced: Any, attn: str) -> None:
    gemma3 = traced("gemma3", attn)
    model, report = gemma3.model, explain(gemma3.fast, CONFIG)
    assert report.error == ""
    kinds = {"sliding_attention": "window", "full_attention": "sparse"}
    assert [site.kind for site in report.sites] == [kinds[k] for k in model.config.layer_types]
    assert [site.layer for site in report.dense_sites] == [0]
    for site in report.dense_sites:
        assert site.window == model.config.sliding_window
        assert "window" in site.reason
        assert str(site.window) in site.reason
    assert all(site.reason == "" and site.window == 0 for site in report.sparse_sites)
