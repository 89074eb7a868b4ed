"""Layers that do by hand what torch does, and what that must hold."""

import pytest
import torch

from _support.nets import small_net
from ulae_rt.kernels import norm_activate
from ulae_rt.model.blocks import MovingBlock


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_normalisation_of_a_large_volume_is_accurate(batch, training):
    x = torch.randn(batch, 4, 80, 96, 80) + 3 * torch.rand(4)[:, None, None, None]
    x = (x * torch.linspace(0, 1, 80)[:, None, None]).to(memory_format=torch.channels_last_3d)
    expected = torch.nn.functional.leaky_relu(
        torch.nn.functional.instance_norm(x.double(), eps=1e-5), 0.2
    )
    found = norm_activate(x.requires_grad_(training))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert (found - expected).abs().max() < 2e-5  # 3e-4 where torch adds up whole channels


def test_folded_weights_are_as_many_as_the_dilations():
    block = next(m for m in small_net().modules() if isinstance(m, MovingBlock))
    folded = block.folded()
    assert sorted(folded.dilated) == [1, 4, 8, 12]
    assert all(kernel.shape[2:] == (3, 3, 3) for kernel in folded.dilated.values())
