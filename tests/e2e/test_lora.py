"""Adapters of PEFT: inside of a wrapper or of the model, each equals its original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import AttentionNotFoundError, UnsupportedInputError
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.program.plan import forecast_shapes
from sparda_compile.testing import UNSUPPORTED_MODELS, build, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Share of the spread of the logits by which float32 may round otherwise.
ROUNDING = 2e-5
NEW_TOKENS = 2


def lora(targets: Any = QKVO, **fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **fields)


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move all that an adapter trains, which begins where it changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype) * 0.1)
    return model.eval()


def adapted(config: Any, model: nn.Module | None = None) -> Any:
    return shaken(peft.get_peft_model(model if model is not None else tiny_llama(), config))


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Return prompts side by side, padded on the left."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(length)
        ids[row, -length:] = torch.randint(1, 256, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answer(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return greedy tokens and the logits that they were chosen by: one prefill, then decodes."""
    out = model.generate(
        **given, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


def assert_equal(model: Any, original: Any, mode: str = "query", *, lowering: str = "eager") -> Any:
    """Fail unless an optimized model answers as the original one does; returns it."""
    config = SpardaConfig(
        mode=mode,  # type: ignore[arg-type]
        top_k=None,
        block_size=16,
        lowering=lowering,  # type: ignore[arg-type]
        max_tokens=128,
    )
    fast = optimize(model, config)
    for given in (prompts(40), prompts(40, 65, 7)):
        tokens, logits = answer(fast, given)
        their_tokens, their_logits = answer(original, given)
        limit = ROUNDING * float(their_logits.max() - their_logits.min())
        torch.testing.assert_close(logits, their_logits, rtol=0, atol=limit)
        assert tokens.equal(their_tokens)
    return fast


def assert_matters(model: Any, base: Any) -> None:
    """Fail if an adapter changes nothing: then no test of it could fail."""
    given = prompts(9)
    with torch.no_grad():
        assert (model(**given).logits - base(**given).logits).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["dense", "query", "forecast", "exact"])
def test_lora_on_all_projections_equals_its_original_in_every_mode(mode: str) -> None:
    model = adapted(lora())
    assert_matters(model, tiny_llama())
    assert_equal(model, model, mode)


