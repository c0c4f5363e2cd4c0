"""How the small model is learned: its sizes, its stages, its training sequences and its losses.

A model that never attended to few blocks while it learned loses answers when it has to: a layer
whose lookup misses the block says something else, and the queries of later layers change with it.
So it can also be trained as it is deployed: the haystack is read densely, and the questions behind
it attend only to the blocks that selector `infllm2` picks, in every layer.

Three losses. Answers: the cross-entropy of the answer tokens alone. Attention: the first layer's
first group is told to look from a value at its key, and the lookup layers to look from a question
at the value; without it a small model copies any value of the haystack for thousands of steps
before it finds the right one. Blocks: the same for mean-pooled keys, so that a block which holds
the answer also scores highest.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional as F

from sparda_compile import SpardaConfig
from sparda_compile.evaluation.lookup import lookup
from sparda_compile.evaluation.run import budget_config
from sparda_compile.evaluation.tasks import TASKS
from sparda_compile.evaluation.vocabulary import ASK, LINK, NUM_KEYS, NUM_TOKENS, RECORD, TRACK
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors import SELECTORS
from sparda_compile.training.loss import geometry_of, pool_keys

GOALS = ("single_needle", "multi_key", "key_value")
LOWEST = -1e9
OTHERS = ("variable_tracking", "multi_value", "common_words", "frequent_words")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Sequences of one length, until `mastered` or the share of the time is over."""

    length: int
    batch_size: int
    max_records: int
    queries: int
    end: float
    other_tasks: float = 0.0
    jumps: float = 0.5


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model, its stages, and what it is tested on."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    max_position: int
    stages: tuple[Stage, ...]
    eval_lengths: tuple[int, ...]
    eval_samples: int
    learning_rate: float
    lookup_layers: tuple[int, ...]
    forecast_lengths: tuple[int, ...]
    forecast_batch: int
    forecast_queries: int
    local_blocks: int
    pool_size: int = 32
    mastered: float = 0.99


FULL = Preset(
    hidden_size=256,
    intermediate_size=512,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=1e7,
    max_position=32768,
    stages=(
        Stage(64, 1024, 9, 9, 0.2, jumps=0.0),
        Stage(512, 128, 80, 64, 0.4, other_tasks=0.1),
        Stage(4096, 16, 900, 64, 0.6, other_tasks=0.2),
        Stage(8192, 8, NUM_KEYS, 64, 0.8, other_tasks=0.1),
        Stage(17408, 4, NUM_KEYS, 64, 1.0, other_tasks=0.2, jumps=0.3),
    ),
    eval_lengths=(1024, 4096, 8192, 16384),
    eval_samples=256,
    learning_rate=1.5e-3,
    lookup_layers=(2, 4),
    forecast_lengths=(8192, 16384),
    forecast_batch=4,
    forecast_queries=256,
    local_blocks=2,
)
TOY = Preset(
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    rope_theta=1e7,
    max_position=4096,
    stages=(
        Stage(48, 64, 7, 7, 0.6, jumps=0.0),
        Stage(128, 32, 20, 20, 0.8),
        Stage(512, 8, 60, 32, 1.0),
    ),
    eval_lengths=(128, 512, 4096),
    eval_samples=64,
    learning_rate=4e-3,
    lookup_layers=(1,),
    forecast_lengths=(4096,),
    forecast_batch=2,
    forecast_queries=32,
    local_blocks=1,
)
PRESETS = {"full": FULL, "toy": TOY}


