from __future__ import annotations

import pytest
import torch

from sparda_compile.capture import forward
from sparda_compile.capture.marker_cache import marker_cache
from sparda_compile.errors import CaptureError
from sparda_compile.testing import build, tiny_llama

assert forward.capture  # which defines the marker


def test_an_update_is_the_marker_of_its_layer_and_holds_nothing():
    cache = marker_cache(tiny_llama(num_hidden_layers=2))
    k, v = torch.randn(2, 1, 2, 3, 16, device="meta")
    for layer in (1, 0):
        keys, values = cache.update(k, v, layer)
        assert keys.shape == values.shape == k.shape
        with pytest.raises(CaptureError, match=f"attention of layer {layer} was not rewritten"):
            cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), layer)
    assert cache.get_seq_length() == 0
    assert len(cache.layers) == 2


def test_windows_are_no_matter_of_it():
    layers = marker_cache(build("gemma3")).layers
    assert len(layers) > 1
    assert not any(layer.is_sliding for layer in layers)
    assert [layer.get_mask_sizes(7) for layer in layers] == [(7, 0)] * len(layers)


def test_a_module_without_a_config_has_no_layers():
    assert len(marker_cache(torch.nn.Linear(1, 1)).layers) == 0
