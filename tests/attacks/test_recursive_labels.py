"""What one gradient leaves open: the label, the margin's second root and its twin picture."""

import copy

import pytest
import torch
from attacks.dense_rgap import margins
from attacks.rgap_cases import DTYPE, LOSSES, attack, case, share
from torch import nn

from leaklib.attacks import rgap
from leaklib.data import PrivateInputs, Victims
from leaklib.gradients import share_gradient
from leaklib.margin_losses import LOGISTIC


def with_margin(name, margin):
    """One victim of a case, its last weights scaled so that its margin is the one asked for."""
    one = case(name)
    model, images = copy.deepcopy(one.model), one.victims.images[:1]
    last = list(model.modules())[-1]
    with torch.no_grad():
        output = float(model(images[0]))
        last.weight.mul_(abs(margin / output))
    label = int((output > 0) == (margin > 0))
    return one, model, Victims(images, torch.tensor([[label]]))


@pytest.mark.parametrize("name", ["leaky", "perceptron", "geometry", "exponential"])
@pytest.mark.parametrize("margin", [0.3, 0.9])
def test_both_roots_explain_the_gradient(name, margin):
    one, model, victims = with_margin(name, margin)
    shared = share(one, victims, model=model)
    found = attack(one, shared, model=model, labels=victims.labels)
    # the in-range picture is the private one, its twin is too bright
    torch.testing.assert_close(found.images, victims.images, rtol=0, atol=1e-10)
    assert float(found.twins.max()) > 1
    assert float(found.margins) == pytest.approx(margin, rel=1e-12)
    tau = -margin * float(LOSSES[one.loss].slope(torch.tensor(margin, dtype=DTYPE)))
    assert found.margin_roots[0].tolist() == pytest.approx(margins(tau, one.loss), rel=1e-9)
    scale = float(found.margin_roots[0, 1] / found.margin_roots[0, 0])
    twins = scale * victims.images
    torch.testing.assert_close(found.twins, twins, rtol=1e-9, atol=1e-9)
    for pictures, bound in ((twins, 1e-12), (found.twins, 1e-10)):
        other = share(one, PrivateInputs(pictures, victims.labels), model=model)
        for key, grad in shared.items():
            assert float((other.tensors[key] - grad).norm() / grad.norm()) < bound, key


@pytest.mark.parametrize("margin", [1.6, 2.1685])
def test_a_darker_twin_is_as_good_a_picture(margin):
    # nothing tells which is private where both lie in [0, 1]: the report shows both
    one, model, victims = with_margin("leaky", margin)
    shared = share(one, victims, model=model)
    found = attack(one, shared, model=model, labels=victims.labels)
    assert 0 <= float(found.images.min()) < float(found.images.max()) <= 1
    assert 0 <= float(found.twins.min()) < float(found.twins.max()) <= 1
    assert found.margin_roots[0, 1] == pytest.approx(margin, rel=1e-12)
    pair = torch.cat([found.images, found.twins])
    nearest = (pair - victims.images).flatten(1).norm(dim=1).amin()
    assert float(nearest) < 1e-10
    assert float((pair[0] - pair[1]).abs().max()) > 0.1


def test_the_double_root():
    one, model, victims = with_margin("leaky", 1.2784645427610738)
    found = attack(one, share(one, victims, model=model), model=model, labels=victims.labels)
    # rounding of the gradient moves a double root by its square root
    assert float((found.images - victims.images).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["leaky", "hinge", "softmax", "leaky, bias"])
def test_one_root_has_no_twin(name):
    one = case(name)
    labels = one.victims.labels
    if name == "leaky":
        with torch.no_grad():
            labels = (one.model(one.victims.images[:, 0]) < 0).long()  # all wrongly classified
    found = attack(one, share(one, Victims(one.victims.images, labels)), labels=labels)
    torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)
    assert bool(found.twins.isnan().all())
    assert bool(found.margin_roots[:, 1].isnan().all())


def test_two_classes_have_twins_as_one_logit_has():
    one = case("two classes")
    images = one.victims.images
    with torch.no_grad():
        labels = one.model(images[:, 0]).argmax(1, keepdim=True)
    labels[2] = 1 - labels[2]  # wrongly classified: one answer
    shared = share(one, Victims(images, labels))
    found = attack(one, shared, labels=None)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-10)
    assert found.twins.flatten(1).isnan().all(1).tolist() == [False, False, True]
    other = share(one, PrivateInputs(found.twins[:2], labels[:2]))
    for key, grad in shared.items():
        assert float((other.tensors[key] - grad[:2]).norm() / grad[:2].norm()) < 1e-10, key


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("leaky", "layer '2'"), ("exponential", "layer '2'"), ("perceptron", "layer '3'"),
        ("two classes", "layer '2'"),
        ("softmax", "last layer"), ("softmax, bias", "last layer"),
        ("leaky, bias", "last layer"), ("hinge, bias", "last layer"), ("tanh", "last layer"),
    ],
)  # fmt: skip
def test_a_wrong_label_is_noticed(name, layer):
    one = case(name)
    with torch.no_grad():
        classes = max(2, one.model(one.victims.images[0]).shape[1])
    wrong = one.victims.labels.clone()
    wrong[1] = (wrong[1] + 1) % classes
    with pytest.raises(ValueError, match=f"label {int(wrong[1])} for victim 1.*{layer}.*None"):
        attack(one, labels=wrong)


@pytest.mark.slow
def test_labels_are_told_apart_behind_a_block_too():
    one = case("residual, one logit")
    found = attack(one, labels=None)
    assert torch.equal(found.labels, one.victims.labels)
    torch.testing.assert_close(found.images, one.victims.images, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="label.*victim 0.*layer '3'"):
        attack(one, labels=1 - one.victims.labels)


@pytest.mark.parametrize("act", [nn.Tanh, nn.Identity])
def test_odd_activations_leave_the_negative(act):
    # σ(−z) = −σ(z): −x with the other label gives the same gradient, and only pixels are positive
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), act(),
        nn.Conv2d(6, 4, 3, padding=1, bias=False), act(),
        nn.Flatten(), nn.Linear(100, 1, bias=False),
    ).to(DTYPE)  # fmt: skip
    images = torch.rand(3, 1, 1, 5, 5, dtype=DTYPE)
    victims = Victims(images, torch.tensor([[0], [1], [0]]))
    shared = share_gradient(model, victims, loss=LOGISTIC)
    negative = share_gradient(model, PrivateInputs(-images, 1 - victims.labels), loss=LOGISTIC)
    for key, grad in shared.items():
        torch.testing.assert_close(negative.tensors[key], grad, rtol=1e-12, atol=1e-15)
    found = rgap(model, shared, image_shape=(1, 5, 5))
    assert torch.equal(found.labels, victims.labels)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-10)
    # a label that is given decides, whatever the pixels say
    turned = rgap(model, shared, image_shape=(1, 5, 5), labels=1 - victims.labels)
    assert torch.equal(turned.labels, 1 - victims.labels)
    torch.testing.assert_close(turned.images, -images, rtol=0, atol=1e-10)


def test_the_loss_of_one_logit_is_logistic_unless_said_otherwise():
    one = case("leaky")
    plain, said = attack(one, loss=None), attack(one, loss=LOGISTIC)
    assert torch.equal(plain.images, said.images)
