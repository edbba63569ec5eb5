"""The same numbers on a GPU: gradients and attacks in float64 against the CPU."""

import pytest
import torch
from conftest import NETWORKS, random_victims, small_lenet

from leaklib.attacks import AdamSettings, dlg, invert_gradients
from leaklib.gradients import share_gradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = (1, 8, 8)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_shared_gradients(name):
    model, victims = NETWORKS[name](), random_victims(batch=2)
    here = share_gradient(model, victims)
    there = share_gradient(model.cuda(), victims.to("cuda"))
    for key, tensor in here.items():
        torch.testing.assert_close(there.tensors[key].cpu(), tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attack", ["dlg", "invert"])
def test_attacks_walk_the_same_path(attack):
    def recover(device):
        model, victims = small_lenet().to(device), random_victims().to(device)
        shared = share_gradient(model, victims)
        settings = {"image_shape": SHAPE, "generator": torch.Generator().manual_seed(0)}
        if attack == "dlg":
            return dlg(model, shared, max_evaluations=30, **settings)
        return invert_gradients(model, shared, optimiser=AdamSettings(steps=30), **settings)

    here, there = recover("cpu"), recover("cuda")
    torch.testing.assert_close(there.images.cpu(), here.images, rtol=1e-5, atol=1e-7)
    assert torch.equal(there.labels.cpu(), here.labels)
