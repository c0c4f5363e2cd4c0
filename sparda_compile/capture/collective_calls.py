"""What a forward calls of torch.distributed, as ops of ours; and what it asks of DTensors.

transformers' tensor parallelism sums with `dist.all_reduce`, and redistributes DTensors around
embeddings and heads. Each becomes `sparda::all_reduce` or `sparda::all_gather`, and so do
functional collectives. Device meshes stay constants of the trace: a node has the group's name.

    embedding(ids, Shard(0))   rows of this rank's part of the vocabulary, 0 for ids of other ranks
    redistribute               all_reduce of a sum, all_gather of shards, a part of what all have

torch's own `redistribute` takes other calls for other sizes, so a run on fake tensors has this one.

Other functions of a DTensor are refused: what they would communicate is not known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from sparda_compile.errors import CaptureError
from sparda_compile.graph.fake_runner import leaves_of, root_of
from sparda_compile.ranks import collectives
from sparda_compile.ranks.shards import is_sharded, local_of, shard_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.overrides import TorchFunctionMode

__all__ = [
    "CollectiveCall",
    "SummedInPlace",
    "collective_call",
    "has_sharded",
    "of_sharded",
    "redistributing",
]

_FUNCTIONAL: Final = "_c10d_functional"
_SUMS: Final = ("sum", "SUM")


@dataclasses.dataclass(frozen=True)
class CollectiveCall:
    """A collective that a forward calls.

    Attributes:
        op: The op of ours that does the same; None for a wait, which returns what it is given.
        args: Its arguments; the first is the tensor.
        is_in_place: Whether the tensor itself becomes the result.
    """

    op: Any
    args: tuple[Any, ...]
    is_in_place: bool = False


class SummedInPlace:
    """Tensors that `dist.all_reduce` has changed in place, in a run on fake tensors.

    A graph has a new value for each. What shared its memory from before would still be the summand,
    so it may not be used any more.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, Tensor] = {}
        self._allowed: dict[int, set[int]] = {}

    def add(self, tensor: Tensor) -> None:
        """Note a tensor that now is a sum."""
        self._by_storage[tensor.untyped_storage()._cdata] = tensor
        self._allowed[id(root_of(tensor))] = {id(tensor)}

    def known(self, tensor: Tensor) -> Tensor:
        """Return a sum for a view of all of it; an autograd function returns its input as one."""
        mine = self._by_storage.get(tensor.untyped_storage()._cdata) if self._by_storage else None
        is_same = mine is not None and mine.shape == tensor.shape
        if mine is None or not is_same or mine.stride() != tensor.stride():
            return tensor
        return tensor if id(tensor) in self._allowed[id(root_of(mine))] else mine

    def follow(self, args: Any, kwargs: Any, result: Any) -> None:
        """Take in a call that comes behind.

        Raises:
            CaptureError: If it is given what shared memory with a tensor before that became a sum.
        """
        if not self._allowed:
            return
        for leaf in leaves_of((args, kwargs)):
            allowed = self._allowed.get(id(root_of(leaf))) if isinstance(leaf, Tensor) else None
            if allowed is not None and id(leaf) not in allowed:
                raise CaptureError(
                    "it uses a view of a tensor that all_reduce changes in place; make the view "
                    "behind it"
                )
        for leaf in leaves_of(result):
            allowed = self._allowed.get(id(root_of(leaf))) if isinstance(leaf, Tensor) else None
            if allowed is not None:
                allowed.add(id(leaf))


