"""R-GAP's networks and the small residual network: sizes, names, weights, options, bad input."""

import pytest
import torch
import torch.nn.functional as F
from test_models import layer_shapes
from torch import nn
from torch.func import functional_call, grad, vmap

from leaklib.models import ResidualBlock, build, parameter_count

GREY = (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("cnn6", {}, 125_456),
        ("cnn6", {"second": 20}, 118_544),
        ("cnn6-d", {}, 118_544),
        ("fcn3", {"input_shape": GREY}, 884_100),
        ("fcn3", {"input_shape": GREY, "hidden": (5,)}, 784 * 5 + 5),
        ("lenet-rgap", {"input_shape": GREY}, 8_088),
        ("lenet-rgap", {"widths": (2, 3, 4)}, 25 * (3 * 2 + 2 * 3 + 3 * 4) + 4 * 64),
        # with ten classes and biases, the default chain is DLG's LeNet
        ("chain", {}, 15_826),
        ("chain", {"layers": [(2, 4, 2, 1)], "bias": False}, 3 * 2 * 16 + 2 * 16 * 16 * 10),
        ("chain", {"layers": (), "classes": 1}, 3 * 32 * 32 + 1),
        ("cnn6", {"classes": 10}, 125_456 + 9 * 3200),
    ],
)
def test_parameter_counts(name, settings, count):
    assert parameter_count(build(name, **settings)) == count


def test_feature_sizes_of_the_paper():
    shapes = layer_shapes(build("cnn6"), (3, 32, 32))
    assert [shapes[f"conv{i}"] for i in range(1, 7)] == [
        (12, 17, 17), (36, 9, 9), (36, 9, 9), (36, 9, 9), (64, 5, 5), (128, 5, 5),
    ]  # fmt: skip
    assert (shapes["flatten"], shapes["fc"]) == ((3200,), (1,))
    assert layer_shapes(build("cnn6-d"), (3, 32, 32))["conv2"] == (20, 9, 9)
    lenet = layer_shapes(build("lenet-rgap", input_shape=GREY), GREY)
    assert (lenet["conv3"], lenet["flatten"]) == ((12, 7, 7), (588,))
    # height and width go their own ways
    assert layer_shapes(build("chain", input_shape=(2, 9, 14)), (2, 9, 14))["conv3"] == (12, 3, 4)


def test_names():
    cnn6 = [name for name, _ in build("cnn6").named_children()]
    convolutions = [f"{kind}{i}" for i in range(1, 7) for kind in ("conv", "act")]
    assert cnn6 == [*convolutions, "flatten", "fc"]
    dense = ["flatten", "hidden1", "act1", "hidden2", "act2", "fc"]
    settings = {"input_shape": (1, 4, 4), "hidden": (3, 2)}
    assert [n for n, _ in build("fcn3", **settings).named_children()] == [*dense, "act3"]
    plain = build("fcn3", last_activation=False, **settings)
    assert [n for n, _ in plain.named_children()] == dense


def test_activations_of_the_paper():
    for name in ("cnn6", "cnn6-d", "fcn3", "chain", "resnet-small"):
        used = [m for m in build(name).modules() if isinstance(m, nn.LeakyReLU)]
        assert used, name
        assert {m.negative_slope for m in used} == {0.2}, name
    assert isinstance(build("lenet-rgap").act1, nn.Sigmoid)
    assert build("cnn6", activation="leaky_relu").act1.negative_slope == 0.01
    fcn3 = build("fcn3", input_shape=GREY)
    x = torch.rand(5, *GREY)
    bare = build("fcn3", input_shape=GREY, last_activation=False)
    torch.testing.assert_close(fcn3(x), F.leaky_relu(bare(x), 0.2))


