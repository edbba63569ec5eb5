import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import random_victims, residual_network, small_lenet, small_mlp
from torch import nn

from leaklib.data import Victims
from leaklib.gradients import (
    FedAvg,
    SharedGradient,
    batchnorm_statistics,
    check_payload,
    concatenate,
    match_parameters,
    share_gradient,
    update_function,
)
from leaklib.margin_losses import LOGISTIC
from leaklib.models import build


def naive_gradients(model, victims, reduction="mean"):
    """One victim after the other, by plain autograd on a copy."""
    rows = []
    for images, labels in zip(victims.images, victims.labels, strict=True):
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(images), labels, reduction=reduction)
        rows.append(torch.autograd.grad(loss, list(twin.parameters())))
    names = [n for n, _ in model.named_parameters()]
    return {n: torch.stack([row[i] for row in rows]) for i, n in enumerate(names)}


def assert_close(shared, expected, rtol=1e-12):
    assert set(shared.tensors) == set(expected)
    for name, tensor in expected.items():
        error = (shared.tensors[name] - tensor).norm() / tensor.norm().clamp_min(1e-300)
        assert error <= rtol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_naive_loop(network, batch, reduction):
    victims = random_victims(batch=batch)
    shared = share_gradient(network, victims, reduction=reduction)
    assert_close(shared, naive_gradients(network, victims, reduction))
    assert shared.victims == 3
    assert shared.batch == batch


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_do_not_change_the_result(chunk):
    model, victims = small_lenet(), random_victims(victims=5)
    assert_close(share_gradient(model, victims, chunk=chunk), naive_gradients(model, victims))


