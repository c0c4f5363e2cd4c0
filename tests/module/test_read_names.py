from __future__ import annotations

from torch import nn

from sparda_compile.module.read_names import ReadNames
from sparda_compile.testing import tiny_llama

FACTOR = 2.0


def doubled(x, module):
    return x * module.read_in_a_function


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = self.only_built = 1.0

    def forward(self, x):
        if self.is_off:
            return x
        named = getattr(self, "by_name") + getattr(self, f"{self.kind}_factor")  # noqa: B009
        return doubled(x * self.scale * named, self)

    def extra_repr(self):
        return f"{self.only_printed}"


def test_names_are_those_of_the_forward_and_of_what_it_calls():
    code = ReadNames([Scaled])
    for name in ("scale", "is_off", "by_name", "read_in_a_function"):
        assert code.reads(name), name
    for name in ("only_built", "only_printed", "never"):
        assert not code.reads(name), name


def test_a_name_that_is_made_at_run_time_is_known_by_its_end():
    assert ReadNames([Scaled]).reads("full_attention_factor")
    assert not ReadNames([Scaled]).reads("fullfactor")


def test_functions_and_methods_are_watched_where_they_are_looked_up():
    code = ReadNames([Scaled])
    assert "forward" in code.methods[Scaled]
    assert "extra_repr" not in code.methods[Scaled]
    watched = [names for file, names in code.functions.values() if file is globals()]
    assert watched == [["doubled"]]


def test_properties_of_a_config_count_where_they_are_read():
    class Config:
        @property
        def scale(self):
            return self.behind_it

    code = ReadNames([Scaled])
    assert not code.reads("behind_it")
    code.add_properties(Config)
    assert code.reads("behind_it")


def test_a_model_of_transformers():
    model = tiny_llama(num_hidden_layers=1)
    code = ReadNames(dict.fromkeys(map(type, model.modules())))
    for name in ("scaling", "variance_epsilon", "attention_scaling", "inv_freq"):
        assert code.reads(name), name
