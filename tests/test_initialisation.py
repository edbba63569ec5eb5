"""Weights against explicit redraws, and against the numbers in the authors' logs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from leaklib.data import data_root, load_images
from leaklib.models import available_models, build
from leaklib.models.initialisation import INITIALISATIONS, initialise_


def by_hand(init):
    """LeNet's layers as a plain script draws them with seed 5: (weight, bias) per layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = [nn.Conv2d(3, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 2, 2), nn.Conv2d(12, 12, 5, 1, 2)]
        layers.append(nn.Linear(12 * 4 * 4, 10))
        drawn = []
        for layer in layers:
            fan_out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
            if layer is not layers[-1]:
                fan_out *= 25
            bound = {
                "uniform": 0.5,
                "kaiming": (3 / fan_in) ** 0.5,
                "xavier": (6 / (fan_in + fan_out)) ** 0.5,
            }
            if init == "default":
                drawn.append((layer.weight.detach(), layer.bias.detach()))
            elif init in ("normal", "tiny"):
                std = 0.5 if init == "normal" else 0.01
                new = [torch.randn(t.shape) * std for t in (layer.weight, layer.bias)]
                drawn.append(tuple(new))
            else:
                weight = torch.empty(layer.weight.shape).uniform_(-bound[init], bound[init])
                drawn.append((weight, torch.empty(layer.bias.shape).uniform_(-0.5, 0.5)))
    return drawn


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_seeding_follows_the_papers_order(init):
    model = build("lenet", input_shape=(3, 16, 16), init=init, seed=5)
    layers = [model.conv1, model.conv2, model.conv3, model.fc]
    for layer, (weight, bias) in zip(layers, by_hand(init), strict=True):
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-6, atol=0)


class ResNetByConstruction(ResNet):
    """A CIFAR ResNet-18 written as torchvision writes its own, first convolution exchanged."""

    def __init__(self, norm):
        nn.Module.__init__(self)
        self._norm_layer = norm
        self.inplanes, self.dilation, self.groups, self.base_width = 64, 1, 1, 64
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = norm(64)
        self.layer1 = self._make_layer(BasicBlock, 64, 2)
        self.layer2 = self._make_layer(BasicBlock, 128, 2, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 256, 2, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 512, 2, stride=2)
        self.fc = nn.Linear(512, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resnet_is_seeded_as_torchvision_seeds(norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layer = nn.BatchNorm2d if norm == "batch" else lambda channels: nn.GroupNorm(2, channels)
        expected = ResNetByConstruction(layer).state_dict()
    ours = build("resnet18", norm=norm, seed=4).state_dict()
    assert list(ours) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("init", INITIALISATIONS[1:])
def test_redraw_leaves_normalisation_layers_alone(init):
    model = build("convnet", width=2, init=init, norm="batch")
    for number in range(1, 9):
        norm = model.get_submodule(f"norm{number}")
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def test_redraw_by_itself_is_seeded_and_follows_the_dtype():
    model = build("lenet", input_shape=(1, 8, 8)).double()
    redrawn = [
        initialise_(model, "normal", generator=torch.Generator().manual_seed(s)).fc.weight.clone()
        for s in (1, 1, 2)
    ]
    assert redrawn[0].dtype == torch.float64
    assert torch.equal(redrawn[0], redrawn[1])
    assert not torch.equal(redrawn[0], redrawn[2])
    with pytest.raises(ValueError, match=r"unknown initialisation 'gaussian'.*uniform"):
        initialise_(model, "gaussian", generator=torch.Generator())


def test_the_callers_torch_is_untouched():
    before = torch.random.get_rng_state()
    expected = build("lenet", init="uniform", seed=1).fc.weight
    for name in available_models():
        build(name, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.set_default_dtype(torch.float64)
    try:
        model = build("lenet", init="uniform", seed=1, normalisation="cifar10")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model.fc.weight, expected)
    assert model.normalise.mean.dtype == torch.float32


needs_mnist = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (data_root() / "MNIST" / "raw").is_dir(), reason="MNIST is not under the data root"
    ),
]


def largest_eigenvalue(model, image, label, iterations):
    """λ_max of JJᵀ, J = d(∇θ L)/dx, by power iteration with products from a retained graph."""
    image = image[None].clone().requires_grad_()
    theta = list(model.parameters())
    loss = F.cross_entropy(model(image), label[None])
    g_x, *g_theta = torch.autograd.grad(loss, [image, *theta], create_graph=True)
    u = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(iterations):
        pulled = torch.autograd.grad(g_x, theta, u / u.norm(), retain_graph=True)
        (u,) = torch.autograd.grad(g_theta, image, pulled, retain_graph=True)
    return u.norm().item()


class TestAgainstTheAuthorsLogs:
    """I²F's networks on MNIST test images, to the digits that its logs and figures give."""

    pytestmark = needs_mnist

    @pytest.mark.parametrize("normalisation", [None, "mnist"])
    def test_lenet_predicts_nine_for_every_image(self, normalisation):
        images = load_images("mnist", indices=range(500)).images
        settings = {"init": "uniform", "seed": 1, "normalisation": normalisation}
        model = build("lenet4", input_shape=(1, 28, 28), **settings)
        assert torch.equal(model(images).argmax(1).unique(), torch.tensor([9]))

    @pytest.mark.parametrize(
        ("name", "init", "normalisation", "iterations", "value"),
        [
            ("lenet4", "uniform", None, 40, 4.7367),
            # the chain rule of the normalisation: 2.7156 in normalised units is 2.7156/std²
            ("lenet4", "uniform", "mnist", 40, 2.7156 / 0.30810782313346863**2),
            ("resnet18", "default", "mnist", 12, 0.62829 / 0.30810782313346863**2),
        ],
    )
    def test_largest_eigenvalue(self, name, init, normalisation, iterations, value):
        mnist = load_images("mnist", indices=[0])
        settings = {"init": init, "seed": 1, "normalisation": normalisation}
        model = build(name, input_shape=(1, 28, 28), **settings)
        found = largest_eigenvalue(model, mnist.images[0], mnist.labels[0], iterations)
        assert found == pytest.approx(value, rel=3e-5)
