"""Methods by name: the ways to score blocks, to guess them early, and to write them.

    SELECTORS   how a query or a Forecast scores blocks      one file each in `selectors/`
    HINTS       how mode `exact` guesses a layer's blocks    one file each in `hints/`
    PREDICTORS  how mode `speculate` predicts a step's       the same
    KV_FORMATS  how full blocks are written                  one file each in `formats/`

To add one of the package, write its file and one line here. To add one from outside:

    HINTS.add(MyHint())

A method is loaded when it is first asked for: names cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HINTS", "KV_FORMATS", "PREDICTORS", "SELECTORS", "Registry", "forecast_rule"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Methods by name.

    Args:
        what: What they are, for messages.
        paths: Name of each of the package's own -> `module:Class`, made without arguments.
        internal: Names that a configuration cannot choose.
    """

    def __init__(self, what: str, paths: Mapping[str, str], internal: tuple[str, ...] = ()) -> None:
        self._what = what
        self._paths = dict(paths)
        self._internal = internal
        self._loaded: dict[str, T] = {}

    def add(self, method: T) -> T:
        """Enter a method by its attribute `name`, and return it.

        Raises:
            ConfigError: If it has no name, or there is one of that name.
        """
        name = getattr(method, "name", None)
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{type(method).__name__} has no name; a {self._what} needs one.")
        if name in self:
            raise ConfigError(f"there is a {self._what} {name!r} already; choose another name.")
        self._loaded[name] = method
        return method

    def remove(self, name: str) -> None:
        """Take out a method that was added.

        Raises:
            ConfigError: If none of that name was added.
        """
        if name in self._paths or name not in self._loaded:
            raise ConfigError(f"no {self._what} {name!r} was added.")
        del self._loaded[name]

    def names(self) -> tuple[str, ...]:
        """Return all names, the package's own first."""
        return tuple(dict.fromkeys([*self._paths, *self._loaded]))

    def choices(self) -> tuple[str, ...]:
        """Return the names that a configuration may choose."""
        return tuple(name for name in self.names() if name not in self._internal)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name."""
        return name in self._paths or name in self._loaded

    def __getitem__(self, name: str) -> T:
        """Return a method; KeyError if there is none of that name."""
        if name not in self._loaded:
            module, _, attribute = self._paths[name].partition(":")
            make: Any = getattr(importlib.import_module(module), attribute)
            self._loaded[name] = make()
        return self._loaded[name]

    def __iter__(self) -> Iterator[T]:
        """Yield all methods."""
        return iter([self[name] for name in self.names()])


# Of `selectors.base.Selector` and `hints.base.Hint`, which are made of what stands above this.
SELECTORS: Final[Registry[Any]] = Registry(
    "selector",
    {
        "infllm2": "sparda_compile.selectors.infllm2:InfLLM2",
        "quest": "sparda_compile.selectors.quest:Quest",
        "nosa": "sparda_compile.selectors.nosa:Nosa",
        "lowbit2": "sparda_compile.selectors.lowbit:LowBit2",
        "lowbit4": "sparda_compile.selectors.lowbit:LowBit4",
        "forecast": "sparda_compile.selectors.forecast:Forecast",
        "nosa_forecast": "sparda_compile.selectors.nosa:NosaForecast",
        "lowbit2_forecast": "sparda_compile.selectors.lowbit:LowBit2Forecast",
        "lowbit4_forecast": "sparda_compile.selectors.lowbit:LowBit4Forecast",
    },
    internal=("forecast", "nosa_forecast", "lowbit2_forecast", "lowbit4_forecast"),
)

HINTS: Final[Registry[Any]] = Registry(
    "hint",
    {
        "forecast": "sparda_compile.hints.forecast:ForecastHint",
        "previous_step": "sparda_compile.hints.previous_step:PreviousStepHint",
        "previous_layer": "sparda_compile.hints.previous_layer:PreviousLayerHint",
        "next_query": "sparda_compile.hints.next_query:NextQueryHint",
        "ema": "sparda_compile.hints.ema:EmaHint",
        "mixture": "sparda_compile.hints.mixture:MixtureHint",
    },
)

# Of `hints.base.Predictor`.
PREDICTORS: Final[Registry[Any]] = Registry(
    "predictor", {"ema": "sparda_compile.hints.speculation:EmaPredictor"}
)

# Of `formats.base.BlockFormat`.
KV_FORMATS: Final[Registry[Any]] = Registry(
    "KV format",
    {
        "model": "sparda_compile.formats.model:ModelFormat",
        "fp8": "sparda_compile.formats.fp8:Fp8Format",
        "int8": "sparda_compile.formats.int8:Int8Format",
        "int4": "sparda_compile.formats.int4:Int4Format",
        "values8": "sparda_compile.formats.staying:Values8Format",
        "values4": "sparda_compile.formats.staying:Values4Format",
    },
)


def forecast_rule(selector: str, heads: int) -> str:
    """Return the name of what scores a Forecast where a selector scores a query.

    Args:
        selector: Name of the selector.
        heads: Of the Forecast for each KV head. The scores of one need no softmax, which changes
            no order; several are weighed against each other as query heads are.
    """
    rule: str = selector if heads > 1 else SELECTORS[selector].forecast_selector
    return rule
