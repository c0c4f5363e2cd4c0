"""`sparda bench prr`: what predict, reuse and repair gain in one layer of a decode step.

    <shape> <n> tokens batch <b>   selection and attention, by overlap: `prr_layer.py`
    attention                      attention alone, by tokens and block sizes: `prr_kernels.py`
    selection <shape>              selection alone, by context
    prediction <shape>             update and prediction alone, by context
    summary                        the bars, over all shapes: `prr_summary.py`

The most important part comes first, and each is written as soon as it is there.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.bench.prr_case import DecodeShape
from sparda_compile.bench.prr_kernels import bench_attention, bench_prediction, bench_selection
from sparda_compile.bench.prr_layer import LayerSetting, measure_layer
from sparda_compile.bench.prr_summary import bars
from sparda_compile.bench.shapes import SHAPES
from sparda_compile.bench.suite import Part, run_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from sparda_compile.bench.result_file import ResultFile

__all__ = ["BATCHES", "SUMMARY", "TOKENS", "PrrBench", "PrrSetting"]

# The most important first.
TOKENS: Final = (131072, 524288, 65536, 16384)
BATCHES: Final = (1, 16, 4)
SUMMARY: Final = "summary"
_SELECTION_TOKENS: Final = (16384, 32768, 65536, 131072, 262144, 524288)
# Minutes on one H200, roughly, with what is compiled.
_LAYER_MINUTES: Final = 0.2
_ATTENTION_MINUTES: Final = 0.8
_ALONE_MINUTES: Final = 0.3


@dataclasses.dataclass(frozen=True)
class PrrSetting:
    """What is measured.

    Attributes:
        shapes: Keys of `SHAPES`.
        tokens: Contexts, the most important first.
        batches: Sequences, the most important first.
        layer: Of each of them.
        contexts: Of what is measured alone.
        sizes: Fields of `DecodeShape` that are not the default.
    """

    shapes: tuple[str, ...] = ("8b", "8b-8kv")
    tokens: tuple[int, ...] = TOKENS
    batches: tuple[int, ...] = BATCHES
    layer: LayerSetting = dataclasses.field(default_factory=LayerSetting)
    contexts: tuple[int, ...] = _SELECTION_TOKENS
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def head(self) -> dict[str, Any]:
        """Return what results have to have in common to stand in one file."""
        fields = dataclasses.asdict(self.layer)
        return {"name": "prr", **{k: list(v) for k, v in fields.items() if isinstance(v, tuple)}}

    def shape(self, name: str, tokens: int, batch: int = 1) -> DecodeShape:
        """Return the sizes of a model's layer."""
        model = SHAPES[name]
        heads = {"heads": model.num_heads, "groups": model.num_groups, "dim": model.head_dim}
        return DecodeShape(**{"tokens": tokens, "batch": batch, **heads, **self.sizes})


class PrrBench:
    """Measures parts and writes them.

    Args:
        setting: What.
        file: Gets each result; what it holds is not measured again.
        device: Where.
        say: Told what is going on.
    """

    def __init__(
        self,
        setting: PrrSetting,
        file: ResultFile,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.setting, self.file, self.device, self.say = setting, file, device, say

    @cached_property
    def gbps(self) -> float:
        """The rate of a large copy on the device."""
        from sparda_compile.bench.kernels import bench_copy

        self.say("device copy")
        return float(bench_copy(self.device)["gbps"])

    def run(self, minutes: float) -> list[dict[str, Any]]:
        """Measure what is not there yet; return what became of each part.

        Args:
            minutes: Time for all of them.
        """
        torch.manual_seed(0)
        return run_parts(self.parts(), minutes, self.say, lambda found: None)

    def is_done(self) -> bool:
        """Return whether everything is there."""
        return all(part.is_done() for part in self.parts())

    def parts(self) -> list[Part]:
        """Return all parts: what the bars are about, the rest of the first context, then others."""
        setting = self.setting
        first, *rest = [self._layers(tokens) for tokens in setting.tokens]
        alone = [
            self._part(f"{what} {name}", _ALONE_MINUTES, partial(measure, name))
            for name in setting.shapes
            for what, measure in (("selection", self._selection), ("prediction", self._prediction))
        ]
        attention = self._part("attention", _ATTENTION_MINUTES, self._attention)
        main = 2 * len(setting.shapes)
        later = [part for parts in rest for part in parts]
        return [*first[:main], attention, *alone, *first[main:], *later]

    def _layers(self, tokens: int) -> list[Part]:
        """Return the parts of a context, the most important batch first."""
        return [
            self._part(
                f"{name} {tokens} tokens batch {batch}",
                _LAYER_MINUTES,
                partial(self._layer, name, tokens, batch),
            )
            for batch in self.setting.batches
            for name in self.setting.shapes
        ]

    def _part(self, name: str, minutes: float, measure: Callable[[], dict[str, Any]]) -> Part:
        def run() -> None:
            self.file.save({"part": name, **measure()})
            found = bars(self.file.results)
            if found is not None:
                self.file.save({"part": SUMMARY, **found})

        return Part(name, minutes, partial(self.file.has, name), run)

    def _layer(self, name: str, tokens: int, batch: int) -> dict[str, Any]:
        shape, first = self.setting.shape(name, tokens, batch), self.setting.tokens[0]
        setting = dataclasses.replace(self.setting.layer, compiles=tokens == first)
        found = measure_layer(self.device, shape, setting, self.gbps, self.say)
        return {"shape": name, "tokens": tokens, "batch": batch, "copy_gbps": self.gbps, **found}

    def _attention(self) -> dict[str, Any]:
        return bench_attention(self.device, self.gbps, self.say)

    def _contexts(self, name: str) -> list[DecodeShape]:
        return [self.setting.shape(name, tokens) for tokens in self.setting.contexts]

    def _selection(self, name: str) -> dict[str, Any]:
        return bench_selection(self.device, self._contexts(name), self.gbps, self.say)

    def _prediction(self, name: str) -> dict[str, Any]:
        return bench_prediction(self.device, self._contexts(name), self.say)
