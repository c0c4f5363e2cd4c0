"""A plan that can run: its graph lowered, its weights and streams, its CUDA graphs.

verified graph --lower--> calls of pieces and ops --first run--> proof
"""

from __future__ import annotations

import contextlib
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.forecast.projection import is_input, to_inputs
from sparda_compile.graph.tags import JOINED
from sparda_compile.graph.writer import MAY_HIDE, NUM_PAST, TOKEN_MASK
from sparda_compile.isa.engines import CudaEngine, use_engine
from sparda_compile.kernels.gpu.launch import compile_ahead
from sparda_compile.program.compiler_errors import compiler_errors
from sparda_compile.program.graph_capture import place_of
from sparda_compile.program.host_waits import check_no_host_waits
from sparda_compile.program.joined_weight import JoinedWeight
from sparda_compile.program.kernel_launches import launches_of
from sparda_compile.program.lower import lower
from sparda_compile.program.memory import prompt_memory
from sparda_compile.program.prompt_graphs import (
    MOST_BYTES,
    PromptGraphs,
    is_short,
    num_read,
    rounded_past,
)
from sparda_compile.program.rank_order import order_of
from sparda_compile.program.recording import record_run
from sparda_compile.program.run_proof import check_recording
from sparda_compile.program.step_graph import StepGraph
from sparda_compile.progress import showing, stage
from sparda_compile.sizes import BATCH_SIZE, NUM_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparda_compile.forecast.projection import Projection
    from sparda_compile.isa.engines import Engine
    from sparda_compile.program.lower import LoweredProgram
    from sparda_compile.program.plan import Plan
    from sparda_compile.program.run_proof import RunProof
    from sparda_compile.report.model import PromptMemory
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import CacheLayout

__all__ = ["Program"]

# Of a prompt, whose memory is remembered.
_MOST_SHAPES: Final = 64


