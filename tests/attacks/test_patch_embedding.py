"""A vision transformer's picture from the gradients of its positions and of its embedding."""

import pytest
import torch

from leaklib.attacks import invert_patches
from leaklib.data import Victims
from leaklib.defenses import insert_bottleneck
from leaklib.gradients import share_gradient
from leaklib.models import build

SHAPE = (3, 16, 24)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dim=32, normalisation="cifar10", **options):
    settings = {"patch": 8, "layers": 2, "heads": 4, "hidden": 16} | options
    model = build("vit", input_shape=SHAPE, dim=dim, normalisation=normalisation, **settings)
    return model.double()


def private(batch=1):
    images = torch.rand(3, batch, *SHAPE, generator=rng(), dtype=torch.float64)
    return Victims(images, torch.arange(3 * batch).view(3, batch))


@pytest.mark.parametrize("defended", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"normalisation": None}])
def test_the_picture_is_exact_with_and_without_a_bottleneck(defended, options):
    model, victims = small(**options), private()
    if defended:
        model = insert_bottleneck(model, image_shape=SHAPE, width=4)
    shared = share_gradient(model, victims, generator=rng(1))
    found = invert_patches(model, shared, image_shape=SHAPE, labels=victims.labels)
    torch.testing.assert_close(found.images, victims.images, rtol=0, atol=1e-8)


def test_the_label_is_recovered():
    model, victims = small(), private()
    found = invert_patches(model, share_gradient(model, victims), image_shape=SHAPE)
    assert torch.equal(found.labels, victims.labels)


def test_refusals():
    model = small()
    with pytest.raises(ValueError, match="batch 1"):
        invert_patches(model, share_gradient(model, private(2)), image_shape=SHAPE)
    shared = share_gradient(model, private(), layers=["patches"])
    with pytest.raises(ValueError, match=r"tokens\.positions"):
        invert_patches(model, shared, image_shape=SHAPE)
    narrow = small(dim=4)
    with pytest.raises(ValueError, match="too few equations"):
        invert_patches(narrow, share_gradient(narrow, private()), image_shape=SHAPE)
    whole = share_gradient(model, private())
    model.patches.stride = (4, 4)
    with pytest.raises(ValueError, match="kernel = stride"):
        invert_patches(model, whole, image_shape=SHAPE)
