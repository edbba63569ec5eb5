"""Small networks of different make, with the layer that a bottleneck goes in front of."""

import torch
from conftest import small_lenet, small_mlp
from torch import nn

from leaklib.models import build, transformer

DTYPE = torch.float64


class Tokens(nn.Module):
    """A vision transformer in small: patches, class token and positions held by the model."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(5, 16))
        self.scale = nn.Parameter(torch.ones(10))  # held by the model too, used at the very end
        self.embed = nn.Linear(16, 16)
        # built in another order than it runs
        self.classifier = nn.ModuleDict({"out": nn.Linear(16, 10), "norm": nn.LayerNorm(16)})
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, images):
        """Logits of (batch, 1, 8, 8)."""
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(images), 4, 16)
        x = torch.cat([self.cls.expand(len(images), 1, 16), self.embed(patches)], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.scale * self.classifier["out"](self.classifier["norm"](x[:, 0]))


class Nested(nn.Module):
    """Children of children, one of them never called, run against the order of definition."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
        self.spare = nn.Linear(3, 3)
        self.body = nn.ModuleDict({"second": nn.Conv2d(4, 8, 3, padding=1), "first": nn.Conv2d(
            1, 4, 3, stride=2, padding=1)})  # fmt: skip

    def forward(self, images):
        """Logits of (batch, 1, 8, 8)."""
        return self.head(self.body["second"](self.body["first"](images).tanh()).sigmoid())


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return make().eval().to(DTYPE)


# name -> (model, layer, shape of one input, features there)
HOSTS = {
    "mlp": (small_mlp, "fc", (1, 8, 8), (12,)),
    "lenet": (small_lenet, "flatten", (1, 8, 8), (12, 2, 2)),
    "resnet18": (
        lambda: build("resnet18", input_shape=(3, 8, 8), norm="group").to(DTYPE),
        "fc", (3, 8, 8), (512,),
    ),
    "transformer": (
        lambda: transformer(tokens=5, dim=16, outputs=10).to(DTYPE), "blocks.0.network", (5, 16),
        (5, 16),
    ),
    "tokens": (lambda: seeded(Tokens), "classifier.out", (1, 8, 8), (16,)),
    "nested": (lambda: seeded(Nested), "body.second", (1, 8, 8), (4, 4, 4)),
}  # fmt: skip
