"""Sites."""

from __future__ import annotations

import dataclasses

import pytest


def test_site_kind(plan_of):
    window, sparse = plan_of("gemma3", mode="query").sites
    assert (window.kind, sparse.kind) == ("window", "sparse")
    assert window.window == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.window = 16
