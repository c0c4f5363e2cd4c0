"""A compiler that is missing, or does not work, is said in a sentence with the remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from torch._inductor import exc

from sparda_compile.errors import BackendUnavailableError, PassError
from sparda_compile.program.compiler_errors import compiler_errors

PROGRAM = """
import torch
from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import BackendUnavailableError
from sparda_compile.testing import tiny_llama

fast = optimize(tiny_llama(num_layers=1), SpardaConfig(mode="query", top_k=2))
for _ in range(2):
    try:
        fast.generate(torch.ones(1, 20, dtype=torch.int64), max_new_tokens=2)
    except BackendUnavailableError as error:
        print(error)
config = fast.sparda_config.replace(lowering="eager")
print(len(optimize(fast, config).generate(torch.ones(1, 20, dtype=torch.int64), max_length=22)[0]))
"""

NOT_FOUND = (
    'lowering="inductor" needs a C++ compiler on a CPU, and none was found (No working C++ '
    "compiler found in torch._inductor.config.cpp.cxx: (None, '/no/such/compiler')). Install one, "
    'such as g++, set the environment variable CXX to one, or use lowering="eager", which compiles '
    "nothing."
)
NO_HEADERS = (
    'lowering="inductor" needs Python\'s headers to compile C++, and Python.h was not found. '
    "Install them, such as the system's package python3-dev, for the Python that runs this, or use "
    'lowering="eager", which compiles nothing.'
)
DOES_NOT_WORK = (
    'lowering="inductor" needs a C++ compiler on a CPU, and the one that was found failed: disk '
    "is full. Install another, such as g++, set the environment variable CXX to one, or use "
    'lowering="eager", which compiles nothing.'
)


def test_first_call_without_a_compiler_names_the_remedy_and_eager_goes_on(tmp_path):
    environment = os.environ | {
        "CXX": "/no/such/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TORCH_INDUCTOR_INSTALL_GXX", None)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout.splitlines()) == (0, [NOT_FOUND] * 2 + ["22"]), run.stderr


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("fatal error: Python.h: No such file or directory\ncompilation ended.", NO_HEADERS),
        ("first line\ndisk is full\n", DOES_NOT_WORK),
    ],
)
def test_a_compiler_that_fails_is_quoted(output, sentence):
    with pytest.raises(BackendUnavailableError) as caught, compiler_errors():
        raise exc.InductorError(exc.CppCompileError(["g++"], output), None)
    assert str(caught.value) == sentence


def chained(error):
    try:
        raise RuntimeError("outer") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (exc.TritonMissing(None), r"needs Triton.*pip install 'sparda-compile\[gpu\]'.*eager"),
        (exc.InductorError(exc.InvalidCxxCompiler(), None), r"needs a C\+\+ compiler.*CXX"),
        (chained(exc.InvalidCxxCompiler()), r"needs a C\+\+ compiler.*CXX"),
        (exc.CppCompileError(["g++"], ""), "it said nothing"),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "Triton needs a C compiler.*gcc.*CC",
        ),
    ],
)
def test_each_cause_has_a_remedy(error, says):
    with pytest.raises(BackendUnavailableError, match=says) as caught, compiler_errors():
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_pass():
    error = exc.InductorError(ZeroDivisionError("x"), None)
    with pytest.raises(exc.InductorError) as caught, compiler_errors():
        raise error
    assert caught.value is error


def test_an_error_of_ours_stays_what_it_is():
    ours = PassError("a pass")
    ours.__cause__ = exc.InvalidCxxCompiler()
    with pytest.raises(PassError, match=re.escape("a pass")), compiler_errors():
        raise ours


def test_errors_that_cause_each_other_end():
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.inner_exception = other, one
    with pytest.raises(ValueError, match="one"), compiler_errors():
        raise one
