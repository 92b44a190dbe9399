"""Gradients of replayed steps: where they lie, that they are summed, and what is refused; test_zero.py tells that ranks
take the steps of one process with them.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from medtrain import replayed
from medtrain.errors import Failed
from medtrain.replayed import ALIGNED, Gradients


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
@pytest.mark.parametrize("world", [1, 2])  # where others are told of, they are asked
def test_gradients_keep_their_values_and_lie_as_their_weights_do(world: int) -> None:
    net = network()
    gradients = Gradients(net.parameters())
    for step in range(2):
        expected: dict[str, torch.Tensor] = {}
        for micro in range(3):
            net(torch.full((1, 3, 4, 4, 4), 1.0 + step + micro)).sum().backward()
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    expected[name] = expected.get(name, 0) + parameter.grad.clone()
            gradients.take()
            assert all(parameter.grad is None for parameter in net.parameters())
        assert set(expected) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        gradients.give(world)
        for name, parameter in net.named_parameters():
            if name == "unused":
                assert parameter.grad is None
                continue
            torch.testing.assert_close(parameter.grad, expected[name])
            assert parameter.grad.stride() == parameter.stride()
            assert parameter.grad.untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()
            assert parameter.grad.storage_offset() % ALIGNED == 0
        net.zero_grad(set_to_none=True)


@pytest.mark.usefixtures("group")
def test_the_same_weights_must_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    gradients = Gradients(net.parameters())
    with pytest.raises(Failed, match="no weights got gradients, or others on another rank"):
        gradients.take()
    net(torch.ones(1, 3, 4, 4, 4)).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(replayed, "gather", lambda having: [having, having[1:]])
        with pytest.raises(Failed, match=r"others on another rank: --set train\.compile=off"):
            gradients.take()
    gradients.take()
    net(torch.ones(1, 3, 4, 4, 4)).sum().backward()
    net[0].weight.grad = None
    with pytest.raises(Failed, match="other weights got gradients than in the first step"):
        gradients.take()