CASES: dict[str, Callable[[], Any]] = {
    "q": lambda: adapted(lora(["q_proj"])),
    "mlp": lambda: adapted(lora(["gate_proj", "up_proj", "down_proj"])),
    "dora": lambda: adapted(lora("all-linear", use_dora=True)),
    "rslora, bias, dropout": lambda: adapted(
        lora("all-linear", use_rslora=True, lora_bias=True, lora_dropout=0.5)
    ),
    "modules_to_save, bias": lambda: adapted(
        lora(modules_to_save=["lm_head", "embed_tokens"], bias="all")
    ),
    "phi3": lambda: adapted(lora(["qkv_proj"]), build("phi3")),
    "gpt2": lambda: adapted(lora(["c_attn"], fan_in_fan_out=True), build("gpt2")),
    "gpt2, dora": lambda: adapted(
        lora(["c_attn"], fan_in_fan_out=True, use_dora=True), build("gpt2")
    ),
    "loha": lambda: adapted(peft.LoHaConfig(r=4, target_modules=QKVO, init_weights=False)),
    "lokr": lambda: adapted(peft.LoKrConfig(r=4, target_modules=QKVO, init_weights=False)),
    "ia3": lambda: adapted(
        peft.IA3Config(
            target_modules=["q_proj", "k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    ),
    "vera": lambda: adapted(peft.VeraConfig(r=16, target_modules=["q_proj", "v_proj"])),
    "boft": lambda: adapted(peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"])),
    "oft": lambda: adapted(peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
    "adalora": lambda: adapted(
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_adapter_equals_its_original(name: str) -> None:
    model = CASES[name]()
    base = build(name[:4]) if name[:4] in ("phi3", "gpt2") else tiny_llama()
    assert_matters(model, base)
    assert_equal(model, model, "forecast" if name in ("dora", "phi3", "gpt2") else "query")


def test_adapter_without_a_wrapper_equals_its_original() -> None:
    # What add_adapter of transformers calls; transformers 5.24 itself asks for a later PEFT.
    model: Any = shaken(peft.inject_adapter_in_model(lora(), tiny_llama()))
    assert_matters(model, tiny_llama())
    assert_equal(model, model)


def test_model_inside_of_a_wrapper_equals_it() -> None:
    model = adapted(lora())
    assert_equal(model.base_model.model, model)


def test_several_adapters_at_once_or_one_of_them() -> None:
    model = adapted(lora())
    model.add_adapter("other", lora(["k_proj", "up_proj"]))
    first = answer(model, prompts(9))[1]
    model.base_model.set_adapter(["default", "other"])
    shaken(model, seed=2)
    assert (answer(model, prompts(9))[1] - first).abs().max() > 0.05
    assert_equal(model, model)
    model.set_adapter("other")
    assert_equal(model, model)


def test_disabled_and_merged_adapters() -> None:
    model = adapted(lora())
    with model.disable_adapter():
        assert_equal(model, tiny_llama())
    active = answer(model, prompts(9))[1]
    model.merge_adapter()
    assert_equal(model, model)
    torch.testing.assert_close(answer(model, prompts(9))[1], active, rtol=0, atol=1e-3)
    with (
        model.disable_adapter(),
        pytest.raises(UnsupportedInputError, match="merged adapter that is disabled"),
    ):
        optimize(model)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_adapters_in_float32_on_a_model_in_half_precision() -> None:
    model = adapted(lora(), tiny_llama().to(torch.bfloat16))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.dtype == (
        torch.float32
    )
    fast = optimize(model, SpardaConfig(mode="forecast", top_k=None, lowering="eager"))
    with torch.no_grad():
        given = prompts(9)
        assert fast(**given).logits.equal(model(**given).logits)
    assert {weight.dtype for weight in fast.sparda_forecast.values()} == {torch.bfloat16}


def test_wrapper_s_generation_config_is_used_and_the_model_keeps_its_own() -> None:
    model = adapted(lora())
    inner = model.get_base_model().generation_config
    model.generation_config = type(inner)(max_new_tokens=5, do_sample=False)
    fast = optimize(model, SpardaConfig(mode="query", top_k=None, lowering="eager"))
    assert fast.generate(**prompts(9)).shape == (1, 14)
    assert model.get_base_model().generation_config is inner


def test_forecast_starts_from_the_adapted_queries() -> None:
    def start(model: Any) -> Tensor:
        fast = optimize(model, SpardaConfig(mode="forecast", lowering="eager"))
        plan = fast.programs.latest_plan("decode")
        weights = initial_forecast(
            plan.stage("find_attention").graph,
            plan.sites,
            forecast_shapes(plan),
            plan.captured,
            torch.float32,
        )
        return torch.cat([weights[layer].product() for layer in sorted(weights)])

    active = start(model := adapted(lora()))
    with model.disable_adapter():
        disabled = start(model)
    torch.testing.assert_close(disabled, start(tiny_llama()))
    assert (active - disabled).abs().max() > 0.01
    torch.testing.assert_close(active, start(model.merge_and_unload()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "P_TUNING"),
        (lora(alora_invocation_tokens=[3, 4]), "activated LoRA"),
        (
            peft.PolyConfig(target_modules=["q_proj"], n_tasks=1, task_type="CAUSAL_LM"),
            "type POLY",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_the_input_or_each_call_is_refused_by_name(config: Any, word: str) -> None:
    model = adapted(config)
    with pytest.raises(UnsupportedInputError, match=word):
        optimize(model)
    assert word in explain(model).error


def test_new_adapter_whose_dropout_is_on_is_refused() -> None:
    model: Any = peft.inject_adapter_in_model(lora(lora_dropout=0.5), tiny_llama())
    assert not model.training
    with pytest.raises(UnsupportedInputError, match="drops values at random"):
        optimize(model)


def test_bottleneck_stays_a_bottleneck_with_an_adapter_on_it() -> None:
    model: Any = UNSUPPORTED_MODELS["deepseek_v3"][0]()
    adapted(lora(["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]), model)
    with pytest.raises(AttentionNotFoundError, match="multi-head latent attention"):
        optimize(model)


def test_names_of_adapters_for_each_prompt_are_refused() -> None:
    model = adapted(lora())
    fast = optimize(model, SpardaConfig(mode="query", lowering="eager"))
    with pytest.raises(UnsupportedInputError, match="adapter_names"):
        fast.generate(**prompts(9), adapter_names=["default"])