class Program:
    """A plan that can run.

    Args:
        plan: What to run.
        forecast: Forecast projections, by target layer.
        engine: Where its streams are; None makes one for the device.

    Attributes:
        proof: What was checked of the first run; None before it.

    Raises:
        KeyError: If a projection is missing.
        UnsupportedInputError: If CUDA graphs are asked for, and the model waits for the CPU.
    """

    def __init__(
        self, plan: Plan, forecast: Mapping[int, Projection], engine: Engine | None = None
    ) -> None:
        self.plan = plan
        self._weights = plan.captured.weights | to_inputs(forecast)
        self._ranks = plan.captured.ranks
        device = plan.captured.device
        self._engine = engine
        if engine is None and device.type == "cuda":
            self._engine = CudaEngine(device)
        replays = device.type == "cuda" and plan.layout.config.cuda_graph
        if replays:
            check_no_host_waits(plan.graph_module.graph)
        is_decode = plan.captured.phase == "decode"
        self._replays = replays and is_decode
        self._prompts = (
            PromptGraphs(self._function, self._failed_in) if replays and not is_decode else None
        )
        self._graphs: weakref.WeakKeyDictionary[KVCache, StepGraph] = weakref.WeakKeyDictionary()
        self._joined: list[JoinedWeight] = []
        # By whether there is a past, the bits of the longest text.
        self._begun_kernels: dict[bool, int] = {}
        self._is_compiled = False
        self._memory: dict[tuple[int, int, bool], PromptMemory] = {}
        self.proof: RunProof | None = None
        self._arguments = [
            self._argument(n) for n in plan.graph_module.graph.nodes if n.op == "placeholder"
        ]

    @property
    def is_compiled(self) -> bool:
        """Whether the program has run, or was compiled ahead."""
        return self._is_compiled

    def compile(self) -> None:
        """Compile now, not at the first step.

        Raises:
            BackendUnavailableError: If there is no compiler that works.
        """
        self._is_compiled = True
        pieces, config = self.lowered.pieces(), self.plan.layout.config
        with showing(config.progress):
            for i, piece in enumerate(pieces):
                what = f"piece of the {self.plan.phase.replace('_', ' ')}"
                with stage("compile", what, done=i + 1, total=len(pieces)):
                    piece.compile(config.lowering)

    def compile_kernels(self, num_tokens: int = 1, num_past: int = 0) -> None:
        """Begin to compile the kernels of one step, in threads; nothing without a GPU.

        To collect the launches is to run the step on fake tensors, and threads that compile take
        Python's time from what runs meanwhile. So it is done once, for a prompt with a past and for
        one without; and again for a text that is twice as long as all before.

        Args:
            num_tokens: Columns of the prompt; 1 for a decode.
            num_past: Most tokens that a sequence of the cache has by then.
        """
        has_past, length = num_past > 0, (num_past + num_tokens).bit_length()
        if length <= self._begun_kernels.get(has_past, 0):
            return
        self._begun_kernels[has_past] = length
        plan, device = self.plan, self.plan.captured.device
        if device.type == "cuda":
            sizes = (plan.layout.batch_size, num_tokens, num_past)
            compile_ahead(launches_of(plan.graph_module.graph, device, *sizes), device)

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that were captured and are alive."""
        steps = sum(graph.is_captured for graph in self._graphs.values())
        return steps if self._prompts is None else len(self._prompts)

    @cached_property
    def lowered(self) -> LoweredProgram:
        """The calls that run; made when first asked for."""
        return lower(self.plan.graph_module, self.plan.layout.config.lowering)

    def prompt_memory(self, num_tokens: int, num_past: int, *, may_hide: bool) -> PromptMemory:
        """Return what a prompt takes, see `memory.prompt_memory`; worked out once for each shape.

        Args:
            num_tokens: Columns, before they are rounded.
            num_past: Most tokens that a sequence has before them.
            may_hide: Whether some token may be padding.
        """
        layout, device = self.plan.layout, self.plan.captured.device
        if is_short(layout.batch_size, num_tokens, device):
            columns = num_read(layout.batch_size, num_tokens, device)
            num_past = rounded_past(num_past, layout.max_tokens)
            num_tokens, may_hide = columns, may_hide or columns > num_tokens
        key = (num_tokens, num_past, may_hide)
        if key not in self._memory:
            if len(self._memory) == _MOST_SHAPES:
                self._memory.clear()
            self._memory[key] = prompt_memory(
                self.plan, num_tokens, num_past, may_hide=may_hide, program=self.lowered
            )
        return self._memory[key]

    def _function(self, *args: Any) -> Tensor:
        if self._engine is None:
            return self._run(args)
        with (
            torch.cuda.device(self.plan.captured.device),
            use_engine(self._engine),
            _launch_errors(self.plan.layout),
            compiler_errors(),
        ):
            return self._run(args)

    def _run(self, args: Sequence[Any]) -> Tensor:
        """Run the calls; the first run is recorded and checked."""
        if self.proof is not None:
            return self.lowered.run(args)
        with self._ranks.together(f"the first run of the {self.plan.phase}") as facts:
            facts |= order_of(self.plan.graph_module.graph)
            self.compile()
        logits, recording = record_run(self.lowered, args)
        with stage("verify"):
            self.proof = check_recording(self.plan.graph_module.graph, recording)
        return logits

    def _argument(self, node: fx.Node) -> Tensor | JoinedWeight | str:
        """Return a weight, or the name of what a call passes in.

        A program that never runs has no copy of weights that are joined.
        """
        captured = self.plan.captured
        joined = JOINED.get(self.plan.graph_module, {})
        if node.name in joined:
            sources = [self._weights[name] for name in joined[node.name]]
            key = tuple(source.data_ptr() for source in sources)
            # Programs of other sizes join the same weights: one copy serves them all.
            weight: JoinedWeight = captured.joined.setdefault(key, JoinedWeight(sources))
            self._joined.append(weight)
            return weight
        if is_input(node.name) or node.name in self._weights:
            return self._weights[node.name]
        return captured.inputs.get(node.name, node.name)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_mask: Tensor | None,
        kv: KVCache,
        *,
        num_hidden: int = 0,
    ) -> Tensor:
        """Run one step.

        Args:
            input_ids: [B, T] int64.
            position_ids: [B, T] int64.
            token_mask: [B, T] bool for a prefill; None where all tokens are real, as in a decode.
            kv: The KV cache; its state is updated.
            num_hidden: How many of T columns are hidden in every sequence, see `prompt_graphs`.

        Returns:
            Logits [B, T or 1, vocabulary].

        Raises:
            CudaGraphError: If the step is captured and does what a CUDA graph cannot hold.
            RanksDisagreeError: If another rank would run another program.
            RankLostError: If another rank is gone, or the process group is.
        """
        self._ranks.check_alive()
        for weight in self._joined:
            weight.refresh()
        num_past, may_hide = kv.most_past, token_mask is not None
        kv.issue(input_ids.shape[1] - num_hidden)
        if self._replays:
            device = self.plan.captured.device
            with torch.cuda.device(device):
                logits = self._step_graph(kv, input_ids, position_ids)(input_ids, position_ids)
                self._ranks.watch_replay(device)
                return logits
        call: dict[str, Any] = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            BATCH_SIZE: input_ids.shape[0],
            NUM_TOKENS: input_ids.shape[1],
            TOKEN_MASK: token_mask,
            NUM_PAST: num_past,
            MAY_HIDE: may_hide,
        }
        if self.plan.captured.phase == "prefill":
            return self._read_prompt(call, kv)
        return self._function(*self._bound(call, kv))

    def _read_prompt(self, call: dict[str, Any], kv: KVCache) -> Tensor:
        device, size = self.plan.captured.device, call[NUM_TOKENS]
        short = is_short(call[BATCH_SIZE], size, device)
        if short:
            call[NUM_PAST] = rounded_past(call[NUM_PAST], self.plan.layout.max_tokens)
        self.compile_kernels(size, call[NUM_PAST])
        if call[TOKEN_MASK] is None:
            call[TOKEN_MASK] = torch.ones_like(call["input_ids"], dtype=torch.bool)
        if self._prompts is None or not short:
            return self._function(*self._bound(call, kv))
        names = ("input_ids", "position_ids", TOKEN_MASK)
        inputs = [call[name] for name in names]
        num_past, may_hide = call[NUM_PAST], call[MAY_HIDE]

        def bind(*tensors: Tensor) -> list[Any]:
            return self._bound(call | dict(zip(names, tensors, strict=True)), kv)

        def fits() -> bool:
            most = 1 << (size - 1).bit_length()  # few sizes are worked out
            memory = self.prompt_memory(most, num_past, may_hide=may_hide)
            return memory.peak_bytes <= MOST_BYTES

        with torch.cuda.device(device):
            logits = self._prompts.run(kv, inputs, (num_past, may_hide), bind, fits)
            self._ranks.watch_replay(device)
            return logits

    def _failed_in(self) -> str:
        """Leave a capture that has failed; returns which call of the program it failed in."""
        if isinstance(self._engine, CudaEngine):
            self._engine.forget()
        failed, self.lowered.failed = self.lowered.failed, None
        return f" of the {self.plan.phase}{place_of(failed)}"

    def _bound(self, call: Mapping[str, Any], kv: KVCache) -> list[Any]:
        def value(argument: Tensor | JoinedWeight | str) -> Any:
            if isinstance(argument, JoinedWeight):
                return argument.tensor
            if isinstance(argument, Tensor):
                return argument
            return call[argument] if argument in call else kv.state[argument]

        return [value(argument) for argument in self._arguments]

    def _step_graph(self, kv: KVCache, *inputs: Tensor) -> StepGraph:
        if kv not in self._graphs:
            ids, positions = (t.clone() for t in inputs)
            call = {"input_ids": ids, "position_ids": positions, BATCH_SIZE: ids.shape[0]}
            arguments = self._bound(call, kv)
            self._graphs[kv] = StepGraph(
                self._function, arguments, (ids, positions), failed_in=self._failed_in
            )
        return self._graphs[kv]


@contextlib.contextmanager
def _launch_errors(layout: CacheLayout) -> Iterator[None]:
    """Say it in a sentence when a kernel asks for more than the GPU has."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        dims = sorted({shape.head_dim for shape in layout.layers})
        raise UnsupportedInputError(
            f"a kernel for block_size={layout.config.block_size} and head_dim "
            f"{', '.join(map(str, dims))} does not fit this GPU ({error}). Use a smaller "
            "block_size, down to 16, or a model in half precision."
        ) from error
