"""Quantised weights: each model equals its quantised original, or is refused by name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.graph.nodes import call_name
from sparda_compile.testing import build, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.program.pieces import Piece


class Torchao:
    """torchao.quantization, imported when a test asks for something of it.

    It is not among the installed packages: transformers imports torchao where it finds it, and
    torchao prints.
    """

    def __getattr__(self, name: str) -> Any:
        folder = str(Path(sys.prefix) / "optional")
        if folder not in sys.path:
            sys.path.append(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pytest.importorskip("torchao.quantization", reason="make venv has torchao")
        return getattr(found, name)


ao = Torchao()
pytestmark = [
    pytest.mark.filterwarnings("ignore:Forecast weights are not trained:UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]


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
def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Return the logits of a prefill and of the two decode steps behind it."""
    out = model.generate(
        **given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, dim=1).float()


def assert_equal(
    model: Any, mode: str = "query", *, share: float = 2e-5, lowering: str = "eager"
) -> None:
    """Fail unless logits agree up to a share of their spread."""
    config = SpardaConfig(
        mode=mode,  # type: ignore[arg-type]
        top_k=None,
        block_size=16,
        lowering=lowering,  # type: ignore[arg-type]
        max_tokens=128,
    )
    fast = optimize(model, config)
    for given in (prompts(40), prompts(40, 65, 7)):
        got, want = logits_of(fast, given), logits_of(model, given)
        limit = share * float(want.max() - want.min())
        torch.testing.assert_close(got, want, rtol=0, atol=limit)


def quantised(config: Any, model: nn.Module) -> nn.Module:
    before = model(**prompts(9)).logits
    ao.quantize_(model, config)
    assert type(model.lm_head.weight) is not nn.Parameter  # type: ignore[union-attr]
    assert (model(**prompts(9)).logits - before).abs().max() > 1e-3
    return model


def int4(model: nn.Module) -> nn.Module:
    groups = ao.granularity.PerGroup(32)
    config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
    return quantised(config, model)


# Half precision rounds the sums of attention in another order, and so does what quantises
# activations: twice what sdpa and eager attention of the original differ by, of its spread.
COARSE = 4e-2
TORCHAO: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "int8": (lambda: quantised(ao.Int8WeightOnlyConfig(), tiny_llama()), "query", 2e-5),
    "int8 forecast": (lambda: quantised(ao.Int8WeightOnlyConfig(), tiny_llama()), "forecast", 2e-5),
    "int8 fused": (lambda: quantised(ao.Int8WeightOnlyConfig(), build("phi3")), "exact", 2e-5),
    "int8 half": (
        lambda: quantised(ao.Int8WeightOnlyConfig(), tiny_llama().to(torch.bfloat16)),
        "query",
        COARSE,
    ),
    "int8 activations": (
        lambda: quantised(ao.Int8DynamicActivationInt8WeightConfig(), tiny_llama()),
        "dense",
        COARSE,
    ),
    "int4": (lambda: int4(tiny_llama()), "forecast", 2e-5),
    "fp8": (
        lambda: quantised(ao.Float8WeightOnlyConfig(), tiny_llama().to(torch.bfloat16)),
        "forecast",
        COARSE,
    ),
}


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_weights_equal_their_original(name: str) -> None:
    make, mode, share = TORCHAO[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal(make(), mode, share=share)
    assert not [w for w in caught if "random weights" in str(w.message)]


def pieces_of(model: nn.Module) -> list[Piece]:
    """Return the pieces of a decode step, not compiled."""
    config = SpardaConfig(mode="query", top_k=None, block_size=16, max_tokens=128)
    fast = optimize(model, config)
    program = fast.program("decode", 1, 128, last_only=True)
    return program.lowered.pieces()


def test_pieces_with_quantised_weights_are_not_taken_for_plain_ones() -> None:
    plain = pieces_of(tiny_llama(num_hidden_layers=1))
    other = pieces_of(quantised(ao.Int8WeightOnlyConfig(), tiny_llama(num_hidden_layers=1)))
    assert len(plain) == len(other)
    assert not {piece.key for piece in plain} & {piece.key for piece in other if _has_linear(piece)}


def _has_linear(piece: Piece) -> bool:
    return any(call_name(node) == "linear" for node in piece.graph_module.graph.nodes)


@pytest.mark.slow
def test_torchao_weights_compile() -> None:
    model = quantised(ao.Int8WeightOnlyConfig(), tiny_llama(num_hidden_layers=1))
    assert_equal(model, lowering="inductor", share=1e-4)


def test_a_quantised_weight_costs_the_bytes_that_it_has() -> None:
    def hbm(model: nn.Module) -> int:
        report = explain(model, SpardaConfig(mode="query"))
        assert not report.error
        rows = report.schedules[0].rows
        return sum(row.hbm_bytes for row in rows if "linear" in row.op)

    plain = hbm(tiny_llama())
    assert plain / 4 < hbm(quantised(ao.Int8WeightOnlyConfig(), tiny_llama())) < plain / 3


@torch.library.custom_op("sparda_tests::quantised_linear", mutates_args=())
def quantised_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype) * scale)


@quantised_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    del scale
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        del ctx
        return functional.linear(x, weight.to(x.dtype) * scale)


class QuantisedLinear(nn.Linear):
    """A linear with int8 weights in a buffer and a forward of its own, as packages have them."""

    def __init__(self, linear: nn.Linear, way: str) -> None:
        super().__init__(1, 1, bias=False)
        del self.weight
        self.way = way
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.weight, self.scale
        if self.way == "matmul":
            return x @ (weight.to(x.dtype) * scale).t()
        if self.way == "scaled afterwards":
            return functional.linear(x, weight.to(x.dtype)) * scale.t()
        if self.way == "function":
            out: Tensor = OwnFunction.apply(x, weight, scale)
            return out
        return quantised_linear(x, weight, scale)


@pytest.mark.parametrize("way", ["matmul", "scaled afterwards", "function", "op"])
def test_linear_with_a_forward_of_its_own_equals_its_original(way: str) -> None:
    model = tiny_llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, QuantisedLinear(child, way))
    assert_equal(model, "forecast" if way != "op" else "query")


def test_bitsandbytes_is_refused_by_name() -> None:
    reason = "bitsandbytes is no dependency: the real layers are tried where it is installed"
    bnb = pytest.importorskip("bitsandbytes", reason=reason)
    for kind, fields in (("Linear8bitLt", {"has_fp16_weights": False}), ("Linear4bit", {})):
        model = tiny_llama()
        attention = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
        attention.q_proj = getattr(bnb.nn, kind)(64, 64, bias=False, **fields).eval()
        with pytest.raises(UnsupportedInputError, match=f"{kind} of bitsandbytes"):
            optimize(model)


def test_gguf_equals_what_transformers_loads(tmp_path: Path) -> None:
    reason = "gguf is no dependency: a file is written and loaded where it is installed"
    gguf = pytest.importorskip("gguf", reason=reason)
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    write_gguf(gguf, model, tmp_path / "tiny.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    assert_equal(loaded, "forecast")


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(gguf: Any, model: Any, path: Path) -> None:
    """Write a Llama with matrices in Q8_0."""
    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        path_of = name.removesuffix(".weight")
        if path_of.startswith("model.layers."):
            _, _, layer, rest = path_of.split(".", 3)
            new = f"blk.{layer}.{_NAMES[rest]}.weight"
        else:
            new = f"{_NAMES[path_of]}.weight"
        values = weight.numpy()
        if values.ndim == 2:
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