def collective_call(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CollectiveCall | None:
    """Return what a call of torch.distributed is as an op of ours; None for any other call.

    Raises:
        CaptureError: If there is no such op.
    """
    space, name = _name_of(function)
    if space == _FUNCTIONAL and name == "wait_tensor":
        return CollectiveCall(None, (args[0],))
    if space == _FUNCTIONAL and name == "all_reduce" and args[1] in _SUMS:
        group = args[2]
        op = torch.ops.sparda.all_reduce.default
        return CollectiveCall(op, (args[0], _size_of(group), group))
    if space == _FUNCTIONAL and name == "all_gather_into_tensor":
        return CollectiveCall(torch.ops.sparda.all_gather.default, (args[0], *args[1:]))
    if space == "dist" and name == "all_reduce":
        return _reduced_in_place(*args, **kwargs)
    if space:
        raise CaptureError(
            f"it calls {name} of torch.distributed, which has no op here; a program may sum with "
            "all_reduce and gather with all_gather, as the plans colwise, rowwise, "
            "embedding_rowwise and colwise_gather_output of transformers do"
        )
    return None


def _reduced_in_place(
    tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False
) -> CollectiveCall:
    if async_op or op not in (None, dist.ReduceOp.SUM):
        raise CaptureError("it calls all_reduce with another operation than SUM, or with async_op")
    name = (group if group is not None else _world()).group_name
    target = torch.ops.sparda.all_reduce.default
    return CollectiveCall(target, (tensor, _size_of(name), name), is_in_place=True)


def _world() -> Any:
    return dist.group.WORLD


def _size_of(group: str) -> int:
    return int(collectives.group_named(group).size())


def _name_of(function: Any) -> tuple[str, str]:
    """Return where a function of torch.distributed is from, and its name; empty for others."""
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    if isinstance(function, torch._ops.OpOverloadPacket):
        space, _, name = function._qualified_op_name.partition("::")
        return (_FUNCTIONAL, name) if "c10d" in space else ("", "")
    home = getattr(function, "__module__", None) or ""
    is_ours = home.startswith("torch.distributed.distributed_c10d")
    return ("dist", function.__name__) if is_ours else ("", "")


@contextlib.contextmanager
def redistributing() -> Iterator[None]:
    """Let `DTensor.redistribute` call ops of ours inside of the block."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    if module is None:
        yield
        return
    before = module.DTensor.redistribute
    module.DTensor.redistribute = _redistribute
    try:
        yield
    finally:
        module.DTensor.redistribute = before


def _redistribute(
    tensor: Any, device_mesh: Any = None, placements: Sequence[Any] | None = None, **_: Any
) -> Any:
    """Return a DTensor of another placement on the same mesh.

    Raises:
        CaptureError: If there is no op for that.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, before = tensor.device_mesh, tensor.placements
    if device_mesh not in (None, mesh) or placements is None or len(before) != 1:
        raise CaptureError("a DTensor moves to another mesh, or has one of several dimensions")
    (one,), (other,) = before, placements
    local = local_of(tensor)
    if one == other:
        return tensor
    group, size = mesh.get_group().group_name, mesh.size()
    if one == Partial() and other == Replicate():
        whole = torch.ops.sparda.all_reduce.default(local, size, group)
        return DTensor.from_local(whole, mesh, [other], run_check=False)
    if type(one) is Shard and other == Replicate():
        whole = _gathered(local, one.dim % local.dim(), tensor.shape[one.dim], size, group)
        return DTensor.from_local(whole, mesh, [other], run_check=False)
    if one == Replicate() and type(other) is Shard:
        dim = other.dim % local.dim()
        most = -(-local.shape[dim] // size)
        first = min(most * mesh.get_local_rank(), local.shape[dim])
        part = local.narrow(dim, first, min(most, local.shape[dim] - first))
        shape, stride = torch.Size(local.shape), local.stride()
        return DTensor.from_local(part, mesh, [other], run_check=False, shape=shape, stride=stride)
    raise CaptureError(f"a DTensor is redistributed from {one} to {other}, which has no op here")


def _gathered(local: Tensor, dim: int, total: int, num_ranks: int, group: str) -> Tensor:
    """Put the parts of all ranks together along a dimension; the last may be shorter."""
    part = local.movedim(dim, 0)
    most = -(-total // num_ranks)
    if part.shape[0] < most:
        rest = part.new_zeros((most - part.shape[0], *part.shape[1:]))
        part = torch.cat([part, rest])
    whole = torch.ops.sparda.all_gather.default(part, num_ranks, group)
    if most * num_ranks > total:
        whole = whole.narrow(0, 0, total)
    result: Tensor = whole.movedim(0, dim)
    return result


def has_sharded(args: Any, kwargs: Any) -> bool:
    """Whether a call is given a DTensor."""
    return any(is_sharded(leaf) for leaf in leaves_of((args, kwargs)))


def of_sharded(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], recorder: TorchFunctionMode
) -> Any:
    """Return what a function gives for DTensors, computed from their local parts.

    Args:
        function: What is called.
        args: Positional arguments.
        kwargs: Named ones.
        recorder: Is told of what is computed.

    Raises:
        CaptureError: If it computes something else than an embedding.
    """
    if function is functional.embedding:
        with recorder:
            return _embedding(*args, **kwargs)
    name = getattr(function, "__name__", str(function))
    getter = getattr(getattr(function, "__self__", None), "__name__", name)
    if name == "__get__" or name in ("size", "dim", "numel", "stride", "is_floating_point"):
        found = function(*args, **kwargs)
        if not isinstance(found, Tensor):
            return found
    raise CaptureError(
        f"it computes {getter} of a DTensor, and what ranks would have to tell each other for that "
        "is not known; shard linears, embeddings, heads and experts alone, as transformers' own "
        "plans do"
    )


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Any:
    """Look up rows of a table that is sharded by rows or columns, or of one that is not.

    Raises:
        CaptureError: If it renormalizes rows, or the table is sharded in another way.
    """
    del padding_idx  # matters for gradients alone
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    sharded: Any = weight
    if max_norm is not None or not is_sharded(weight) or len(sharded.placements) != 1:
        raise CaptureError("an embedding renormalizes its rows, or is not sharded over one mesh")
    mesh, placement = sharded.device_mesh, sharded.placements[0]
    local_ids, table = local_of(ids), local_of(weight)
    if placement == Replicate():
        rows = functional.embedding(local_ids, table)
        return DTensor.from_local(rows, mesh, [Replicate()], run_check=False)
    if placement == Shard(1):
        rows = functional.embedding(local_ids, table)
        shape = (*rows.shape[:-1], sharded.shape[1])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows, mesh, [Shard(-1)], run_check=False, shape=torch.Size(shape), stride=stride
        )
    if placement != Shard(0):
        raise CaptureError(f"an embedding is sharded as {placement}")
    first, size = shard_range(weight, 0)
    if size == 0:
        raise CaptureError(
            f"an embedding of {sharded.shape[0]} rows leaves none to rank "
            f"{mesh.get_local_rank()} of {mesh.size()}; use fewer ranks"
        )
    places = local_ids - first
    is_elsewhere = (places < 0) | (places >= size)
    rows = functional.embedding(places.masked_fill(is_elsewhere, 0), table)
    mine = rows.masked_fill(is_elsewhere.unsqueeze(-1), 0)
    return DTensor.from_local(mine, mesh, [Partial()], run_check=False)
