from __future__ import annotations

from typing import get_args

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.training.names import Teacher
from sparda_compile.training.trainer import ForecastTrainer


def test_the_trainer_knows_each(gym, shared_capture):
    for teacher in get_args(Teacher):
        ForecastTrainer(gym.model, gym.config, 1e-3, teacher=teacher)
    with pytest.raises(ConfigError, match="use one of attention, query"):
        ForecastTrainer(gym.model, gym.config, 1e-3, teacher="luck")
