"""A driver of a GPU that is not there, an H200 by default: launches compile, and nothing runs.

For programs of their own, since the tests' process has Triton's interpreter on.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction


class OnPaper:
    """A driver of a GPU that is not there."""

    def __init__(self, arch=90):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(note, arch=90):
    """Let each launch compile its kernel for a GPU and tell `note` its name and what was built.

    Kernels are to be imported behind this call.
    """

    def launcher(kernel, grid):
        def launch(*args, **options):
            note(kernel.__name__, kernel.warmup(*args, grid=grid, **options))

        return launch

    triton.runtime.driver.set_active(OnPaper(arch))
    JITFunction.__getitem__ = launcher


class _Laid(Exception):  # noqa: N818
    """A kernel's tensors have their layouts, which are its text."""


def lay_out_only(note):
    """Let each launch compile its kernel as far as layouts go, and tell `note` its name and those.

    What is behind them, down to instructions, takes three quarters of the time.
    """

    def stop(backend, module, *_):
        raise _Laid(str(module))

    def note_layouts(kernel, grid):
        def launch(*args, **options):
            try:
                kernel.warmup(*args, grid=grid, **options)
            except _Laid as laid:
                note(kernel.__name__, str(laid))

        return launch

    triton.runtime.driver.set_active(OnPaper())
    JITFunction.__getitem__ = note_layouts
    CUDABackend.make_llir = stop
