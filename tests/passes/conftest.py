"""Plans of tiny models: traced once for all tests of the passes, planned once per configuration."""

from __future__ import annotations

import functools

import pytest

from sparda_compile.config import SpardaConfig
from sparda_compile.machine import MACHINES
from sparda_compile.passes.base import PassContext
from sparda_compile.plain import as_causal_lm, sliding_windows
from sparda_compile.plan import Captures, make_plan
from sparda_compile.testing import build


@functools.cache
def _captures(model):
    causal_lm = as_causal_lm(build(model))
    return Captures(causal_lm, sliding_windows(causal_lm))


@functools.cache
def _plan(model, phase, batch_size, max_tokens, config):
    captures = _captures(model)
    return make_plan(
        captures,
        phase,
        config,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )


@pytest.fixture(scope="session")
def captures_of():
    """Return the traced forwards of a tiny model, by name."""
    return _captures


@pytest.fixture(scope="session")
def plan_of():
    """Return a function that plans a tiny model; its plans are shared, so tests copy graphs."""

    def plan(model="llama", phase="decode", *, batch_size=1, max_tokens=8192, **settings):
        return _plan(model, phase, batch_size, max_tokens, SpardaConfig(**settings))

    return plan


@pytest.fixture(scope="session")
def context_of():
    """Return a function that gives what the passes of a plan knew."""

    def context(plan):
        layout, phase = plan.layout, plan.captured.phase
        return PassContext(layout.config, phase, {}, "Model", layout, MACHINES["h200"])

    return context
