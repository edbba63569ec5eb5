"""Small networks of every kind that R-GAP meets, with their victims and what autograd says."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leaklib.attacks import rgap
from leaklib.attacks.recursive import RecursiveReconstruction
from leaklib.data import Victims
from leaklib.gradients import SharedGradient, share_gradient
from leaklib.margin_losses import EXPONENTIAL, HINGE, LOGISTIC
from leaklib.models import Normalise
from leaklib.models.residual import ResidualBlock

DTYPE = torch.float64
VICTIMS = 3
LOSSES = {"logistic": LOGISTIC, "exponential": EXPONENTIAL, "hinge": HINGE}


@dataclass(frozen=True)
class Case:
    """A network and its victims; `deficient` where its equations do not fix the image."""

    name: str
    model: nn.Module
    victims: Victims
    loss: str  # "logistic", "exponential" or "hinge" of one logit, else "softmax"
    deficient: bool

    @property
    def image_shape(self):
        return self.victims.image_shape


def share(
    one: Case, victims: Victims | None = None, *, model: nn.Module | None = None, **settings
) -> SharedGradient:
    """What the clients of a case release."""
    if one.loss in LOSSES:
        settings["loss"] = LOSSES[one.loss]
    return share_gradient(model or one.model, victims or one.victims, **settings)


def attack(
    one: Case, shared: SharedGradient | None = None, *, model: nn.Module | None = None, **settings
) -> RecursiveReconstruction:
    """R-GAP on a case, labels known unless said otherwise."""
    settings = {
        "image_shape": one.image_shape, "labels": one.victims.labels, "loss": LOSSES.get(one.loss),
    } | settings  # fmt: skip
    return rgap(model or one.model, shared or share(one), **settings)


def margin_value(outputs: Tensor, labels: Tensor, *, kind: str) -> Tensor:
    """l(μ) written out, for labels 0 and 1, averaged over the batch."""
    margin = (2 * labels.to(outputs.dtype) - 1) * outputs.squeeze(-1)
    if kind == "logistic":
        return torch.log1p(torch.exp(-margin)).mean()
    return (torch.exp(-margin) if kind == "exponential" else (1 - margin).clamp(min=0)).mean()


def loss_value(case: Case, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of a case without a line of the library."""
    if case.loss == "softmax":
        return F.cross_entropy(outputs, labels)
    return margin_value(outputs, labels, kind=case.loss)


@cache
def truth(case: Case, victim: int):
    """Layer name -> (input, output, ∂L/∂output) by hooks, and the gradients, of one victim."""
    seen, hooks = {}, []

    def keep(name: str) -> Callable:
        def hook(module, inputs, output):
            if output.requires_grad:  # a pooling of the image itself has no gradient
                output.retain_grad()
                seen[name] = (inputs[0].detach()[0], output)

        return hook

    for name, module in case.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.AvgPool2d | ResidualBlock):
            hooks.append(module.register_forward_hook(keep(name)))
    outputs = case.model(case.victims.images[victim])
    for hook in hooks:
        hook.remove()
    loss_value(case, outputs, case.victims.labels[victim]).backward()
    grads = {n: p.grad.numpy().copy() for n, p in case.model.named_parameters()}
    case.model.zero_grad()
    values = {
        n: (x.numpy(), z.detach()[0].numpy(), z.grad[0].numpy()) for n, (x, z) in seen.items()
    }
    return values, grads


