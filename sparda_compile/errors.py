"""Every exception of sparda_compile, in one place.

A message says what is wrong, what was got, what is allowed and what to do.
"""

from __future__ import annotations

__all__ = [
    "AttentionNotFoundError",
    "BackendUnavailableError",
    "BypassError",
    "CaptureError",
    "ConfigError",
    "CudaGraphError",
    "DevicePoolFullError",
    "GraphInvariantError",
    "HostPoolFullError",
    "KVCacheError",
    "ModelChangedError",
    "PassError",
    "RankLostError",
    "RanksDisagreeError",
    "SpardaError",
    "TransferRaceError",
    "UnsupportedInputError",
]


class SpardaError(Exception):
    """Base class of every error that this library raises on purpose."""


class ConfigError(SpardaError, ValueError):
    """A setting has a value that is not allowed, alone or together with another."""


class CaptureError(SpardaError):
    """torch.compile could not trace the model's forward as one graph."""


class AttentionNotFoundError(SpardaError):
    """The model has no attention, or an attention that this library does not implement."""


class PassError(SpardaError):
    """A pass failed, was run twice, or was run before what it requires."""


class GraphInvariantError(PassError):
    """A rewritten graph breaks the grammar of sparda graphs; always a bug of ours."""


class TransferRaceError(GraphInvariantError):
    """Two accesses that conflict are not ordered; names both nodes."""


class UnsupportedInputError(SpardaError, ValueError):
    """An argument of a call is outside what the optimized module accepts."""


class BypassError(UnsupportedInputError, AttributeError):
    """Something was asked of the module that would run or change the model behind its back."""


class ModelChangedError(UnsupportedInputError):
    """The model is no longer what it was when it was optimized; names what changed."""


class BackendUnavailableError(SpardaError, ImportError):
    """A package, a device or a compiler that this call needs is not there or does not work."""


class RanksDisagreeError(SpardaError):
    """The ranks of a process group were given different things, or one of them raised an error."""


class RankLostError(SpardaError, RuntimeError):
    """A rank of the process group is gone or did not come in time, or the group itself is gone."""


class CudaGraphError(SpardaError, RuntimeError):
    """A step could not be captured in a CUDA graph; says where, and what torch says of it."""


class KVCacheError(SpardaError):
    """The KV cache was used in a way that it cannot serve."""


class HostPoolFullError(KVCacheError):
    """The KV cache needs more CPU memory than it may have."""


class DevicePoolFullError(KVCacheError):
    """The KV cache needs more device memory than it may have."""