def test_batchnorm_in_train_mode_uses_batch_statistics_and_changes_nothing():
    model, victims = residual_network().train(), random_victims(batch=4)
    before = copy.deepcopy(model.state_dict())
    shared = share_gradient(model, victims)
    assert_close(shared, naive_gradients(model, victims))
    evaluated = share_gradient(model.eval(), victims)
    assert not torch.allclose(shared.tensors["0.weight"], evaluated.tensors["0.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.grad is not None for p in model.parameters())


def test_batchnorm_in_train_mode_works_in_float32_too():
    """Torch's fused kernel fails there under vmap when differentiated twice."""
    model, victims = residual_network().train().float(), random_victims(batch=4)
    single = share_gradient(model, victims.to(dtype=torch.float32))
    double = share_gradient(model.double(), victims)
    for name, tensor in double.items():
        torch.testing.assert_close(single.tensors[name].double(), tensor, rtol=1e-3, atol=1e-5)


def test_soft_labels_are_the_average_of_hard_ones():
    model, victims = small_mlp(), random_victims(victims=1)
    update = update_function(model)
    half = torch.zeros(1, 10, dtype=torch.float64)
    half[0, 2] = half[0, 7] = 0.5
    mixed = update(victims.images[0], half)
    two, seven = (update(victims.images[0], torch.tensor([c])) for c in (2, 7))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, (two[name] + seven[name]) / 2, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("layers", [None, ["fc"]])
def test_fedavg_is_the_weight_change_of_plain_sgd(steps, layers):
    model, victims, lr = small_lenet(), random_victims(batch=2), 0.3
    shared = share_gradient(model, victims, protocol=FedAvg(steps, lr), layers=layers)
    for victim in range(3):
        twin = copy.deepcopy(model)
        optimiser = torch.optim.SGD(twin.parameters(), lr=lr)
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(twin(victims.images[victim]), victims.labels[victim]).backward()
            optimiser.step()
        for name, parameter in twin.named_parameters():
            if name in shared.tensors:
                moved = (dict(model.named_parameters())[name] - parameter).detach() / lr
                torch.testing.assert_close(
                    shared.tensors[name][victim], moved, rtol=1e-9, atol=1e-13
                )
    assert layers is None or all(name.startswith("fc") for name in shared.tensors)


def test_a_choice_of_layers_shares_only_those():
    model, victims = small_lenet(), random_victims()
    everything = share_gradient(model, victims)
    some = share_gradient(model, victims, layers=["fc", "conv2.bias"])
    assert set(some.tensors) == {"fc.weight", "fc.bias", "conv2.bias"}
    assert_close(some, {n: everything.tensors[n] for n in some.tensors})
    assert_close(everything.select(["fc", "conv2.bias"]), some.tensors)


def test_frozen_parameters_are_not_shared():
    model = small_lenet()
    model.fc.bias.requires_grad_(False)
    assert "fc.bias" not in share_gradient(model, random_victims()).tensors
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        share_gradient(model, random_victims())


def test_shared_statistics_are_those_of_the_layer_input():
    model, victims = residual_network(), random_victims(batch=4)
    shared = share_gradient(model, victims, statistics=True)
    (name,) = shared.statistics
    for victim in range(3):
        hidden = model[2].conv(model[1](model[0](victims.images[victim])))
        expected = hidden.transpose(0, 1).flatten(1).detach()
        mean, variance = (part[victim] for part in shared.statistics[name])
        torch.testing.assert_close(mean, expected.mean(1))
        torch.testing.assert_close(variance, expected.var(1, correction=0))
    assert batchnorm_statistics(small_lenet(), victims.images[0]) == {}
    with pytest.raises(ValueError, match="BatchNorm"):
        share_gradient(small_lenet(), victims, statistics=True)


def test_match_parameters_takes_names_and_prefixes():
    names = ["conv1.weight", "conv10.weight", "fc.weight"]
    assert match_parameters(names, "conv1") == ("conv1.weight",)
    assert match_parameters(names, ["fc.weight", "conv10"]) == ("conv10.weight", "fc.weight")
    with pytest.raises(ValueError, match="conv2.*known: conv1.weight"):
        match_parameters(names, ["conv2"])
    with pytest.raises(ValueError, match="at least one layer"):
        match_parameters(names, [])


class TestBadInput:
    def test_dtype_of_model_and_images_must_agree(self):
        with pytest.raises(ValueError, match=r"float64.*float32.*to\("):
            share_gradient(small_lenet(), random_victims(dtype=torch.float32))

    def test_dropout_in_train_mode_is_refused_by_name(self):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).to(torch.float64)
        with pytest.raises(ValueError, match=r"dropout '1'.*eval\(\)"):
            share_gradient(model.train(), random_victims())
        share_gradient(model.eval(), random_victims())

    def test_infinite_gradient_names_parameter_and_victim(self):
        model = small_mlp()
        shared = share_gradient(model, random_victims())
        broken = {n: t.clone() for n, t in shared.items()}
        name = list(broken)[1]
        broken[name][2] = torch.inf
        with pytest.raises(ValueError, match=rf"{name}.*victim 2"):
            check_payload(model, shared.replace(broken))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: {"nobody.weight": next(iter(t.values()))}, "nobody.weight.*known"),
            (lambda t: {n: v[:, :1] for n, v in t.items()}, "another model"),
            (lambda t: {n: v.float() for n, v in t.items()}, "float32"),
        ],
    )
    def test_a_payload_of_another_model_is_refused(self, change, message):
        model = small_lenet()
        shared = share_gradient(model, random_victims())
        with pytest.raises(ValueError, match=message):
            check_payload(model, shared.replace(change(shared.tensors)))

    def test_statistics_of_another_model_are_refused(self):
        model = residual_network()
        shared = share_gradient(model, random_victims(batch=2), statistics=True)
        ((name, (mean, variance)),) = shared.statistics.items()
        for wrong, message in (
            ({"nobody": (mean, variance)}, "'nobody'"),
            ({name: (mean[:, :2], variance)}, "channels"),
            ({name: (mean * torch.nan, variance)}, "finite statistics"),
        ):
            with pytest.raises(ValueError, match=message):
                check_payload(model, dataclasses.replace(shared, statistics=wrong))

    def test_malformed_payloads_are_refused(self):
        with pytest.raises(ValueError, match="at least one"):
            SharedGradient({}, batch=1)
        uneven = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}
        with pytest.raises(ValueError, match="victim axis"):
            SharedGradient(uneven, batch=1)
        with pytest.raises(ValueError, match="'median'"):
            SharedGradient({"a": torch.zeros(2, 3)}, batch=1, reduction="median")
        with pytest.raises(ValueError, match="batch >= 1"):
            SharedGradient({"a": torch.zeros(2, 3)}, batch=0)
        with pytest.raises(ValueError, match="steps >= 1"):
            FedAvg(steps=0)


def test_concatenated_releases_attack_as_one_and_refuse_to_mix():
    model = small_mlp()
    shared = [share_gradient(model, random_victims(seed=k)) for k in range(2)]
    both = concatenate(shared)
    assert both.victims == 6
    for name, tensor in both.items():
        assert torch.equal(tensor[:3], shared[0].tensors[name])
        assert torch.equal(tensor[3:], shared[1].tensors[name])
    with pytest.raises(ValueError, match="reduction"):
        concatenate([shared[0], share_gradient(model, random_victims(), reduction="sum")])
    with pytest.raises(ValueError, match="names"):
        concatenate([shared[0], share_gradient(model, random_victims(), layers=["fc"])])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


def test_labels_beyond_one_logit():
    """y = 2t − 1 of class 5 would be 9, and the gradient that of no label."""
    model = build("mlp", input_shape=(1, 8, 8), hidden=(5,), classes=1).double()
    victims = random_victims(classes=2)
    with pytest.raises(ValueError, match=r"labels 0 or 1.*logistic.*labels % 2"):
        share_gradient(model, Victims(victims.images, victims.labels + 3), loss=LOGISTIC)
    with pytest.raises(ValueError, match=r"two logits.*loss=LOGISTIC"):
        share_gradient(model, victims)
    assert share_gradient(model, victims, loss=LOGISTIC).victims == 3