def _net(*layers: nn.Module) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(*layers)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def _cnn(act: Callable[[], nn.Module], *, bias: bool = False, out: int = 1) -> nn.Sequential:
    """Stride 2 and then 1 on 2x8x8, with one activation everywhere."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=bias), act(),
        nn.Conv2d(8, 6, 3, padding=1, bias=bias), act(),
        nn.Flatten(), nn.Linear(96, out, bias=bias),
    )  # fmt: skip


def _geometry() -> nn.Sequential:
    """Kernels, strides, paddings and dilations that differ in rows and columns; groups."""
    return nn.Sequential(
        nn.Conv2d(2, 12, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), _leaky(),
        nn.Conv2d(12, 12, (2, 3), dilation=(2, 1), padding=(1, 1), groups=3, bias=False), _leaky(),
        nn.Conv2d(12, 12, 3, padding="same", groups=12, bias=False), _leaky(),
        nn.Flatten(), nn.Linear(336, 1, bias=False),
    )  # fmt: skip


def _deep_leaky() -> nn.Sequential:
    """Nested chains, slopes that differ, no activation between two layers."""
    front = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.LeakyReLU(0.1))
    middle = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Identity()
    )
    return nn.Sequential(
        front, middle, nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.LeakyReLU(0.5),
        nn.Flatten(), nn.Linear(180, 1, bias=False),
    )  # fmt: skip


def _perceptron(out: int = 1, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(32, 24, bias=bias), _leaky(), nn.Linear(24, 12, bias=bias),
        _leaky(), nn.Linear(12, out, bias=bias),
    )  # fmt: skip


def _behind_the_last() -> nn.Sequential:
    """An activation on the logit itself, as FCN3 has one."""
    return nn.Sequential(*_perceptron(), _leaky())


def _normalised() -> nn.Sequential:
    return nn.Sequential(Normalise((0.4, 0.6), (0.2, 0.3)), *_cnn(_leaky, out=5))


def _batchnorm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), _leaky(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(96, 12), nn.BatchNorm1d(12), nn.ELU(), nn.Linear(12, 4),
    )  # fmt: skip


def _pooled() -> nn.Sequential:
    """Averages of overlapping places, which keep their input."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.AvgPool2d(2, stride=1, padding=1, count_include_pad=False), _leaky(),
        nn.AvgPool2d(2, stride=1, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False), _leaky(),
        nn.Flatten(), nn.Linear(384, 1, bias=False),
    )  # fmt: skip


def _residual(act: Callable[[], nn.Module], *, skip: bool = True, out: int = 4) -> nn.Sequential:
    """A block whose shortcut is the identity and one that halves the picture."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), act(),
        ResidualBlock(4, 4, act, bias=out > 1, skip=skip),
        ResidualBlock(4, 8, act, stride=2, bias=False, skip=skip),
        nn.Flatten(), nn.Linear(72, out, bias=out > 1),
    )  # fmt: skip


def _thin_block() -> nn.Sequential:
    """A block whose second layer alone does not fix what lies between its two."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), _leaky(),
        ResidualBlock(3, 3, _leaky, bias=False),
        nn.Flatten(), nn.Linear(108, 1, bias=False),
    )  # fmt: skip