def by_script(name):
    """The layers as a plain script draws them after `torch.manual_seed(7)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if name == "cnn6":
            return [
                nn.Conv2d(3, 12, 4, 2, 2, bias=False), nn.Conv2d(12, 36, 3, 2, 1, bias=False),
                nn.Conv2d(36, 36, 3, 1, 1, bias=False), nn.Conv2d(36, 36, 3, 1, 1, bias=False),
                nn.Conv2d(36, 64, 3, 2, 1, bias=False), nn.Conv2d(64, 128, 3, 1, 1, bias=False),
                nn.Linear(3200, 1, bias=False),
            ]  # fmt: skip
        return [
            nn.Linear(784, 1000, bias=False), nn.Linear(1000, 100, bias=False),
            nn.Linear(100, 1, bias=False),
        ]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), [("cnn6", (3, 32, 32)), ("fcn3", GREY)])
def test_same_weights_and_outputs_as_a_plain_script(name, shape):
    model, layers = build(name, input_shape=shape, seed=7), by_script(name)
    assert [n for n, _ in model.named_parameters() if "bias" in n] == []
    x = signal = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for ours, layer in zip(model.parameters(), layers, strict=True):
        assert torch.equal(ours, layer.weight)
        signal = layer(signal.flatten(1) if isinstance(layer, nn.Linear) else signal)
        if layer is not layers[-1] or name == "fcn3":
            signal = torch.where(signal > 0, signal, 0.2 * signal)
    torch.testing.assert_close(model(x), signal)


def test_tiny_weights_have_the_stated_spread():
    model = build("fcn3", input_shape=GREY, init="tiny", seed=1)
    for weight in (model.hidden1.weight, model.hidden2.weight):
        assert weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(weight.mean().item()) < 1e-4


@pytest.mark.parametrize(
    ("stride", "filters", "skip", "kind"),
    [
        (1, 3, True, nn.Identity),
        (1, 5, True, nn.Conv2d),
        (2, 3, True, nn.Conv2d),
        (2, 5, False, type(None)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_residual_block_computes_its_equation(stride, filters, skip, kind, bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = ResidualBlock(3, filters, nn.Tanh, stride=stride, skip=skip, bias=bias).double()
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    w = dict(block.named_parameters())
    a = torch.tanh(F.conv2d(x, w["conv1.weight"], w.get("conv1.bias"), stride, 1))
    s = F.conv2d(a, w["conv2.weight"], w.get("conv2.bias"), 1, 1)
    assert isinstance(block.shortcut, kind)
    if kind is nn.Identity:
        s = s + x
    elif kind is nn.Conv2d:
        s = s + F.conv2d(x, w["shortcut.weight"], w.get("shortcut.bias"), stride)
    torch.testing.assert_close(block(x), torch.tanh(s))
    assert any("bias" in name for name in w) == bias


def test_cutting_skips_keeps_names_and_weights():
    settings = {"blocks": 3, "width": 4, "bias": True, "seed": 2}
    whole, cut = build("resnet-small", **settings), build("resnet-small", skip=False, **settings)
    assert list(whole.state_dict()) == list(cut.state_dict())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]), name
    x = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(whole(x), cut(x))
    # projections leave with their skips; the other names stay in order
    halved, bare = (build("resnet-small", halve=(2,), skip=s, **settings) for s in (True, False))
    kept = [name for name in halved.state_dict() if "shortcut" not in name]
    assert len(kept) == len(halved.state_dict()) - 2
    assert kept == list(bare.state_dict())


def test_shapes_of_the_residual_network():
    model = build("resnet-small", input_shape=(1, 9, 8), blocks=3, width=4, halve=(1, 3))
    shapes = layer_shapes(model, (1, 9, 8))
    assert list(shapes) == [
        "conv1", "act1", "block1", "block2", "block3", "flatten", "fc",
    ]  # fmt: skip
    assert [shapes[f"block{i}"] for i in (1, 2, 3)] == [(8, 5, 4), (8, 5, 4), (16, 3, 2)]
    assert (shapes["flatten"], shapes["fc"]) == ((96,), (10,))
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("halve", [(), (2,)])
def test_residual_gradients_batch_over_victims(halve):
    model = build("resnet-small", input_shape=(1, 4, 4), width=2, halve=halve, activation="tanh")
    model = model.double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    images = torch.rand(3, 1, 1, 4, 4, dtype=torch.float64)

    def gradient(image):
        return grad(lambda p: functional_call(model, p, (image,)).square().sum())(params)

    batched = vmap(gradient)(images)
    for number, image in enumerate(images):
        expected = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
        for ours, reference in zip(batched.values(), expected, strict=True):
            torch.testing.assert_close(ours[number], reference)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chain", {"layers": [(2, 3, 1)]}, r"conv1: expected \(filters, kernel.*got \(2, 3, 1\)"),
        ("chain", {"layers": [(2, 3, 1, 0), (2, 3, 0, 1)]}, "conv2: expected .*>= 1"),
        ("chain", {"layers": [(2, 3, 1, -1)]}, "padding >= 0"),
        ("chain", {"layers": [(2, 33, 1, 0)]}, "conv1: expected a kernel of at most 32.*got 33"),
        ("chain", {"layers": [(2, 3, 8, 0), (2, 7, 1, 1)]}, "conv2: .*at most 6.*add padding"),
        ("cnn6", {"second": 0}, r"conv2: expected .*got \(0, 3, 2, 1\)"),
        ("cnn6-d", {"second": 3}, "no option second"),
        ("lenet-rgap", {"widths": (12, 12)}, r"widths: expected 3.*\(12, 12\)"),
        ("resnet-small", {"blocks": 0}, "blocks >= 1"),
        ("resnet-small", {"width": 0}, "width >= 1"),
        ("resnet-small", {"halve": (3,)}, r"block numbers from 1 to 2, got \(3,\)"),
    ],
)
def test_bad_options_say_what_to_do(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)
