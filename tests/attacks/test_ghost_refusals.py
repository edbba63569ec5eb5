"""Networks whose gradients do not follow from activations, and how they are told."""

import pytest
import torch
import torch.nn.functional as F
from attacks.ghost_checks import SHAPE, both, point
from conftest import random_victims, small_mlp
from torch import nn

from leaklib.attacks.ghost_layers import find_layers
from leaklib.gradients import share_gradient
from leaklib.gradients.stochastic import report_loss


class Inner(nn.Module):
    """Two linear layers, and what a test does in between, before and behind."""

    def __init__(self, before, behind, inputs=64, outputs=6, last=6):
        super().__init__()
        self.before, self.behind = before, behind
        self.hidden, self.fc = nn.Linear(inputs, outputs), nn.Linear(last, 10)

    def forward(self, x):
        x = x.flatten(1)
        inside = torch.tanh(self.hidden(self.before(x)))
        return self.fc(self.behind(inside, len(x)))


def as_it_is(value, *_samples):
    return value


def by_sample(value, samples):
    return value.reshape(samples, -1)


class Reporting(nn.Module):
    """A layer of ours that adds a term to the loss."""

    def __init__(self, term):
        super().__init__()
        self.term, self.layer, self.fc = term, nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x):
        inside = self.layer(x.flatten(1))
        report_loss(self.term(inside, self.layer.weight))
        return self.fc(torch.tanh(inside))


class Twice(nn.Module):
    """A layer of ours that uses another one's weight a second time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + self.layer.weight.mean()


class Shifted(nn.Module):
    """A layer of ours that hangs a parameter onto another one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.layer.register_parameter("shift", nn.Parameter(torch.ones(10)))

    def forward(self, x):
        return self.layer(x.flatten(1)) + self.layer.shift


class Unused(nn.Module):
    """A layer of ours that calls another for nothing and uses its weight by itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        self.layer(x)
        return F.linear(2 * x, self.layer.weight, self.layer.bias)


class Overwriting(nn.Module):
    """A layer of ours that overwrites the input of the layer inside."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(64, 64)

    def forward(self, x):
        x = 1 * x
        out = self.inside(x)
        x.mul_(0.5)
        return out


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64),
                          nn.Linear(64, 10))  # fmt: skip
    model[3].weight = model[1].weight
    return model


def called_twice():
    layer = nn.Linear(64, 64)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(64, 10))


def hooked():
    model = small_mlp()
    model.hidden1.register_forward_hook(lambda _m, _i, out: 2 * out)
    return model


def normalised(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))


OTHERS = {
    "samples mixed": lambda: Inner(as_it_is, lambda inside, _: inside - inside.mean(0)),
    "mixed by less than rounding is allowed": lambda: Inner(
        as_it_is, lambda inside, _: inside + 1e-11 * inside.mean(0)
    ),
    "the next but one mixed in": lambda: Inner(
        as_it_is, lambda inside, _: inside - inside.roll(2, 0)
    ),
    "the largest of all samples": lambda: Inner(lambda x: x / x.amax(), as_it_is),
    "mixed without derivative": lambda: Inner(
        as_it_is, lambda inside, _: inside - inside.detach().mean(0)
    ),
    "the number of samples": lambda: Inner(as_it_is, lambda inside, samples: samples * inside),
    "rows of all samples as one axis": lambda: Inner(
        lambda x: x.reshape(-1, 8), by_sample, inputs=8, outputs=3, last=24
    ),
    "samples as the second axis": lambda: Inner(
        lambda x: x.unflatten(1, (2, 32)).transpose(0, 1),
        lambda inside, samples: by_sample(inside.transpose(0, 1), samples),
        inputs=32, outputs=3,
    ),
    "samples reversed inside": lambda: Inner(
        lambda x: x.flip(0), lambda inside, _: inside.flip(0)
    ),
    "weight in a term of the loss": lambda: Reporting(
        lambda inside, weight: weight.square().sum().expand(len(inside))
    ),
    "samples mixed in a term": lambda: Reporting(
        lambda inside, _: (inside - inside.mean(0)).square().sum(1)
    ),
    "a term of every entry": lambda: Reporting(lambda inside, _: inside.square()),
    "called for nothing": Unused,
    "another parameter of a layer": Shifted,
    "batch norm in train mode": lambda: normalised(nn.BatchNorm2d(4)),
    "one without parameters": lambda: normalised(nn.BatchNorm2d(4, affine=False)),
    "one without statistics": lambda: normalised(
        nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ).eval(),
    "tied weights": tied,
    "called twice": called_twice,
    "weight used outside": lambda: nn.Sequential(nn.Flatten(), Twice(nn.Linear(64, 10))),
    "hook": hooked,
    "groups": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 10)
    ),
    "uneven padding": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 2, padding="same"), nn.Flatten(), nn.Linear(256, 10)
    ),
    "circular padding": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(256, 10)
    ),
    "a parameter of no known layer": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 10), nn.PReLU()
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("network", OTHERS)
def test_other_networks_are_left_to_the_generic_problem(network):
    model, victims = OTHERS[network]().double(), random_victims()
    ghost, generic = both(model, share_gradient(model, victims), labels=victims.labels)
    assert ghost is None
    assert generic.evaluate(point(generic, 3), torch.arange(3))[0].isfinite().all()


def test_a_backward_hook_is_left_to_the_generic_problem():
    model = small_mlp()
    names = tuple(name for name, _ in model.named_parameters())
    assert find_layers(model, names, image_shape=SHAPE, batch=1) is not None
    model.hidden1.register_full_backward_hook(lambda _m, into, _out: (2 * into[0],))
    assert find_layers(model, names, image_shape=SHAPE, batch=1) is None


def test_an_input_that_is_overwritten_is_left_to_the_generic_problem():
    model = nn.Sequential(nn.Flatten(), Overwriting(), nn.Linear(64, 10)).double()
    names = tuple(name for name, _ in model.named_parameters())
    assert find_layers(model, names, image_shape=SHAPE, batch=1) is None
    assert find_layers(model, ("2.weight",), image_shape=SHAPE, batch=1) is not None
