"""What is done to a model after `optimize` is followed, or refused by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ModelChangedError, UnsupportedInputError
from sparda_compile.module.version import Version
from sparda_compile.testing import build, tiny_llama

CONFIG = SpardaConfig(mode="dense", lowering="eager", block_size=16)
IDS = torch.randint(2, 256, (1, 9), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 3, "do_sample": False}


class Scaled(nn.Module):
    def forward(self, x):
        return x * 2


def attention(model):
    return model.model.layers[0].self_attn


def refused(version, words):
    with pytest.raises(ModelChangedError, match=words) as caught:
        version.check(thorough=True)
    assert "optimize" in str(caught.value)


def assign(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def set_data(model):
    attention(model).q_proj.weight.data = torch.ones(64, 64)


def edit_values(model):
    model.model.rotary_emb.inv_freq.data.mul_(2)


def add_layer(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def replace_hooks(model):
    model.model.norm._forward_hooks = {0: lambda *_: None}


CHANGES = {
    "a hook": (lambda m: m.model.layers[1].register_forward_hook(print), "layers.1 has other"),
    "a pre-hook": (
        lambda m: m.model.layers[0].register_forward_pre_hook(print), "layers.0 has other"
    ),
    "a hook of the model": (lambda m: m.register_forward_hook(print), "the model has other"),
    "a table of hooks": (replace_hooks, "norm has other forward hooks"),
    "a scale": (lambda m: setattr(attention(m), "scaling", 1.0), "self_attn.scaling is 1.0"),
    "what attention functions read": (
        lambda m: setattr(attention(m), "is_causal", False), "is_causal is False, it was True"
    ),
    "an epsilon": (
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5), "norm.variance_epsilon is 0.5"
    ),
    "a layer less": (lambda m: m.model.layers.pop(-1), "layers.1 was removed"),
    "a layer more": (add_layer, "layers.2 was added"),
    "another head": (
        lambda m: setattr(m, "lm_head", nn.Linear(64, 256, bias=False)), "lm_head was replaced"
    ),
    "another parameter": (
        lambda m: setattr(attention(m).q_proj, "weight", nn.Parameter(torch.ones(64, 64))),
        "parameter model.layers.0.self_attn.q_proj.weight was replaced",
    ),
    "a bias": (
        lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(256))), "lm_head.bias was"
    ),
    "a state dict that is assigned": (
        lambda m: m.load_state_dict(assign(m.state_dict()), assign=True), "parameter .* replaced"
    ),
    "other memory": (set_data, "q_proj.weight was replaced or moved"),
    "another dtype": (lambda m: m.to(torch.bfloat16), r"torch.bfloat16 .* it was .* torch.float32"),
    "another buffer": (
        lambda m: m.model.rotary_emb.register_buffer("inv_freq", torch.ones(8)), "inv_freq"
    ),
    "values of a buffer": (lambda m: m.model.rotary_emb.inv_freq.mul_(2), "inv_freq has other"),
    "values behind data": (edit_values, "inv_freq has other values"),
    "training": (lambda m: m.train(), "training is True, it was False"),
    "training of a layer": (lambda m: m.model.norm.train(), "norm.training is True"),
    "a forward": (lambda m: setattr(m.model.norm, "forward", print), "forward of model.norm"),
    "a forward of the model": (lambda m: setattr(m, "forward", print), "forward of the model"),
    "an implementation": (lambda m: m.set_attn_implementation("eager"), "_attn_implementation"),
    "a config": (lambda m: setattr(m.config, "num_hidden_layers", 1), "num_hidden_layers is 1"),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m.lm_head, "weight", Scaled()),
        "ParametrizedLinear",
    ),
    "pruning": (lambda m: prune.l1_unstructured(m.lm_head, "weight", 0.5), "lm_head"),
    "another class": (lambda m: setattr(m.model.norm, "__class__", nn.Identity), "is a Identity"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_result_is_refused_by_name(model, name):
    version = Version(model)
    version.check(thorough=True)
    change, words = CHANGES[name]
    change(model)
    refused(version, words)
    refused(version, words)


NOTICED_IN_ANY_STEP = sorted(CHANGES.keys() - {"a table of hooks", "values behind data"})


@pytest.mark.parametrize("name", NOTICED_IN_ANY_STEP)
def test_a_decode_step_notices_all_but_what_memory_alone_tells(model, name):
    version = Version(model)
    CHANGES[name][0](model)
    with pytest.raises(ModelChangedError):
        version.check()


def test_a_step_of_generate_looks_at_hooks(model):
    version = Version(model)
    version.check_hooks()
    hook = model.model.norm.register_forward_hook(print)
    with pytest.raises(ModelChangedError, match="norm has other"):
        version.check_hooks()
    hook.remove()
    version.check_hooks()


SWITCHES = {
    "a list": (lambda a: a._active.clear(), r"lm_head._active is \[\]"),
    "a dict": (lambda a: a.scales.update(one=3.0), "lm_head.scales.one is 3.0, it was 2.0"),
    "an object": (lambda a: setattr(a.settings, "is_off", True), "settings.is_off is True"),
    "another object": (
        lambda a: setattr(a, "settings", SimpleNamespace(is_off=True, note="")), "is_off is True"
    ),
    "an adapter more": (lambda a: a.up.update({"two": nn.Identity()}), "up.two was added"),
    "an adapter less": (lambda a: a.up.pop("one"), "up.one was removed"),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_adapters_are_seen(adapted, name):
    version = Version(adapted)
    change, words = SWITCHES[name]
    change(adapted.lm_head)
    refused(version, words)
    with pytest.raises(ModelChangedError):
        version.check()


def test_what_is_put_back_is_unchanged(adapted):
    version = Version(adapted)
    head = adapted.lm_head
    head._active = []
    refused(version, "_active")
    head._active = ["one"]
    version.check(thorough=True)
    hook = attention(adapted).register_forward_hook(print)
    refused(version, "self_attn has other forward hooks")
    hook.remove()
    version.check(thorough=True)
    adapted.train()
    refused(version, "training")
    adapted.eval()
    frequencies = adapted.model.rotary_emb.inv_freq
    frequencies.mul_(2)
    refused(version, "inv_freq")
    frequencies.div_(2)
    version.check(thorough=True)
    adapted.model.rotary_emb.register_buffer("inv_freq", frequencies.clone())
    version.check(thorough=True)


def test_classes_and_files_that_are_patched_are_seen(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    version = Version(model)
    for where, name in (
        (modeling_llama.LlamaMLP, "forward"),
        (nn.Linear, "forward"),
        (nn.Module, "__call__"),
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "repeat_kv"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *args: args)
            refused(version, f"forward of .* was replaced|{name} is another function")
        version.check(thorough=True)


def test_hooks_for_all_modules_are_refused_before_and_after(model):
    version = Version(model)
    for register in (
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
    ):
        hook = register(lambda *_: None)
        try:
            refused(version, "hooks of torch for all modules")
            with pytest.raises(UnsupportedInputError, match="remove it, optimize"):
                Version(model)
        finally:
            hook.remove()
        version.check(thorough=True)


def call_it(model):
    model(IDS, output_hidden_states=True)
    model.generate(IDS, **GREEDY)


def compile_it(model):
    model.compile(backend="eager")
    torch.compile(model, backend="eager")


def backward(model):
    model(IDS).logits.sum().backward()
    model.zero_grad()


def leave_notes(model):
    model.my_note = "x"
    attention(model).my_probe = nn.Identity()
    attention(model).register_buffer("my_counter", torch.zeros(1))
    model.hf_device_map = {"": "cpu"}
    model.model.layers[0]._is_hf_initialized = False
    model.config.my_note = "x"


def count_flops(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        model(IDS)


def edit_weights(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        attention(model).q_proj.weight.data.zero_()


def step_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).logits.sum().backward()
    optimizer.step()
    model.zero_grad(set_to_none=False)


def copy_config(model):
    model.config = copy.deepcopy(model.config)


def same_forward(model):
    model.model.norm.forward = model.model.norm.forward


HARMLESS = {
    "its own calls": call_it,
    "compile": compile_it,
    "a backward": backward,
    "no gradients": lambda m: m.requires_grad_(False),
    "eval": lambda m: m.eval(),
    "the same place": lambda m: m.to("cpu").to(torch.float32),
    "tied weights": lambda m: m.tie_weights(),
    "a state dict": lambda m: m.load_state_dict(m.state_dict()),
    "checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "gradients of embeddings": lambda m: m.enable_input_require_grads(),
    "a hook of backward": lambda m: m.lm_head.register_full_backward_hook(lambda *_: None),
    "notes": leave_notes,
    "counted operations": count_flops,
    "weights in place": edit_weights,
    "an optimizer's step": step_optimizer,
    "a copied config": copy_config,
    "the same forward": same_forward,
    "optimized twice": lambda m: optimize(m, CONFIG.replace(mode="query", top_k=None)),
    "a deep copy": lambda m: copy.deepcopy(m).model.layers.pop(-1),
    "what only generate reads": lambda m: setattr(m.generation_config, "top_k", 3),
    "an epsilon that was read long ago": lambda m: setattr(m.config, "rms_norm_eps", 0.5),
    "another implementation that is registered": lambda m: transformers.AttentionInterface.register(
        "test_version", lambda *_: None
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_no_alarm(model, name):
    version = Version(model)
    HARMLESS[name](model)
    version.check(thorough=True)
    version.check()
    version.check_hooks()


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gemma3", "gpt2"])
def test_calls_of_other_models_raise_no_alarm(name):
    model = build(name)
    version = Version(model)
    call_it(model)
    version.check(thorough=True)


def test_state_that_longrope_changes_itself_is_no_alarm():
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 4.0,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=64)
    version = Version(model)
    for length in (9, 30, 9):
        model(torch.ones(1, length, dtype=torch.long))
        version.check(thorough=True)
    rotary = model.model.rotary_emb
    rotary.long_inv_freq = rotary.long_inv_freq * 2
    refused(version, "long_inv_freq")
