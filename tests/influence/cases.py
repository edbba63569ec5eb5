"""Small differentiable networks of every kind, with their victims and an independent Jacobian."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPE = torch.float64


@dataclass(frozen=True)
class Case:
    """A network, private inputs (victims, batch, *input shape), labels and a loss."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    loss: Callable[..., Tensor] = field(default=F.cross_entropy)

    @property
    def arguments(self):
        """What `influence_operator` takes, but for settings."""
        return (self.model, self.inputs, self.labels)


class Residual(nn.Module):
    """x + conv(relu(norm(x))), the ReLU in place."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv(self.act(self.norm(x)))


class Transformer(nn.Module):
    """One block on embeddings (batch, tokens, width): LayerNorm, attention, GELU, a raw parameter.

    `fused` calls `scaled_dot_product_attention`, whose CPU kernel has no second derivative.
    """

    def __init__(self, tokens=3, width=4, classes=3, *, fused=True, every_token=False):
        super().__init__()
        self.every_token, self.fused = every_token, fused
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.3)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width, bias=False)
        self.wide, self.narrow = nn.Linear(width, 6), nn.Linear(6, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = x + self.position
        h = self.mix(self.norm1(x))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-2, -3) for t in h.chunk(3, dim=-1))
        if self.fused:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            h = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.project(h.transpose(-2, -3).flatten(-2))
        x = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return self.head(x if self.every_token else x.mean(-2))


def token_cross_entropy(outputs, labels, *, reduction="mean"):
    """Cross-entropy of every token: outputs (batch, tokens, classes), labels (batch, tokens)."""
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction=reduction)


def squared_loss(outputs, labels, *, reduction="mean"):
    """½‖outputs − onehot‖² per example: a loss that is not cross-entropy."""
    # F.one_hot looks at values, which vmap over victims forbids
    places = torch.arange(outputs.shape[-1], device=labels.device)
    target = (labels[..., None] == places).to(outputs.dtype)
    each = 0.5 * (outputs - target).square().sum(-1)
    return each.mean() if reduction == "mean" else each.sum()


def _mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 7), nn.Softplus(), nn.Linear(7, 4))


def _convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Sigmoid(),
        nn.Conv2d(4, 3, (2, 3), dilation=(2, 1), padding=(1, 2), bias=False), nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding="same"), nn.Softplus(),
        nn.Conv2d(3, 2, 2, padding="valid"), nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def _batchnorm():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(27, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4),
    )  # fmt: skip


def _groupnorm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def _residual():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Residual(4), nn.MaxPool2d(2), Residual(4),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def _linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


class TwiceUsed(nn.Module):
    """One layer called twice, and its weight tied to the way out."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out.weight = self.inner.weight

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


# name: (network, input shape of one example, batch, classes, settings)
_TABLE = {
    "mlp": (_mlp, (1, 3, 3), 1, 4, {}),
    "convolutions": (_convolutions, (2, 7, 6), 1, 4, {}),
    "batchnorm": (_batchnorm, (1, 5, 5), 1, 4, {}),
    "groupnorm": (_groupnorm, (1, 4, 4), 1, 4, {}),
    "residual": (_residual, (1, 4, 4), 1, 4, {}),
    "linear": (_linear, (1, 3, 3), 1, 3, {}),
    "soft labels": (_mlp, (1, 3, 3), 1, 4, {"soft": True}),
    "batch of 2": (_batchnorm, (1, 5, 5), 2, 4, {}),
    "batch of 3, soft": (_groupnorm, (1, 4, 4), 3, 4, {"soft": True}),
    "transformer": (Transformer, (3, 4), 1, 3, {}),
    "next tokens": (
        lambda: Transformer(fused=False, every_token=True),
        (3, 4), 2, 3, {"tokens": 3, "loss": token_cross_entropy},
    ),
    "squared loss": (_mlp, (1, 3, 3), 2, 4, {"loss": squared_loss}),
    "twice used": (TwiceUsed, (6,), 1, 6, {}),
}  # fmt: skip
NAMES = list(_TABLE)


@cache
def case(name: str, victims: int = 2) -> Case:
    """A case by name; the same tensors every time, so do not change them."""
    make, shape, batch, classes, settings = _TABLE[name]
    generator = torch.Generator().manual_seed(len(name))
    inputs = torch.randn(victims, batch, *shape, generator=generator, dtype=DTYPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NAMES.index(name))
        model = make().to(DTYPE).eval()
        model(inputs[0].to(DTYPE))  # shapes of lazy layers
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.uniform_(-0.3, 0.3)
    if settings.get("soft"):
        scores = torch.randn(victims, batch, classes, generator=generator, dtype=DTYPE)
        labels = scores.softmax(-1)
    else:
        places = (victims, batch, *([settings["tokens"]] if "tokens" in settings else []))
        labels = torch.randint(classes, places, generator=generator)
    return Case(name, model, inputs, labels, settings.get("loss", F.cross_entropy))


@cache
def dense_jacobian(one: Case, reduction: str = "mean") -> Tensor:
    """J (victims, d, p) by `torch.autograd.functional.jacobian` of the flattened gradient."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.stack([_dense(one, i, reduction) for i in range(len(one.inputs))])


def _dense(one: Case, victim: int, reduction: str) -> Tensor:
    params = list(one.model.parameters())

    def flat_gradient(x):
        value = one.loss(one.model(x), one.labels[victim], reduction=reduction)
        parts = torch.autograd.grad(value, params, create_graph=True)
        return torch.cat([part.flatten() for part in parts])

    jac = torch.autograd.functional.jacobian(flat_gradient, one.inputs[victim])
    return jac.flatten(1).T.contiguous()  # (p, d) -> (d, p)
