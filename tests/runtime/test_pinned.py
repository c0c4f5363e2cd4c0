"""Pinned memory against a driver that is made up; what a real one does is in e2e/test_cuda.py."""

from __future__ import annotations

import ctypes
import gc
import mmap

import pytest
import torch

from sparda_compile.errors import HostPoolFullError, UnsupportedInputError
from sparda_compile.runtime import pinned
from sparda_compile.runtime.numa import Placement
from sparda_compile.runtime.pinned import PinnedMemory, check_host_access

PAGE = mmap.PAGESIZE
MIB = 1 << 20


class FakeDriver:
    """libcuda with one function."""

    def __init__(self, status, value):
        self.status, self.value = status, value
        self.asked = []

    def cuDeviceGetAttribute(self, answer, attribute, ordinal):  # noqa: N802
        self.asked.append((attribute, ordinal))
        answer._obj.value = self.value
        return self.status


@pytest.fixture
def driver(monkeypatch):
    """Return a function that puts a driver in the place of libcuda."""

    def install(status=0, value=1):
        fake = FakeDriver(status, value)
        libraries = {"libcuda.so.1": fake}
        monkeypatch.setattr(pinned.ctypes, "CDLL", libraries.__getitem__)
        return fake

    return install


@pytest.mark.parametrize(("device", "ordinal"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_device_that_reads_host_addresses_is_accepted(driver, device, ordinal):
    fake = driver()
    check_host_access(torch.device(device))
    # CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    assert fake.asked == [(91, ordinal)]


@pytest.mark.parametrize(("status", "value"), [(0, 0), (101, 0), (101, 1)])
def test_device_that_does_not_is_refused(driver, status, value):
    driver(status, value)
    wanted = rf"cuda:1 cannot read .* \(driver status {status}, attribute {value}\)"
    with pytest.raises(UnsupportedInputError, match=wanted) as caught:
        check_host_access(torch.device("cuda:1"))
    assert "offload='never'" in str(caught.value)


def _no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("library", "cause"),
    [(_no_library, "cannot open shared"), (lambda name: object(), "Attribute")],
)
def test_machine_without_a_driver_is_told(monkeypatch, library, cause):
    monkeypatch.setattr(pinned.ctypes, "CDLL", library)
    with pytest.raises(UnsupportedInputError, match=r"cannot be asked .* offload='never'") as error:
        check_host_access(torch.device("cuda"))
    assert isinstance(error.value.__cause__, (OSError, AttributeError))
    assert cause in str(error.value) or cause in type(error.value.__cause__).__name__


class FakeRuntime:
    """cudart: what is registered now, and every call."""

    def __init__(self, status=0):
        self.status = status
        self.registered = {}
        self.calls = []

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802
        self.calls.append("register")
        assert flags == 0
        if self.status == 0:
            # Registered memory has its pages, all of them zero.
            assert ctypes.string_at(address, num_bytes) == bytes(num_bytes)
            self.registered[address] = num_bytes
        return self.status

    def cudaHostUnregister(self, address):  # noqa: N802
        self.calls.append("unregister")
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    """Return a function that puts a CUDA runtime in the place of torch's."""

    def install(status=0):
        fake = FakeRuntime(status)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: fake.calls.append("synchronize"))
        return fake

    return install


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(1, PAGE), (PAGE - 1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (5 * PAGE + 7, 6 * PAGE)],
)
def test_size_is_rounded_to_the_page_and_no_further(runtime, asked, taken):
    fake = runtime()
    region = PinnedMemory(asked)
    assert region.num_bytes == taken
    assert fake.registered == {region.tensor.data_ptr(): taken}
    assert region.tensor.shape == (asked,)
    assert region.tensor.dtype == torch.uint8
    assert not region.tensor.any()
    region.tensor.fill_(3)
    assert region.tensor.sum() == 3 * asked


def test_memory_is_unpinned_once_and_behind_the_gpu(runtime):
    fake = runtime()
    region = PinnedMemory(100)
    region.close()
    assert fake.registered == {}
    assert fake.calls == ["register", "synchronize", "unregister"]
    region.close()
    del region
    gc.collect()
    assert fake.calls == ["register", "synchronize", "unregister"]


def test_memory_that_nobody_holds_is_unpinned(runtime):
    fake = runtime()
    first, second = PinnedMemory(100), PinnedMemory(100)
    kept = second.tensor.data_ptr()
    del first
    gc.collect()
    assert fake.registered == {kept: PAGE}
    second.close()


def test_driver_gives_memory_back_by_itself_when_the_interpreter_ends(runtime, monkeypatch):
    fake = runtime()
    region = PinnedMemory(100)
    with monkeypatch.context() as patch:
        patch.setattr(pinned.sys, "is_finalizing", lambda: True)
        region.__del__()
    assert fake.calls == ["register"]
    region.close()
    assert fake.registered == {}


def test_driver_that_refuses_is_named(runtime):
    fake = runtime(status=2)
    with pytest.raises(HostPoolFullError, match=r"refused to pin 3 MiB .* error 2\).*ulimit -l"):
        PinnedMemory(3 * MIB)
    gc.collect()
    # What was never registered is not given back either.
    assert fake.calls == ["register"]


def test_machine_that_refuses_is_named(runtime, monkeypatch):
    fake = runtime()

    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned.mmap, "mmap", refuse)
    with pytest.raises(HostPoolFullError, match=r"refused 3 MiB .* \(.*Cannot allocate memory\)"):
        PinnedMemory(3 * MIB)
    gc.collect()
    assert fake.calls == []


def test_machine_without_huge_pages_gives_the_same(runtime, monkeypatch):
    fake = runtime()
    monkeypatch.delattr(pinned.mmap, "MADV_HUGEPAGE", raising=False)
    region = PinnedMemory(100)
    assert fake.registered == {region.tensor.data_ptr(): PAGE}
    region.close()


def test_memory_near_a_gpu_is_touched_there_first(runtime, monkeypatch):
    runtime()
    touched = []
    monkeypatch.setattr(Placement, "zero", lambda self, *where: touched.append(where))
    region = PinnedMemory(PAGE + 1, Placement("near", frozenset({0})))
    assert touched == [(region.tensor.data_ptr(), 2 * PAGE)]
    region.close()
    PinnedMemory(PAGE, Placement("not known")).close()
    assert len(touched) == 1
