from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparda_compile.program.joined_weight import JoinedWeight


class Ops(TorchDispatchMode):
    """Notes which ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changed", [0, 1])
def test_joined_weight_follows_changes_in_place_and_stays_where_it_is(changed: int) -> None:
    sources = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(2, 5))]
    weight = JoinedWeight(sources)
    address = weight.tensor.data_ptr()
    assert torch.equal(weight.tensor, torch.cat([s.detach() for s in sources]))
    assert not weight.tensor.requires_grad
    with torch.no_grad():
        sources[changed].mul_(-2.0)
    assert not torch.equal(weight.tensor, torch.cat([s.detach() for s in sources]))
    weight.refresh()
    assert torch.equal(weight.tensor, torch.cat([s.detach() for s in sources]))
    assert weight.tensor.data_ptr() == address


def test_joined_weight_is_copied_only_when_a_source_has_changed() -> None:
    source = torch.randn(3, 5)
    weight = JoinedWeight([source, source])
    weight.tensor.fill_(7.0)
    weight.refresh()
    assert weight.tensor.eq(7.0).all()
    source.zero_()
    weight.refresh()
    weight.tensor.fill_(7.0)
    weight.refresh()
    assert weight.tensor.eq(7.0).all()


def test_joined_weight_is_copied_for_sure_where_torch_counts_no_change() -> None:
    source = torch.nn.Parameter(torch.randn(3, 5))
    weight = JoinedWeight([source, source])
    weight.tensor  # noqa: B018 - made when first asked for
    source.data.mul_(2.0)
    weight.refresh()
    assert not torch.equal(weight.tensor[:3], source)
    JoinedWeight.copy_all([weight])
    assert torch.equal(weight.tensor[:3], source)


def test_joined_weights_of_a_model_are_copied_together() -> None:
    """Each in its own dtype, and by few calls however many there are."""
    dtypes = (torch.float32, torch.bfloat16) * 4
    sources = [[torch.randn(n, 5).to(dtype) for n in (3, 2)] for dtype in dtypes]
    weights = [JoinedWeight(parts) for parts in sources]
    addresses = [weight.tensor.data_ptr() for weight in weights]
    for parts in sources:
        for part in parts:
            part.data.mul_(-2.0)
    with Ops() as ops:
        JoinedWeight.copy_all(weights)
    assert ops.names.count("_foreach_copy_") == 2
    assert not {"cat", "copy_"} & set(ops.names)
    for weight, parts, address in zip(weights, sources, addresses, strict=True):
        assert torch.equal(weight.tensor, torch.cat(parts))
        assert weight.tensor.data_ptr() == address
