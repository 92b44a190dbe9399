"""Learning rates: the plateau schedule is torch's ReduceLROnPlateau."""

import numpy as np
import pytest
import torch

from medtrain.recipe import Optim
from medtrain.schedule import learning_rate


@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(np.clip(np.cumsum(rng.normal(0.005, 0.03, 80)) + 0.5, 0, 1), 3).tolist()
    optim = Optim(lr=0.01, schedule="plateau", patience=seed, min_lr=1e-3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    peer = torch.optim.SGD([parameter], lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(peer, "max", factor=0.5, patience=seed, min_lr=1e-3)
    for n in range(len(scores) + 1):
        assert learning_rate(optim, 7 * n, 10_000, 10, scores[:n]) == pytest.approx(peer.param_groups[0]["lr"])
        if n < len(scores):
            peer.step()
            scheduler.step(scores[n])
    assert peer.param_groups[0]["lr"] < 0.01
