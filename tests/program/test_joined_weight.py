from __future__ import annotations

import pytest
import torch

from sparda_compile.program.joined_weight import JoinedWeight


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
    weight.refresh(is_sure=True)
    assert torch.equal(weight.tensor[:3], source)