def build_model(preset, arch, seed):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    make_config, make_model = classes[arch]
    config = make_config(
        vocab_size=NUM_TOKENS,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_layers,
        num_attention_heads=preset.num_heads,
        num_key_value_heads=preset.num_kv_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=preset.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=True,
        initializer_range=preset.hidden_size**-0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = make_model(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(0.5)
        layer.mlp.down_proj.weight.data.mul_(0.5)
    return model


def answer_logits(model, batch, positions, watch=None, config=None, hidden=None):
    """Return logits [B, A, vocabulary] of the answers.

    No mask tensor is made for the haystack, so that attention stays the causal flash kernel.
    `watch` is called with the number, the input and the rotation of each layer. With `config` the
    questions attend to the blocks that it picks; without it, to everything. `hidden` is by layer
    number, [B, Q] for the Q tokens of questions: a place whose block they may not pick, or -1.
    """
    body = model.model
    x = body.embed_tokens(batch.ids_BT)
    rotation = body.rotary_emb(x, positions)
    start = x.shape[1] if config is None else batch.question_start
    for number, layer in enumerate(body.layers):
        if watch is not None:
            watch(number, x, rotation)
        read = layer(
            x[:, :start], attention_mask=None, position_ids=positions[:, :start],
            position_embeddings=tuple(part[:, :start] for part in rotation),
        )  # fmt: skip
        read = read[0] if isinstance(read, tuple) else read
        if config is not None:
            read = sparse_tail(layer, x, read, rotation, config, (hidden or {}).get(number))
        x = read
    return model.lm_head(body.norm(x)[:, batch.answer_positions_A - 1]).float()


def sparse_tail(layer, x, read, rotation, config, hidden_BQ=None):
    """Return the output of a layer, [B, T, C]: `read` for the first tokens, then sparse tokens.

    Each of those attends to the blocks that selector `infllm2` picks for it, as in a decode step.
    """
    start, attention = read.shape[1], layer.self_attn
    normed = layer.input_layernorm(x)
    asking = [part[:, start:] for part in rotation]
    q = rotated(attention, "q", normed[:, start:], asking).transpose(1, 2)
    k = rotated(attention, "k", normed, rotation).transpose(1, 2)
    v = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    q, k = q.to(v.dtype), k.to(v.dtype)
    mask_BGQT = attended(q.detach(), k.detach(), start, attention.scaling, config, hidden_BQ)
    repeats = q.shape[1] // k.shape[1]
    # Grouped heads with a mask have no fused kernel on a GPU; repeated ones have.
    k, v, mask = (part.repeat_interleave(repeats, dim=1) for part in (k, v, mask_BGQT))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling)
    tail = x[:, start:] + attention.o_proj(out.transpose(1, 2).flatten(2))
    tail = tail + layer.mlp(layer.post_attention_layernorm(tail))
    return torch.cat([read, tail.to(read.dtype)], dim=1)


@torch.no_grad()
def attended(q_BHQD, k_BGTD, start, scale, config, hidden_BQ=None):
    """Return which keys each of the last tokens, from `start` on, attends to: [B, G, Q, T] bool.

    The block of a hidden place comes after all others, so that it is read only if it is always.
    """
    batch, num_tokens = len(k_BGTD), k_BGTD.shape[2]
    geometry = geometry_of(config, num_tokens)
    places_Q = torch.arange(start, num_tokens, device=q_BHQD.device)
    # Each token is a sequence of its own, which ends before it.
    lengths = places_Q.int().repeat(batch)
    queries = q_BHQD.transpose(1, 2).flatten(0, 1)[:, :, None]
    pooled = pool_keys(k_BGTD, config).repeat_interleave(len(places_Q), dim=0)
    scores = SELECTORS["infllm2"].score(queries, [pooled], lengths, scale, geometry)
    if hidden_BQ is not None:
        block_N = torch.arange(geometry.num_blocks, device=scores.device)
        # -1, for no place, is in block -1.
        is_hidden = hidden_BQ.flatten()[:, None] // config.block_size == block_N
        scores = scores.masked_fill(is_hidden[:, None], float("-inf"))
    ids = select_blocks_reference(
        scores, lengths, config.num_selected(geometry.num_blocks), config.block_size,
        config.sink_blocks, config.local_blocks,
    ).long()  # fmt: skip
    # An id of -1, for a block that does not exist, goes to the column behind the last one.
    chosen = scores.new_zeros(*scores.shape[:2], geometry.num_blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter(2, ids.where(ids >= 0, geometry.num_blocks), True)[..., :-1]
    chosen_BGQN = chosen.unflatten(0, (batch, -1)).transpose(1, 2)
    seen_BGQT = chosen_BGQN.repeat_interleave(config.block_size, dim=-1)[..., :num_tokens]
    return seen_BGQT & (torch.arange(num_tokens, device=q_BHQD.device) <= places_Q[:, None])


def hidden_evidence(batch, share, generator):
    """Return the evidence of a share of the questions, and -1 elsewhere: [B, Q] of their tokens.

    It stands where the question's last token does, the one that looks it up.
    """
    evidence = batch.evidence_BA
    drawn = torch.rand(evidence.shape, device=evidence.device, generator=generator) < share
    places = evidence.new_full((len(evidence), batch.ids_BT.shape[1] - batch.question_start), -1)
    places[:, batch.answer_positions_A - 1 - batch.question_start] = evidence.where(drawn, -1)
    return places


def deployed(preset, length, budget):
    """Return the configuration with a share of a sequence's blocks; None if it is too short."""
    config = SpardaConfig(
        mode="query", local_blocks=preset.local_blocks, pool_size=preset.pool_size,
        pool_stride=preset.pool_size // 2,
    )  # fmt: skip
    fewest = config.sink_blocks + preset.local_blocks + 2
    if not budget or length * budget < fewest * config.block_size:
        return None
    return budget_config(config, length, budget)


def rotated(attention, part, hidden, rotation):
    """Return queries or keys as attention sees them, [B, T, heads, D]."""
    out = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)
    out = out if norm is None else norm(out)
    cos, sin = (part[:, :, None] for part in rotation)
    left, right = out.chunk(2, dim=-1)
    return out * cos + torch.cat((-right, left), dim=-1) * sin


def at(x, places_BA):
    """Return x [B, T, ...] at places of each row, [B, A, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], places_BA]


def attention_losses(layer, x, rotation, asked_BA, wanted_BA, pool_size, num_groups=None):
    """Return how far attention, and block scores, at `asked` are from the token `wanted`, in nats.

    The first is -log of the attention that each head of the first groups pays to that token. The
    second is -log of the share of the windows that hold it, by the scores that selector `infllm2`
    gives to mean-pooled keys, raised to the power of half the keys of a window: a score is their
    mean, and only one of them matters.
    """
    attention = layer.self_attn
    hidden = layer.input_layernorm(x)
    k = rotated(attention, "k", hidden, rotation)
    queried = [at(part, asked_BA) for part in rotation]
    q = rotated(attention, "q", at(hidden, asked_BA), queried).unflatten(2, (k.shape[2], -1))
    q, k = q[:, :, :num_groups], k[:, :, :num_groups]
    last = asked_BA[:, None, None, :, None]
    places = torch.arange(x.shape[1], device=x.device)
    logits = torch.einsum("bagrd,btgd->bgrat", q, k).float() * attention.scaling
    logits = logits.masked_fill(places > last, float("-inf"))
    target = wanted_BA[:, None, None, :, None].expand(*logits.shape[:4], 1)
    loss = (logits.logsumexp(-1) - logits.gather(-1, target)[..., 0]).mean()
    if num_groups is not None or x.shape[1] < 8 * pool_size:
        return loss, torch.zeros_like(loss)
    pooled = k.unfold(1, pool_size, pool_size // 2).mean(-1)
    logits = torch.einsum("bagrd,bwgd->bgraw", q, pooled).float() * attention.scaling
    starts = torch.arange(pooled.shape[1], device=x.device) * (pool_size // 2)
    age = wanted_BA[..., None] - starts
    is_near = ((age >= 0) & (age < pool_size))[:, None]
    unseen = starts + pool_size > last
    scores = logits.masked_fill(unseen, LOWEST).log_softmax(-1).logsumexp(2)
    logits = (scores * (pool_size / 2)).masked_fill(unseen[:, :, 0], 2 * LOWEST)
    near = logits.masked_fill(~is_near, LOWEST).logsumexp(-1)
    # A token so late that no whole window holds it is always attended to anyway.
    counts = near > LOWEST / 2
    return loss, ((logits.logsumexp(-1) - near) * counts).sum() / counts.sum().clamp(min=1)


def other_task(maker, rng):
    return TASKS[rng.choice(OTHERS)](maker)


def lookups(stage, maker, rng, full_share=0.25):
    """Draw sequences of questions, the given share of them as full of records as they may be."""
    # Each record takes three tokens, and so does each question.
    fitting = (stage.length - 2) // 3
    most = min(stage.max_records, fitting - min(stage.queries, fitting // 2))
    records = most if rng.random() < full_share else round(math.exp(rng.uniform(0, math.log(most))))
    return lookup(maker, num_records=records, num_queries=stage.queries)


def training_positions(ids, max_position, jump, generator):
    """Count positions; with `jump`, leave gaps before records, up to `max_position` in all."""
    counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if not jump or max_position <= ids.shape[1]:
        return counted

    def uniform(*shape):
        return torch.rand(*shape, device=ids.device, generator=generator)

    starts = (ids == RECORD) | (ids == ASK) | (ids == LINK) | (ids == TRACK)
    rows = ids.shape[0]
    chosen = starts & (uniform(ids.shape) < uniform(rows, 1).square())
    weights = chosen * -uniform(ids.shape).clamp(min=1e-6).log()
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-6)
    extra = uniform(rows, 1) * (max_position - ids.shape[1] - 1)
    return counted + (shares.cumsum(1) * extra).long()
