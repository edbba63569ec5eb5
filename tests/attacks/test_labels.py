import pytest
import torch
from conftest import random_victims, small_lenet, small_mlp

from leaklib.attacks import expected_probabilities, recover_label, recover_labels
from leaklib.gradients import FedAvg, share_gradient
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build


@pytest.mark.parametrize("init", ["default", "uniform", "normal", "xavier"])
def test_a_single_label_is_exact(init):
    model, victims = small_lenet(init=init), random_victims(victims=50)
    assert torch.equal(recover_label(share_gradient(model, victims)), victims.labels)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_without_bias_the_longest_row_tells(activation):
    model = small_mlp(bias=False, activation=activation)
    victims = random_victims(victims=50)
    assert torch.equal(recover_label(share_gradient(model, victims)), victims.labels)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("protocol", [None, FedAvg(3, 1e-4)])
@pytest.mark.parametrize("batch", [2, 8])
def test_a_batch_of_an_untrained_network_is_exact(batch, reduction, protocol):
    model = build("mlp", input_shape=(1, 8, 8), hidden=(12,), classes=20, seed=4).double()
    victims = random_victims(victims=30, batch=batch, classes=20)
    shared = share_gradient(model, victims, reduction=reduction, protocol=protocol)
    assert torch.equal(recover_labels(shared), victims.labels.sort(dim=1).values)


def test_expected_probabilities_help_where_the_network_prefers_a_class():
    model, victims = small_lenet(), random_victims(victims=60, batch=8)
    shared = share_gradient(model, victims)
    truth = victims.labels.sort(dim=1).values
    blind = recover_labels(shared)
    expected = expected_probabilities(model, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    informed = recover_labels(shared, probabilities=expected)
    assert float(expected.sum()) == pytest.approx(1.0)
    assert torch.equal(informed, truth)
    assert not torch.equal(blind, truth), "the case should need the expectation"


def test_what_cannot_be_told_is_refused():
    model, victims = small_mlp(), random_victims(batch=2)
    with pytest.raises(ValueError, match="recover_labels"):
        recover_label(share_gradient(model, victims))
    lenet = small_lenet()
    with pytest.raises(ValueError, match="share it, or give the labels"):
        recover_labels(share_gradient(lenet, random_victims(), layers=["conv1"]))
    with pytest.raises(ValueError, match="bias"):
        recover_labels(share_gradient(model, victims, layers=["fc.weight"]))
    two = small_mlp(bias=False, classes=2)
    with pytest.raises(ValueError, match="3 classes"):
        recover_label(share_gradient(two, random_victims(classes=2)))


def test_one_logit_is_refused():
    """Its bias gradient has one entry, whose place says nothing."""
    model = build("mlp", input_shape=(1, 8, 8), hidden=(12,), classes=1, seed=4).double()
    victims = random_victims(classes=2)
    shared = share_gradient(model, victims, loss=LOGISTIC)
    with pytest.raises(ValueError, match="two logits.*rgap"):
        recover_label(shared)