def _short_second_layer() -> nn.Sequential:
    """CNN6-d in small: the second convolution has too few filters."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), _leaky(),
        nn.Conv2d(12, 4, 3, stride=2, padding=1, bias=False), _leaky(),
        nn.Conv2d(4, 8, 3, padding=1, bias=False), _leaky(),
        nn.Flatten(), nn.Linear(128, 1, bias=False),
    )  # fmt: skip


def _short_first_layer(act: Callable[[], nn.Module] = _leaky, *, bias: bool = False):
    return nn.Sequential(
        nn.Conv2d(2, 2, 4, stride=2, padding=1, bias=bias), act(),
        nn.Conv2d(2, 6, 3, padding=1, bias=bias), act(),
        nn.Flatten(), nn.Linear(96, 1, bias=bias),
    )  # fmt: skip


def _pooled_away() -> nn.Sequential:
    """Averages that do not overlap: three of four numbers are gone."""
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(2, 6, 3, padding=1), _leaky(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def _relu(*filters: int) -> nn.Sequential:
    first, second = filters
    return nn.Sequential(
        nn.Conv2d(2, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(second * 36, 5),
    )  # fmt: skip


# name: (network, image shape, loss, deficient)
_TABLE = {
    "leaky": (lambda: _cnn(_leaky), (2, 8, 8), "logistic", False),
    "leaky, bias": (lambda: _cnn(_leaky, bias=True), (2, 8, 8), "logistic", False),
    "exponential": (lambda: _cnn(_leaky), (2, 8, 8), "exponential", False),
    "hinge": (lambda: _cnn(_leaky), (2, 8, 8), "hinge", False),
    "hinge, bias": (lambda: _cnn(_leaky, bias=True), (2, 8, 8), "hinge", False),
    "softmax": (lambda: _cnn(_leaky, out=5), (2, 8, 8), "softmax", False),
    "softmax, bias": (lambda: _cnn(_leaky, bias=True, out=5), (2, 8, 8), "softmax", False),
    "two classes": (lambda: _cnn(_leaky, out=2), (2, 8, 8), "softmax", False),
    "identity": (lambda: _cnn(nn.Identity, out=5), (2, 8, 8), "softmax", False),
    "tanh": (lambda: _cnn(nn.Tanh, out=5), (2, 8, 8), "softmax", False),
    "sigmoid": (lambda: _cnn(nn.Sigmoid), (2, 8, 8), "logistic", False),
    "softplus": (lambda: _cnn(lambda: nn.Softplus(3.0)), (2, 8, 8), "logistic", False),
    "elu": (lambda: _cnn(lambda: nn.ELU(0.7)), (2, 8, 8), "logistic", False),
    "relu": (lambda: _relu(8, 12), (2, 6, 6), "softmax", False),
    "geometry": (_geometry, (2, 8, 8), "logistic", False),
    "nested": (_deep_leaky, (1, 6, 6), "logistic", False),
    "perceptron": (_perceptron, (2, 4, 4), "logistic", False),
    "perceptron, softmax": (lambda: _perceptron(4, bias=True), (2, 4, 4), "softmax", False),
    "behind the last": (_behind_the_last, (2, 4, 4), "logistic", False),
    "normalised": (_normalised, (2, 8, 8), "softmax", False),
    "batchnorm": (_batchnorm, (2, 8, 8), "softmax", False),
    "pooled": (_pooled, (2, 6, 6), "logistic", False),
    "residual": (lambda: _residual(_leaky), (2, 5, 5), "softmax", False),
    "residual, smooth": (lambda: _residual(nn.Softplus), (2, 5, 5), "softmax", False),
    "residual, cut": (lambda: _residual(_leaky, skip=False), (2, 5, 5), "softmax", False),
    "short second layer": (_short_second_layer, (1, 8, 8), "logistic", True),
    "short first layer": (_short_first_layer, (2, 8, 8), "logistic", True),
    "short first layer, relu": (lambda: _relu(1, 6), (2, 6, 6), "softmax", True),
    "pooled away": (_pooled_away, (2, 8, 8), "softmax", True),
    "short first layer, bias": (lambda: _short_first_layer(bias=True), (2, 8, 8), "logistic", True),
}  # fmt: skip
# not for every test: the first has too little in its block, the second takes seconds
_APART = {
    "thin block": (_thin_block, (1, 6, 6), "logistic", False),
    "residual, one logit": (lambda: _residual(_leaky, out=1), (2, 5, 5), "logistic", False),
}
NAMES = list(_TABLE)
FULL = [name for name, (*_, deficient) in _TABLE.items() if not deficient]
SHORT = [name for name, (*_, deficient) in _TABLE.items() if deficient]


@cache
def case(name: str, seed: int | None = None) -> Case:
    """A case by name; the same tensors every time, so do not change them.

    `seed` draws other weights than the usual ones.
    """
    make, shape, loss, deficient = (_TABLE | _APART)[name]
    generator = torch.Generator().manual_seed(len(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(name.encode()) if seed is None else seed)
        model = make().to(DTYPE).eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.uniform_(-0.3, 0.3)
    images = torch.rand(VICTIMS, 1, *shape, generator=generator, dtype=DTYPE)
    with torch.no_grad():
        classes = model(images[0]).shape[1]
    labels = torch.randint(max(2, classes), (VICTIMS, 1), generator=generator)
    return Case(name, model, Victims(images, labels), loss, deficient)
