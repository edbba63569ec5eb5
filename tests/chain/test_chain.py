import pytest
import torch
from torch import nn

from leaklib.chain import invert_activation, read_chain
from leaklib.models import build
from leaklib.models.residual import ResidualBlock

DTYPE = torch.float64
ACTIVATIONS = {
    "identity": nn.Identity(),
    "leaky": nn.LeakyReLU(0.2),
    "elu": nn.ELU(),
    "elu, alpha 0.5": nn.ELU(0.5),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "softplus, beta 3": nn.Softplus(3.0, threshold=5.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_inverse_undoes_its_activation(name):
    module, undo = ACTIVATIONS[name], invert_activation(ACTIVATIONS[name])
    z = torch.linspace(-6, 6, 101, dtype=DTYPE).requires_grad_()
    y = module(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(undo.forward(z.detach()), y.detach())
    torch.testing.assert_close(undo.preactivation(y.detach()), z.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(undo.slope(y.detach()), slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "softplus", "elu"])
def test_values_outside_the_range_stay_finite(name):
    undo = invert_activation(ACTIVATIONS[name])
    y = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0], dtype=DTYPE)
    assert bool(undo.preactivation(y).isfinite().all())
    assert bool((undo.slope(y) > 0).all())


def test_a_relu_knows_only_what_is_positive():
    undo = invert_activation(nn.ReLU())
    y = torch.tensor([0.0, 2.0])
    assert undo.known(y).tolist() == [False, True]
    assert undo.slope(y).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU(), nn.Hardtanh(), nn.LeakyReLU(-0.1)])
def test_others_have_no_inverse(module):
    assert invert_activation(module) is None


def _batchnorm():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    return norm


NETWORKS = {
    "cnn6": (lambda: build("cnn6", classes=1, seed=1), (3, 32, 32)),
    "fcn3": (lambda: build("fcn3", classes=1, input_shape=(1, 28, 28), seed=1), (1, 28, 28)),
    "normalised": (lambda: build("lenet", normalisation="cifar10", seed=1), (3, 32, 32)),
    "residual": (
        lambda: build("resnet-small", classes=2, input_shape=(2, 8, 8), width=4, halve=(2,)),
        (2, 8, 8),
    ),
    "nested, pooled, BatchNorm, dropout": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), _batchnorm(), nn.Sequential(nn.ELU())),
            nn.AvgPool2d(2), nn.Dropout(0.5).eval(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(3, 2), nn.Tanh(),
        ),
        (2, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stages_together_are_the_model(name):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    value = x
    for stage in read_chain(model, shape):
        assert tuple(value.shape[1:]) == tuple(stage.input_shape)
        value = stage.forward(value)
        assert tuple(value.shape[1:]) == tuple(stage.output_shape)
    torch.testing.assert_close(value, model(x))


def test_pooling_is_transposed():
    (pool,) = read_chain(nn.Sequential(nn.AvgPool2d(3, stride=2, padding=1)), (2, 7, 6))
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *pool.input_shape, generator=generator, dtype=DTYPE)
    y = torch.rand(2, *pool.output_shape, generator=generator, dtype=DTYPE)
    torch.testing.assert_close((pool.forward(x) * y).sum(), (x * pool.transposed(y)).sum())


def test_a_cut_block_is_two_layers():
    block = ResidualBlock(2, 2, nn.ELU, skip=False)
    names = [stage.name for stage in read_chain(nn.Sequential(block), (2, 4, 4))]
    assert names == ["0.conv1", "0.act1", "0.conv2", "0.act2"]


class _Branch(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.MaxPool2d(2), r"layer 'middle' \(MaxPool2d\).*one pixel of each window.*AvgPool2d"),
        (nn.Dropout(0.1), r"layer 'middle' \(Dropout\).*model.eval\(\)"),
        (nn.GELU(), r"layer 'middle' \(GELU\).*no inverse.*LeakyReLU"),
        (nn.PReLU(), r"layer 'middle' \(PReLU\).*LeakyReLU"),
        (nn.BatchNorm2d(3), r"layer 'middle' \(BatchNorm2d\).*private batch.*eval"),
        (_Branch(), r"layer 'middle' \(_Branch\).*expected a chain.*matching"),
        (nn.Conv2d(5, 1, 3), r"layer 'middle' \(Conv2d\).*5 channels.*image shape"),
        (nn.Conv2d(3, 1, 99), r"layer 'middle' \(Conv2d\).*padded input"),
        (nn.Linear(7, 1), r"layer 'middle' \(Linear\).*7 features"),
    ],
)
def test_what_has_no_place_is_named(layer, message):
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(1, 3, 3))
    model.add_module("middle", layer.train())
    with pytest.raises(ValueError, match=message):
        read_chain(model, (1, 8, 8))


def test_an_activation_in_two_places_is_two_stages():
    act = nn.LeakyReLU(0.3)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), act, nn.Conv2d(2, 2, 3), act).to(DTYPE)
    stages = read_chain(model, (1, 6, 6))
    assert [stage.name for stage in stages] == ["0", "1", "2", "3"]
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    value = x
    for stage in stages:
        value = stage.forward(value)
    torch.testing.assert_close(value, model(x))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 2, 1), lambda: nn.BatchNorm2d(2)])
def test_shared_weights_name_both_places(make):
    layer = make()
    model = nn.Sequential(layer, nn.Sequential(nn.ELU(), layer)).eval()
    message = r"layer '1.1'.*layer '0'.*shared weights.*not one layer's equations"
    with pytest.raises(ValueError, match=message):
        read_chain(model, (2, 4, 4))


class _Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_a_sequence_with_a_forward_pass_of_its_own_is_no_chain():
    model = nn.Sequential(_Skip(nn.Conv2d(2, 2, 1)))
    with pytest.raises(ValueError, match=r"layer '0' \(_Skip\).*expected a chain"):
        read_chain(model, (2, 4, 4))


def test_a_gain_of_zero_names_its_channel():
    norm = nn.BatchNorm2d(3).eval()
    norm.weight.data[1] = 0
    with pytest.raises(ValueError, match=r"layer '0' \(BatchNorm2d\).*0 for channel 1"):
        read_chain(nn.Sequential(norm), (3, 4, 4))
