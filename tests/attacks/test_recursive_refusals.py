"""What R-GAP refuses, before any long work, and what it says instead."""

import copy
from dataclasses import replace

import pytest
import torch
from attacks.rgap_cases import DTYPE, attack, case, share
from torch import nn

from leaklib.attacks import rgap
from leaklib.data import Victims
from leaklib.defenses import Prune
from leaklib.gradients import FedAvg, share_gradient
from leaklib.margin_losses import LOGISTIC, MarginLoss
from leaklib.models.residual import ResidualBlock

SHAPE = (2, 6, 6)


class Functional(nn.Module):
    """A forward pass of its own: no chain."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def small(*layers, features=144, outputs=3):
    """A convolution, the layers under test, a linear layer; in float64."""
    torch.manual_seed(0)
    front, back = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(features, outputs)
    return nn.Sequential(front, *layers, nn.Flatten(), back).to(DTYPE)


def refuse(model, message, *, trained=None, **settings):
    """The attack on three random victims of a model ends in this message."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, *SHAPE, generator=generator, dtype=DTYPE)
    victims = Victims(images, torch.randint(3, (3, 1), generator=generator))
    shared = share_gradient(model.eval(), victims)
    if trained:
        model.train()
    with pytest.raises(ValueError, match=message):
        rgap(model, shared, image_shape=SHAPE, **settings)


class TestLayers:
    @pytest.mark.parametrize(
        ("layer", "features", "message"),
        [
            (nn.MaxPool2d(2), 36, r"'1' \(MaxPool2d\).*one pixel.*AvgPool2d.*matching"),
            (nn.GELU(), 144, r"'1' \(GELU\).*no inverse.*LeakyReLU"),
            (nn.SiLU(), 144, r"'1' \(SiLU\).*matching"),
            (nn.PReLU(), 144, r"'1' \(PReLU\).*LeakyReLU"),
            (nn.GroupNorm(2, 4), 144, r"'1' \(GroupNorm\).*matching"),
            (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), 144, "'1' .*zero padding"),
            (nn.Conv2d(4, 4, 4, padding="same"), 144, "'1' .*both sides.*odd kernel"),
            (ResidualBlock(4, 4, nn.GELU), 144, r"'1' \(ResidualBlock\).*invertible.*LeakyReLU"),
            (ResidualBlock(4, 4, nn.ReLU), 144, "'1'.*ReLU.*LeakyReLU"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    def test_a_layer_that_cannot_be_undone(self, layer, features, message):
        refuse(small(layer, features=features), message)

    def test_a_relu_inside_a_block(self):
        block = ResidualBlock(4, 4, lambda: nn.LeakyReLU(0.2))
        block.act1 = nn.ReLU()
        refuse(small(block), "'1.*ReLU.*LeakyReLU", pruned="keep")

    @pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(4)])
    def test_train_mode(self, layer):
        kind = type(layer).__name__
        refuse(small(layer), rf"'1' \({kind}\).*train mode.*model.eval", trained=True)

    def test_no_chain(self):
        refuse(Functional().to(DTYPE), r"\(Functional\).*chain.*Sequential.*matching")

    def test_no_linear_layer_at_the_end(self):
        model = nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten()).to(DTYPE)
        refuse(model, "ends in a fully connected layer.*'1'.*matching")

    def test_an_activation_behind_the_last_layer_that_hides_the_margin(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 1, bias=False), nn.Sigmoid()).to(DTYPE)
        victims = Victims(torch.rand(1, 1, *SHAPE, dtype=DTYPE), torch.tensor([[1]]))
        shared = share_gradient(model, victims, loss=LOGISTIC)
        with pytest.raises(ValueError, match=r"no bias, got sigmoid.*matching"):
            rgap(model, shared, image_shape=SHAPE)


class TestShape:
    @pytest.mark.parametrize(
        ("shape", "layer"), [((1, 8, 8), "0"), ((2, 6, 6), "5"), ((128,), "0"), ((2, 8, 9), "5")]
    )
    def test_an_image_that_the_model_does_not_take(self, shape, layer):
        with pytest.raises(ValueError, match=f"layer '{layer}'.*image shape"):
            attack(case("softmax"), image_shape=shape)


