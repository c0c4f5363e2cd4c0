"""The cache that a model is traced with: its `update` is one op, which passes replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["marker_cache"]


def marker_cache(model: nn.Module) -> Any:
    """Return a transformers cache whose `update` is the marker op."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    class MarkerLayer(CacheLayerMixin):
        is_compileable = True
        is_sliding = False

        def __init__(self, layer: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.layer = layer
            self.is_initialized = True

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            pass

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            return torch.ops.sparda.kv_update(key_states, value_states, self.layer)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_seq_length(self) -> int:
            return 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length

    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    num_layers = getattr(text, "num_hidden_layers", None) or 0
    return Cache(layers=[MarkerLayer(i) for i in range(num_layers)])
