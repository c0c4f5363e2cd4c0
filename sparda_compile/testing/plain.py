"""A causal LM that owes nothing to any model library: attention is one call of torch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparda_compile.testing.building import fill_weights

__all__ = ["PlainAttention", "PlainCausalLM"]

Positions = Literal["rotary", "learned"]
GroupForm = Literal["enable_gqa", "repeat_interleave"]


class PlainAttention(nn.Module):
    """Causal attention over the tokens of one call; no cache.

    Attributes:
        num_heads: Query heads H.
        num_groups: KV heads G.
        head_dim: Width D of one head.
        group_form: How KV heads reach their query heads: inside the attention call, or repeated
            before it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        group_form: GroupForm,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_groups = num_groups
        self.head_dim = head_dim
        self.group_form = group_form
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, num_groups * head_dim, bias=False)
        self.value = nn.Linear(hidden_size, num_groups * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend every token to itself and to those before it.

        Args:
            x_BTC: [B, T, C] normalised hidden states.
            rotary: Cosine and sine, each [B, 1, T, D], or None for no rotation.

        Returns:
            [B, T, C] projected attention output.
        """
        batch, num_tokens, _ = x_BTC.shape
        q_BHTD = self._split(self.query(x_BTC), self.num_heads)
        k_BGTD = self._split(self.key(x_BTC), self.num_groups)
        v_BGTD = self._split(self.value(x_BTC), self.num_groups)
        if rotary is not None:
            q_BHTD, k_BGTD = _rotate(q_BHTD, *rotary), _rotate(k_BGTD, *rotary)
        out_BHTD = self.attend(q_BHTD, k_BGTD, v_BGTD)
        out: Tensor = self.output(out_BHTD.transpose(1, 2).reshape(batch, num_tokens, -1))
        return out

    def attend(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
        """Return softmax(q k^T) v per head, [B, H, T, D]."""
        if self.group_form == "enable_gqa":
            return functional.scaled_dot_product_attention(
                q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True
            )
        repeats = self.num_heads // self.num_groups
        return functional.scaled_dot_product_attention(
            q_BHTD,
            k_BGTD.repeat_interleave(repeats, dim=1),
            v_BGTD.repeat_interleave(repeats, dim=1),
            is_causal=True,
        )

    def _split(self, x_BTE: Tensor, num_heads: int) -> Tensor:
        x_BTHD: Tensor = x_BTE.unflatten(-1, (num_heads, self.head_dim))
        return x_BTHD.transpose(1, 2)


class PlainBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and a residual."""

    def __init__(self, hidden_size: int, attention: PlainAttention) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.attention = attention
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )

    def forward(self, x_BTC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the hidden states [B, T, C] after this block."""
        x_BTC = x_BTC + self.attention(self.norm_attention(x_BTC), rotary)
        out: Tensor = x_BTC + self.mlp(self.norm_mlp(x_BTC))
        return out


class PlainCausalLM(nn.Module):
    """A decoder whose forward is `(input_ids, position_ids=None) -> logits`.

    It has no cache, no config and no `generate`; position tables are gathered by `position_ids`,
    so one token at a time can be placed anywhere.

    Args:
        vocab_size: Tokens V that it knows; kept as an attribute.
        hidden_size: Width C of the hidden states.
        num_layers: Blocks in a row.
        num_heads: Query heads H of each block.
        num_groups: KV heads G of each block; divides `num_heads`.
        head_dim: Width D of one head; even.
        max_positions: Rows of the position tables.
        positions: `rotary` rotates queries and keys, `learned` adds an embedding.
        group_form: `enable_gqa` or `repeat_interleave`; see `PlainAttention`.
        seed: Seed of the weights.
    """

    attention_class: ClassVar[type[PlainAttention]] = PlainAttention

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        num_groups: int = 2,
        head_dim: int = 16,
        max_positions: int = 4096,
        positions: Positions = "rotary",
        group_form: GroupForm = "enable_gqa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            self.embedding = nn.Embedding(vocab_size, hidden_size)
            self.position_embedding = (
                nn.Embedding(max_positions, hidden_size) if positions == "learned" else None
            )
            self.blocks = nn.ModuleList(
                PlainBlock(
                    hidden_size,
                    self.attention_class(hidden_size, num_heads, num_groups, head_dim, group_form),
                )
                for _ in range(num_layers)
            )
            self.norm = nn.LayerNorm(hidden_size)
            self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        if positions == "rotary":
            cos_MD, sin_MD = _rotary_tables(max_positions, head_dim)
            self.register_buffer("cos_MD", cos_MD)
            self.register_buffer("sin_MD", sin_MD)
        fill_weights(self, hidden_size=hidden_size, seed=seed)
        self.eval()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Score the next token at every position.

        Args:
            input_ids: [B, T] int64 tokens.
            position_ids: [B, T] or [1, T] int64 positions; None counts from 0.

        Returns:
            [B, T, V] logits.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x_BTC = self.embedding(input_ids)
        rotary = None
        if self.position_embedding is not None:
            x_BTC = x_BTC + self.position_embedding(position_ids)
        else:
            rotary = (
                self.get_buffer("cos_MD")[position_ids].unsqueeze(1),
                self.get_buffer("sin_MD")[position_ids].unsqueeze(1),
            )
        for block in self.blocks:
            x_BTC = block(x_BTC, rotary)
        logits: Tensor = self.head(self.norm(x_BTC))
        return logits


def _rotary_tables(max_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_B1TD + torch.cat((-second, first), dim=-1) * sin_B1TD