class TestGradient:
    def changed(self, change, name="softmax"):
        """A case's gradient with something done to its tensors, attacked."""
        one = case(name)
        shared = share(one)
        tensors = {key: tensor.clone() for key, tensor in shared.items()}
        change(tensors)
        return attack(one, shared.replace(tensors))

    @pytest.mark.parametrize("key", ["0.weight", "2.weight", "5.weight"])
    def test_a_dead_layer(self, key):
        with pytest.raises(ValueError, match=f"'{key}'.*zeros only.*victim 1"):
            self.changed(lambda tensors: tensors[key][1].zero_())

    @pytest.mark.parametrize("name", ["leaky", "softmax", "softmax, bias", "relu"])
    def test_no_gradient_at_all(self, name):
        def silence(tensors):
            for tensor in tensors.values():
                tensor[2].zero_()

        with pytest.raises(ValueError, match="zeros only.*victim 2"):
            self.changed(silence, name)

    def test_margins_beyond_the_hinge(self):
        one = case("hinge")
        model, images = copy.deepcopy(one.model), one.victims.images
        with torch.no_grad():
            model[-1].weight.mul_(1e6)
            labels = (model(images[:, 0]) > 0).long()
        shared = share(one, Victims(images, labels), model=model)
        with pytest.raises(ValueError, match="zeros only.*victim 0"):
            attack(one, shared, model=model, labels=labels)

    def test_a_pruned_gradient(self):
        one = case("softmax")
        pruned = Prune(0.3)(share(one))
        with pytest.raises(ValueError, match="exact zeros.*pruned.*matching.*keep"):
            attack(one, pruned)
        assert attack(one, pruned, pruned="keep").images.shape == one.victims.images.shape

    def test_black_pixels_are_no_pruning(self):
        one = case("perceptron, softmax")
        images = one.victims.images.clone()
        images[..., :2] = 0
        victims = Victims(images, one.victims.labels)
        found = attack(one, share(one, victims))
        torch.testing.assert_close(found.images, images, rtol=0, atol=1e-10)

    @pytest.mark.parametrize(("kept", "missing"), [(["0", "5"], "2"), (["0", "2"], "5")])
    def test_a_layer_that_was_not_shared(self, kept, missing):
        one = case("softmax")
        with pytest.raises(ValueError, match=f"'{missing}.weight'.*share it.*matching"):
            attack(one, share(one).select(kept))

    def test_the_last_bias_that_was_not_shared(self):
        one = case("softmax, bias")
        with pytest.raises(ValueError, match="bias.*share"):
            attack(one, share(one).select(["0", "2", "5.weight"]))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, value):
        with pytest.raises(ValueError, match="finite.*'2.weight'.*victim 1"):
            self.changed(lambda tensors: tensors["2.weight"][1, 0].fill_(value))

    def test_a_last_layer_that_no_label_explains(self):
        one = case("softmax")
        tensors = {key: tensor.clone() for key, tensor in share(one).items()}
        tensors["5.weight"][1] = tensors["5.weight"][1, :1].clone()  # all rows pull the same way
        with pytest.raises(ValueError, match="'5'.*none for victim 1.*noise"):
            attack(one, share(one).replace(tensors), labels=None)

    def test_local_steps(self):
        one = case("softmax")
        with pytest.raises(ValueError, match="3 local steps.*matching"):
            attack(one, share(one, protocol=FedAvg(3, 0.1)))

    def test_the_gradient_of_another_model(self):
        with pytest.raises(ValueError, match="another model"):
            attack(case("softmax"), share(case("leaky")))


class TestSettings:
    @pytest.mark.parametrize("what", ["solver", "deficient", "pruned"])
    def test_an_unknown_name(self, what):
        with pytest.raises(ValueError, match=f"expected {what} among '.*', got 'no'"):
            attack(case("softmax"), **{what: "no"})

    @pytest.mark.parametrize("truncation", [0.0, 1.0, -0.1, float("nan")])
    def test_a_truncation_that_is_no_share(self, truncation):
        with pytest.raises(ValueError, match="truncation between 0 and 1"):
            attack(case("softmax"), truncation=truncation, solver="gradient first")

    def test_a_truncation_without_effect(self):
        with pytest.raises(ValueError, match="gradient first.*truncation 0.01, got 'auto'"):
            attack(case("softmax"), truncation=1e-2)

    def test_a_loss_that_is_no_margin_loss(self):
        with pytest.raises(ValueError, match="expected a MarginLoss.*got CrossEntropyLoss"):
            attack(case("leaky"), loss=nn.CrossEntropyLoss())

    @pytest.mark.parametrize(
        "labels",
        [torch.full((3, 1), 7), torch.full((3, 1), -1), torch.zeros(3).long(), torch.zeros(3, 1)],
    )
    def test_labels_that_do_not_fit(self, labels):
        with pytest.raises(ValueError, match=r"expected (int64 )?labels"):
            attack(case("softmax"), labels=labels)

    def test_a_loss_of_one_logit_for_five(self):
        with pytest.raises(ValueError, match="one logit.*got 5"):
            attack(case("softmax"), loss=LOGISTIC)

    def test_a_margin_loss_without_a_closed_form(self):
        squared = MarginLoss("squared", torch.square, lambda mu: 2 * mu, torch.ones_like)
        with pytest.raises(ValueError, match="logistic, exponential, hinge.*'squared'"):
            attack(case("leaky"), loss=squared)


def test_the_published_solver_and_a_relu():
    with pytest.raises(ValueError, match=r'solver="published".*ReLU.*solver="auto"'):
        attack(case("relu"), solver="published")


def test_the_rank_of_a_pooling_alone_is_counted():
    """Three equal taps on a line of five have rank four."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(200, 3),
    ).to(DTYPE)  # fmt: skip
    victims = Victims(torch.rand(1, 1, 2, 5, 5, dtype=DTYPE), torch.tensor([[1]]))
    found = rgap(model, share_gradient(model, victims), image_shape=(2, 5, 5))
    assert (found.layers[0].unknowns, found.layers[0].rank) == (50, 32)


def test_a_residual_that_is_no_number_counts_as_wrong():
    found = attack(case("softmax"))
    layer = found.layers[1]
    broken = replace(layer, residual=torch.full_like(layer.residual, torch.nan))
    found = replace(found, layers=(found.layers[0], broken, *found.layers[2:]))
    assert found.first_wrong_layer() == [layer.name] * len(found.images)
