"""Groups that say which blocks are read, and how they are guessed early."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.selection import Prediction, Selection


class TestHints:
    def test_one_name_stays_a_name_and_several_become_a_tuple(self):
        several = ("ema", "forecast")
        for given, hint in (
            ("ema", "ema"),
            (["ema"], "ema"),
            (several, several),
            ([*several], several),
        ):
            config = SpardaConfig(mode="exact", hint=given)
            assert config.hint == hint
            assert config.hints == (several if hint == several else ("ema",))
        assert SpardaConfig(mode="query", hint=several).hints == ()

    def test_several_survive_copies_text_and_json(self):
        config = SpardaConfig(mode="exact", hint=["ema", "forecast"])
        assert config.replace(top_k=3).hint == config.hint
        assert config.replace(hint="ema").hint == "ema"
        assert "hint=('ema', 'forecast')" in repr(config)
        plain = json.loads(json.dumps(dataclasses.asdict(config)))
        plain["disable_passes"] = tuple(plain["disable_passes"])
        assert SpardaConfig(**plain) == config
        assert hash(SpardaConfig(**plain)) == hash(config)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ((), "names no hint; use one name"),
            (("ema", "ema"), "names a hint twice"),
            (("ema", "forcast"), "hint='forcast' is not known.*Did you mean 'forecast'"),
            (("ema", 3), "hint=3 is not known; use one of forecast, "),
            (None, "hint=None is not known"),
        ],
    )
    def test_refused(self, value, words):
        with pytest.raises(ConfigError, match=words):
            SpardaConfig(mode="exact", hint=value)

    def test_each_says_whether_weights_are_needed(self):
        assert SpardaConfig(mode="exact", hint=("ema", "forecast")).needs_forecast
        assert not SpardaConfig(mode="exact", hint=("ema", "next_query")).needs_forecast

    def test_the_group_has_them_too(self):
        assert Selection(mode="exact", hint=["ema", "forecast"]).hint == ("ema", "forecast")


class TestPrediction:
    def test_no_trend_by_default(self):
        assert Prediction() == Prediction(ema_level=0.4, ema_trend=0.3, ema_damping=0.0)

    @pytest.mark.parametrize("name", ["ema_level", "ema_trend", "ema_damping"])
    def test_ends_of_what_is_allowed(self, name):
        assert getattr(Prediction(**{name: 1.0}), name) == 1.0
        for value, words in ((1.5, "1.0"), (-0.5, "0.0"), ("much", "is not a finite number")):
            with pytest.raises(ConfigError, match=f"{name}=.*{words}"):
                Prediction(**{name: value})
        if name == "ema_damping":
            assert Prediction(ema_damping=0.0).ema_damping == 0.0
        else:
            with pytest.raises(ConfigError, match=r"above 0\.0"):
                Prediction(**{name: 0.0})


class TestSpeculation:
    def test_the_defaults_are_the_paper_s_but_exact(self):
        config = SpardaConfig(mode="speculate", offload="never")
        assert (config.speculation_budget, config.repair) == (1.5, "exact")
        assert config.speculate_where == "auto"
        assert config.predictor == "ema"
        assert config.hints == ()
        assert not config.needs_forecast
        assert SpardaConfig(mode="query").predictor is None

    def test_blocks_that_are_predicted(self):
        config = SpardaConfig(mode="speculate", offload="never")
        assert config.num_forced == 34
        assert config.num_predicted(2048) == 34 + 93
        assert config.num_predicted(100) == 100
        assert config.replace(top_k=3).num_predicted(2048) == 34 + 5
        assert config.replace(speculation_budget=0.0).num_predicted(2048) == 34
        assert config.replace(top_k=None).num_predicted(64) == 64

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"offload": "always"}, "pass offload='never', or use mode='exact' with hint='ema'"),
            ({"hint": "previous_step"}, "hint='previous_step' cannot be used by mode='speculate'"),
            ({"hint": ("ema", "forecast")}, "predicts by scores of past steps; use hint='ema'"),
            ({"speculation_budget": 4.5}, "no multiple of top_k that can be predicted; use 0.0 to"),
            ({"speculation_budget": -0.1}, "use 0.0 to 4.0"),
            ({"speculation_budget": "1"}, "is not a finite number"),
            ({"repair": "none"}, "repair='none' is not known; use one of exact, union"),
            ({"speculate_where": "never"}, "speculate_where='never' is not known"),
        ],
    )
    def test_refused(self, fields, words):
        with pytest.raises(ConfigError, match=words):
            SpardaConfig(**{"mode": "speculate", "offload": "never", **fields})

    def test_the_hint_may_be_named(self):
        config = SpardaConfig(mode="speculate", offload="auto", hint="ema")
        assert config.predictor == "ema"
        # Other modes take what this one refuses.
        assert SpardaConfig(mode="exact", hint="previous_step").speculation_budget == 1.5
