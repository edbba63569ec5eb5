"""The residual that each label leaves in the layer before the last."""

import pytest
import torch
from attacks.rgap_cases import attack, case, share

from leaklib.attacks.recursive import rgap
from leaklib.attacks.recursive.evidence import label_residuals
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build


@pytest.mark.parametrize("name", ["leaky", "perceptron", "two classes", "softmax", "leaky, bias"])
def test_only_the_true_label_fits(name):
    one = case(name)
    loss = LOGISTIC if name in ("leaky", "perceptron", "leaky, bias") else None
    shared = share(one)
    found = label_residuals(one.model, shared, image_shape=one.image_shape, loss=loss)
    true = found.gather(1, one.victims.labels)
    others = found.scatter(1, one.victims.labels, torch.inf)
    assert float(true.max()) < 1e-9
    assert float(others.min()) > 1e-3
    assert torch.equal(found.argmin(1), one.victims.labels[:, 0])
    if name == "leaky, bias":  # its last layer says the label
        assert bool(others.isinf().all())


def test_the_attack_reports_the_same_residual():
    one = case("leaky")
    shared = share(one)
    found = label_residuals(one.model, shared, image_shape=one.image_shape)
    layer = attack(one, shared).layers[-2]
    torch.testing.assert_close(found.amin(1), layer.residual, rtol=1e-6, atol=1e-15)


def test_no_root_counts_twice_behind_an_activation():
    # the two labels pass the activation's two slopes, and round differently
    model = build("fcn3", input_shape=(1, 4, 4), hidden=(12, 6), seed=0).double()
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 1, 4, 4, dtype=torch.float64, generator=draw)
    with torch.no_grad():
        labels = (model(images[:, 0]) > 0).long()
        margins = (2 * labels - 1) * model(images[:, 0])
    shared = share_gradient(model, Victims(images, labels), loss=LOGISTIC)
    found = rgap(model, shared, image_shape=(1, 4, 4))
    torch.testing.assert_close(found.margin_roots[:, :1], margins, rtol=1e-9, atol=0)
    assert bool((found.margin_roots[:, 1] > 1.3).all())
