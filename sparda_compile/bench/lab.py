"""A model that all measurements of a shape share.

Making the 8b model takes half a minute, and so does compiling each of its programs; so one `Lab`
serves every batch size.
"""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.bench.budget import bench_budget, plan_budget
from sparda_compile.bench.decode import DecodeBench, DecodeSetting
from sparda_compile.bench.memory import GIB, FreeMemory, free_everything, layout_of, misfits
from sparda_compile.bench.programs import KNOBS
from sparda_compile.bench.shapes import SHAPES, build_model
from sparda_compile.bench.sharing import louder_tokens
from sparda_compile.program.captures import Captures

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from sparda_compile.bench.prefill import PrefillSetting
    from sparda_compile.bench.prompt_floor import Rates
    from sparda_compile.bench.prompt_programs import PromptPrograms
    from sparda_compile.bench.result_file import ResultFile
    from sparda_compile.bench.turns import TurnSetting

__all__ = ["Lab"]


class Lab:
    """Measures one shape.

    Args:
        name: A key of `SHAPES`.
        say: Told what is going on.
        device: Where the model is made.
        max_host_bytes: Most CPU memory for KV; None is all that the machine has.
    """

    def __init__(
        self,
        name: str,
        say: Callable[[str], None],
        device: str = "cuda",
        max_host_bytes: int | None = None,
    ) -> None:
        self.name = name
        self.shape = SHAPES[name]
        self.say = say
        self.device = torch.device(device)
        self.max_host_bytes = max_host_bytes

    @cached_property
    def model(self) -> nn.Module:
        """The model, bf16."""
        self.say(f"building the {self.name} model")
        torch.manual_seed(0)
        return build_model(self.shape, self.device, torch.bfloat16)

    @cached_property
    def captures(self) -> Captures:
        """The model's forward, traced once."""
        captures = Captures(self.model, {})
        self.say("tracing decode")
        captures.get("decode", last_logits_only=True)
        return captures

    @cached_property
    def prompts(self) -> PromptPrograms:
        """The programs that read prompts."""
        from sparda_compile.bench.prompt_programs import PromptPrograms

        return PromptPrograms(self.model, self.say)

    @cached_property
    def rates(self) -> Rates:
        """What the GPU does at best."""
        from sparda_compile.bench.prompt_floor import Rates

        self.say("a matrix product, and a copy to CPU memory")
        return Rates.measure(self.device)

    def _configure(self, settings: dict[str, Any]) -> None:
        """Let the prompts' programs have settings, and no more CPU memory than there is."""
        # The traced decode holds weights that were joined; whoever needs it traces it again.
        self.__dict__.pop("captures", None)
        free_everything()
        host_bytes = max(self.room().host, 1)
        self.prompts.configure(host_bytes=host_bytes, **settings)

    def free(self) -> FreeMemory:
        """Return what KV caches may take now, with the model on the device."""
        assert self.captures
        return self.room()

    def room(self) -> FreeMemory:
        """Return what may be taken now."""
        return FreeMemory.now(self.max_host_bytes)

    def clock(self) -> float:
        """Return seconds, to keep within a time."""
        return time.monotonic()

    def decode(
        self,
        setting: DecodeSetting,
        save: Callable[[dict[str, Any]], None],
        *,
        with_baselines: bool,
    ) -> dict[str, Any]:
        """Measure one batch size.

        Args:
            setting: What to measure; variants that do not fit are left out.
            save: Given what there is after each overlap, and the result.
            with_baselines: Whether to measure transformers' caches too.

        Returns:
            The result.
        """
        layouts = {
            variant: layout_of(
                self.shape,
                variant,
                setting.batch_size,
                setting.max_tokens,
                setting.trace_steps,
                **setting.settings,
            )
            for variant in setting.variants
            if variant in KNOBS
        }
        skipped = misfits(setting.variants, layouts, self.free())
        for variant, reason in skipped.items():
            self.say(f"batch {setting.batch_size}: {variant} is left out: {reason}")
        result: dict[str, Any] = {
            "batch_size": setting.batch_size,
            "max_tokens": setting.max_tokens,
            "by_overlap": {},
            "skipped": skipped,
        }
        if "scheduled" in skipped:
            save(result)
            return result
        kept = tuple(variant for variant in setting.variants if variant not in skipped)
        bench = DecodeBench(self.captures, dataclasses.replace(setting, variants=kept), self.say)
        bench.check()
        for found in bench.measure():
            result |= found
            save({**result, "unfinished": "more is still to be measured"})
        if with_baselines:
            from sparda_compile.bench.baselines import bench_baselines

            result["baselines"] = bench_baselines(bench, self.model, self.shape, self.free())
        save(result)
        del bench
        free_everything()
        return result

    def budget(
        self, gib: float, setting: DecodeSetting, save: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Measure one budget of device memory for KV; `save` is given the result."""
        budget = round(gib * GIB)
        plan = plan_budget(self.shape, setting, budget, self.free())
        result = bench_budget(self.captures, plan, budget, setting, self.say)
        save(result)
        return result

    def prefill(self, setting: PrefillSetting, file: ResultFile) -> list[dict[str, Any]]:
        """Measure prompts; the file gets each result, and what it holds is not measured again."""
        from sparda_compile.bench.prefill import PrefillBench

        self._configure(setting.settings)
        bench = PrefillBench(self.prompts, self.shape, self.rates, setting, self.say, self.clock)
        with louder_tokens(self.model):
            return bench.measure(file)

    def turns(self, setting: TurnSetting, file: ResultFile) -> list[dict[str, Any]]:
        """Measure turns; the file gets each result, and what it holds is not measured again."""
        from sparda_compile.bench.turns import TurnBench

        self._configure(setting.settings)
        bench = TurnBench(self.prompts, self.shape, self.room, setting, self.say)
        with louder_tokens(self.model):
            return bench.measure(file)
