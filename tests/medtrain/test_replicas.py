"""Gradients averaged in one piece: where they lie afterwards, and what is refused. That ranks with it take the steps of
one process is told by test_zero.py.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from medtrain import replicas
from medtrain.errors import Failed
from medtrain.replicas import ALIGNED, Averaging


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    """With channels last, an odd number of weights, and one that gets no gradient."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv3d(3, 5, 3), nn.Conv3d(5, 2, 1))
    made.register_parameter("unused", nn.Parameter(torch.ones(7)))
    return made.to(memory_format=torch.channels_last_3d)


@pytest.mark.usefixtures("group")
def test_gradients_keep_their_values_and_lie_as_their_weights_do() -> None:
    net = network()
    average = Averaging(net.parameters())
    for step in range(2):
        net(torch.full((1, 3, 4, 4, 4), 1.0 + step)).sum().backward()
        expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        assert set(expected) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        average()
        for name, parameter in net.named_parameters():
            if name == "unused":
                assert parameter.grad is None
                continue
            assert torch.equal(parameter.grad, expected[name])
            assert parameter.grad.stride() == parameter.stride()
            assert parameter.grad.untyped_storage().data_ptr() == average.flat.untyped_storage().data_ptr()
            assert parameter.grad.storage_offset() % ALIGNED == 0
        net.zero_grad(set_to_none=True)


@pytest.mark.usefixtures("group")
def test_the_same_weights_must_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    average = Averaging(net.parameters())
    with pytest.raises(Failed, match="no weights got gradients, or others on another rank"):
        average()
    net(torch.ones(1, 3, 4, 4, 4)).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "gather", lambda having: [having, having[1:]])
        with pytest.raises(Failed, match=r"others on another rank: --set train\.compile=off"):
            average()
    average()
    net[0].weight.grad = None
    with pytest.raises(Failed, match="other weights got gradients than in the first step"):
        average()
