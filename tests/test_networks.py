"""What each network computes: against functional restatements, once and twice differentiated."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from leaklib.models import available_models, build
from leaklib.models.copa_networks import PLANS
from leaklib.models.initialisation import ACTIVATIONS

FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "leaky_relu_0.2": lambda z: torch.where(z > 0, z, 0.2 * z),
    "elu": lambda z: torch.where(z > 0, z, torch.expm1(z.clamp(max=0))),
    "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "identity": lambda z: z,
}


def forward_lenet(w, x, act, strides):
    for number, stride in enumerate(strides, start=1):
        x = act(F.conv2d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], stride, 2))
    return F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])


def normalise(w, x, name, groups):
    scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
    if groups:
        y = x.unflatten(1, (groups, -1))
        centred = y - y.mean((2, 3, 4), keepdim=True)
        x = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        x = x.flatten(1, 2)
    else:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * scale[:, None, None] + shift[:, None, None]


def forward_convnet(w, x, act, norm):
    for number in range(1, 9):
        x = F.conv2d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], padding=1)
        if norm != "none":
            x = normalise(w, x, f"norm{number}", 2 if norm == "group" else 0)
        x = act(x)
        if number in (6, 8):
            x = F.max_pool2d(x, 3, stride=3)
    return F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])


def forward_resnet18(w, x, act, groups):
    x = act(normalise(w, F.conv2d(x, w["conv1.weight"], padding=1), "bn1", groups))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = act(normalise(w, y, f"{at}.bn1", groups))
            y = F.conv2d(y, w[f"{at}.conv2.weight"], padding=1)
            y = normalise(w, y, f"{at}.bn2", groups)
            if f"{at}.downsample.0.weight" in w:
                x = F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride)
                x = normalise(w, x, f"{at}.downsample.1", groups)
            x = act(x + y)
    return F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])


def forward_cnn(w, x, act):
    for number in (1, 2, 3):
        x = act(F.conv2d(x, w[f"conv{number}.weight"], w[f"conv{number}.bias"], 2))
    return F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])


def forward_vit(w, x, act, patch, heads, layers):
    """With torch's fused attention, which the network itself avoids."""
    images = len(x)
    x = F.unfold(x, patch, stride=patch).transpose(1, 2)  # (images, patches, channels · patch²)
    x = x @ w["patches.weight"].flatten(1).T
    first = w["tokens.class_token"].view(1, 1, -1).repeat(images, 1, 1)
    x = torch.cat([first, x], 1) + w["tokens.positions"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    for number in range(1, layers + 1):
        at = f"block{number}"
        y = norm(x, f"{at}.attention_norm")
        q, k, v = (
            (y @ w[f"{at}.attention.{part}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"{at}.attention.out.weight"].T
        y = norm(x, f"{at}.network_norm")
        x = x + act(y @ w[f"{at}.network.0.weight"].T) @ w[f"{at}.network.2.weight"].T
    return norm(x[:, 0], "norm") @ w["fc.weight"].T


def randomised(model):
    """Every scale, shift and running statistic away from its default, in float64."""
    generator = torch.Generator().manual_seed(3)
    model = model.double()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5 if "var" in name else -1.0, 1.5, generator=generator)
    return model, model.state_dict()


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_forward_equals_the_functional_restatement(activation):
    act = FUNCTIONS[activation]
    x = torch.rand(2, 3, 11, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"input_shape": (3, 11, 9), "activation": activation}

    model, w = randomised(build("lenet", **settings))
    torch.testing.assert_close(model(x), forward_lenet(w, x, act, (2, 2, 1)))
    model, w = randomised(build("lenet4", **settings))
    torch.testing.assert_close(model(x), forward_lenet(w, x, act, (2, 2, 1, 1)))

    model, w = randomised(build("mlp", hidden=(7, 5), **settings))
    hidden = act(x.flatten(1) @ w["hidden1.weight"].T + w["hidden1.bias"])
    hidden = act(hidden @ w["hidden2.weight"].T + w["hidden2.bias"])
    torch.testing.assert_close(model(x), hidden @ w["fc.weight"].T + w["fc.bias"])

    model, w = randomised(
        build("vit", input_shape=(3, 6, 9), activation=activation, patch=3, dim=6, heads=2,
              hidden=5, layers=2)
    )  # fmt: skip
    small = x[:, :, :6]
    torch.testing.assert_close(model(small), forward_vit(w, small, act, 3, 2, 2))

    for norm in ("batch", "group", "none"):
        model, w = randomised(build("convnet", width=4, norm=norm, **settings))
        torch.testing.assert_close(model(x), forward_convnet(w, x, act, norm))


@pytest.mark.parametrize(("norm", "activation"), [("batch", "relu"), ("group", "softplus")])
def test_resnet_forward_equals_the_functional_restatement(norm, activation):
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, w = randomised(build("resnet18", norm=norm, activation=activation))
    groups = 2 if norm == "group" else 0
    expected = forward_resnet18(w, x, FUNCTIONS[activation], groups)
    torch.testing.assert_close(model(x), expected)


def test_cnn_forward_equals_the_functional_restatement():
    x = torch.rand(2, 1, 29, 34, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, w = randomised(build("cnn", input_shape=(1, 29, 34), activation="gelu"))
    torch.testing.assert_close(model(x), forward_cnn(w, x, FUNCTIONS["gelu"]))


def test_linear_is_linear():
    model, w = randomised(build("linear", input_shape=(1, 3, 2), classes=4))
    x = torch.rand(5, 1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x), x.flatten(1) @ w["fc.weight"].T + w["fc.bias"])


TINY = [
    ("lenet", {}),
    ("lenet4", {}),
    ("mlp", {"hidden": (6, 5)}),
    ("convnet", {"width": 2}),
    ("convnet", {"width": 2, "norm": "group"}),
    ("convnet", {"width": 2, "norm": "none"}),
    ("chain", {"layers": ((2, 3, 1, 1), (3, 4, 2, 1))}),
    ("resnet-small", {"width": 2, "halve": (2,)}),
    ("vit", {"patch": 2, "dim": 6, "heads": 2, "hidden": 5, "layers": 2}),
]
CASES = [
    ("linear", {}, None),
    *((name, options, activation) for name, options in TINY for activation in FUNCTIONS),
    # eleven million parameters: one kinked and one smooth activation stand for all
    ("resnet18", {}, "relu"),
    ("resnet18", {"norm": "group"}, "softplus"),
    ("resnet18", {"norm": "group", "stem": "imagenet"}, "relu"),
    ("cnn", {}, "relu"),
]


@pytest.mark.parametrize(("name", "options", "activation"), CASES)
def test_second_derivative_batched_over_victims(name, options, activation):
    """The image gradient of ‖∇θ L‖²: vmap of torch.func against one plain autograd per victim."""
    size = {"convnet": 9, "cnn": 29}.get(name, 4)
    settings = {"classes": 3, "activation": activation, "normalisation": ((0.4,), (0.3,))}
    model = build(name, input_shape=(2, size, size), **settings, **options).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 2, size, size, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2])

    def size_of_gradient(image, label):
        def loss(params):
            return F.cross_entropy(functional_call(model, params, (image[None],)), label[None])

        grads = grad(loss)({n: p.detach() for n, p in model.named_parameters()})
        return sum(g.square().sum() for g in grads.values())

    batched = vmap(grad(size_of_gradient))(images, labels)
    for image, label, ours in zip(images, labels, batched, strict=True):
        image = image.clone().requires_grad_()
        loss = F.cross_entropy(model(image[None]), label[None])
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (expected,) = torch.autograd.grad(sum(g.square().sum() for g in grads), image)
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12 * expected.abs().max())


def test_nothing_works_in_place():
    for name in available_models():
        assert not any(getattr(module, "inplace", False) for module in build(name).modules())


def test_every_activation_of_a_network_is_the_one_asked_for():
    for name in available_models():
        if name != "linear":
            logits = {"last": "identity"} if name in PLANS else {}
            model = build(name, activation="softplus", **logits)
            kinds = {type(m) for m in model.modules()}
            assert nn.Softplus in kinds
            assert not kinds & (set(ACTIVATIONS.values()) - {nn.Softplus, nn.Identity})
