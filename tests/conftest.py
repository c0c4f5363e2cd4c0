"""Environment and fixtures that every test shares."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import random
import re
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

# In tests/plugins.
pytest_plugins = ("quick_interpreter", "quick_session")

PACKAGE_DIR = str(Path(__file__).resolve().parents[1] / "sparda_compile") + os.sep
HAS_CUDA = torch.cuda.is_available()

# Read when they are imported, so they have to be set before Triton and transformers are; torch
# imports neither.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tracing tiny models takes most of the time of a run. Dynamo's cache of fake tensors costs more
# than it saves where few nodes are alike, and so do Python's frequent searches for garbage.
os.environ["TORCH_FAKE_TENSOR_DISPATCH_CACHE"] = "0"
gc.set_threshold(50_000, 20, 100)

torch.set_num_threads(1)

# Interpreted kernels and compilation take longer than Hypothesis's deadline allows.
hypothesis.settings.register_profile("sparda", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparda")


# The modules that take longest, longest first: begun last, one would keep a worker busy alone. The
# first one does so in the first run alone, see `kept_folder`.
SLOWEST = (
    "kernels/gpu/test_compile_for_h200.py",
    "e2e/test_compiled.py",
    "e2e/test_ranks.py",
    "e2e/test_sparse_prefill.py",
    "e2e/test_models.py",
    "e2e/test_bit_equal.py",
    "e2e/test_ema.py",
    "e2e/test_reference.py",
    "e2e/test_speculate.py",
    "bench/test_predicted.py",
    "passes/test_mutants.py",
)


def turn(item: pytest.Item) -> int:
    """Return when a test's module is to begin."""
    path = item.path.as_posix()
    return next((i for i, name in enumerate(SLOWEST) if path.endswith(name)), len(SLOWEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest modules; skip what needs a GPU, or the real model, where it is not."""
    from sparda_compile.cli.real_model import has_real_model

    items.sort(key=turn)
    reasons = {} if HAS_CUDA else {"gpu": "needs a CUDA GPU"}
    reasons |= {} if has_real_model() else {"real_model": "needs smollm2: make real-model"}
    for item in items:
        for name in filter(item.get_closest_marker, reasons):
            item.add_marker(pytest.mark.skip(reason=reasons[name]))


@pytest.fixture(scope="session")
def kept_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that names a folder for the next run to find, if pytest keeps any."""
    cache = getattr(pytestconfig, "cache", None)
    return cache.mkdir if cache else tmp_path_factory.mktemp


@pytest.fixture(scope="session", autouse=True)
def _inductor_cache(kept_folder: Any) -> Iterator[None]:
    """Keep compiled code out of the user's cache; all workers and runs share one folder.

    Inductor finds code by a hash of the graph, its settings and torch itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept_folder("inductor")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_line_of_progress() -> Iterator[None]:
    """Each of a plan's 18 stages would start a thread that waits to say so, and end it.

    The tests of the line itself show one of their own; subprocesses show theirs.
    """
    from sparda_compile.progress import showing

    with showing(False):
        yield


@pytest.fixture(scope="module", autouse=True)
def _older_objects_are_left_out() -> None:
    """Let a search for garbage look at what this module's tests have made, not at all there is."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_llama() -> nn.Module:
    """Return the tiny Llama, for tests that leave it as it is."""
    from sparda_compile.testing import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def traced_llama(shared_llama: nn.Module) -> Any:
    """Return the tiny Llama, traced: optimize it again for the configuration that a test needs."""
    from sparda_compile import SpardaConfig, optimize

    return optimize(shared_llama, SpardaConfig(mode="dense", lowering="eager"))


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """Return what transformers logs as a warning or worse, which it does not propagate."""
    from transformers.utils import logging as transformers_logging

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keeper = Keep(logging.WARNING)
    logger = logging.getLogger("transformers")
    # What is said once in a process is to be said to each test.
    for name in ("warning_once", "warning_advice"):
        getattr(getattr(logging.Logger, name, None), "cache_clear", lambda: None)()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(keeper)
    try:
        yield messages
    finally:
        logger.removeHandler(keeper)
        transformers_logging.set_verbosity(before)


@pytest.fixture
def no_deprecations(transformers_log: list[str]) -> Iterator[None]:
    """Fail where a test meets a name that is going away, or a warning of transformers."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        yield
    assert transformers_log == []


@pytest.fixture(scope="session")
def models_page() -> ModelsPage:
    """Return docs/models.md as rows, which the tests that trace the models compare."""
    return ModelsPage(Path(__file__).resolve().parents[1] / "docs" / "models.md")


class ModelsPage:
    """The tables of docs/models.md: what was covered, and what was refused."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, tuple[str, ...]]:
        """Return the cells of each model's row, by the name of its class."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        cells = [tuple(line[2:-2].split(" | ")) for line in lines if line.startswith("| `")]
        return {row[0].strip("`"): row for row in cells}

    @staticmethod
    def sites(sites: Iterable[Any]) -> str:
        """Return what the page says of a model's attentions."""
        kinds = [site.kind for site in sites]
        found = f"{kinds.count('sparse')} sparse"
        return found + (f", {kinds.count('window')} window" if "window" in kinds else "")

    @staticmethod
    def reason(model: Any, error: str) -> str:
        """Return what a refusal says of the model, without names, numbers and advice."""
        reason = error.partition("does not implement: ")[2] or error
        reason = re.split(r"\. |; |, which ", reason)[0]
        reason = re.sub(rf"^{type(model).__name__}:? ", "", reason)
        return re.sub(r" \([^)]*\)", "", reason).removesuffix(".")


@pytest.fixture(scope="session")
def decode_trace() -> SimpleNamespace:
    """Return the events of two replays of a decode step, the plan's nodes and its schedule."""
    from sparda_compile.profiling.kernel_trace import PlannedNode
    from sparda_compile.report.schedule import Schedule, ScheduleRow

    path = Path(__file__).parent / "data" / "decode_trace.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(ScheduleRow(*row) for row in plain["schedule"].pop("rows"))
    choices = tuple(plain["schedule"].pop("choices"))
    return SimpleNamespace(
        events=plain["traceEvents"],
        nodes=tuple(
            PlannedNode(node, op, layer, stream, tuple(kernels), event)
            for node, op, layer, stream, kernels, event in plain["nodes"]
        ),
        schedule=Schedule(rows=rows, choices=choices, **plain["schedule"]),
    )


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seed before each test; drop what torch.compile remembers after it."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    # Without a GPU, `torch.manual_seed` would note the stack for each kind of device that may come.
    if HAS_CUDA:
        torch.cuda.manual_seed_all(0)
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialized_memory() -> Iterator[None]:
    """Fill memory that the package allocates uninitialized, so that an unwritten byte shows.

    One patch for the session, not one for each test: Dynamo's guards compare functions by
    identity, so a model compiled for a whole module would be compiled again for each test.
    """
    # `with torch.device(...)` knows the functions that allocate by identity: it must have looked
    # at them before they are patched.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", _poisoned_method(torch.Tensor.new_empty))
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE_DIR):
            _fill(result)
        return result

    # Dynamo traces what this attribute holds in place of the function.
    poisoned._torchdynamo_inline = allocate  # type: ignore[attr-defined]
    return poisoned


def _poisoned_method(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(tensor: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            # Dynamo cannot reach the method that this one hides; this is the same allocation.
            return torch.empty(*size, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})
        result = allocate(tensor, *size, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE_DIR):
            _fill(result)
        return result

    return poisoned


def _fill(tensor: torch.Tensor) -> None:
    # A dispatch mode would record the fill, and a fake, functional or meta tensor has no bytes.
    is_real = type(tensor) is torch.Tensor and tensor.device.type == "cpu"
    if not is_real or torch._C._len_torch_dispatch_stack():
        return
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.detach().fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        limits = torch.iinfo(tensor.dtype)
        tensor.fill_(limits.min or limits.max)


@functools.cache
def _captures(model):
    from sparda_compile.capture.causal_lm import as_causal_lm, sliding_windows
    from sparda_compile.program.captures import Captures
    from sparda_compile.testing import build

    causal_lm = as_causal_lm(build(model))
    return Captures(causal_lm, sliding_windows(causal_lm))


@functools.cache
def _plan(model, phase, batch_size, max_tokens, config):
    from sparda_compile.program.plan import make_plan

    return make_plan(_captures(model), phase, config, batch_size=batch_size, max_tokens=max_tokens)


@pytest.fixture(scope="session")
def captures_of():
    """Return the traced forwards of a tiny model, by name."""
    return _captures


@pytest.fixture(scope="session")
def plan_of():
    """Return a function that plans a tiny model; its plans are shared, so tests copy graphs.

    A repair of a tiny model is too short to be hidden: it is, unless a test says otherwise.
    """
    from sparda_compile.config import SpardaConfig

    def plan(model="llama", phase="decode", *, batch_size=1, max_tokens=8192, **settings):
        if settings.get("mode") == "exact":
            settings = {"attend_before_repair": "always", **settings}
        return _plan(model, phase, batch_size, max_tokens, SpardaConfig(**settings))

    return plan


@pytest.fixture(scope="session")
def context_of():
    """Return a function that gives what the passes of a plan knew."""
    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.machine import MACHINES

    def context(plan):
        layout, phase = plan.layout, plan.phase
        return PassContext(layout.config, phase, {}, "Model", layout, MACHINES["h200"])

    return context


class _Counted(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and alive."""

    def __init__(self, given):
        super().__init__()
        self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size


@pytest.fixture
def counted_bytes() -> type[_Counted]:
    """Return a context that counts the bytes of tensors made inside: `peak` is the most at once.

    It takes the tensors that are not counted.
    """
    return _Counted


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(level.alphabet()))}, []))
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=turns)
