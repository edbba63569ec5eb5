"""Small victims and small networks: every attack and every theory meets the same table of cases."""

import signal

import pytest
import torch
from torch import nn

from leaklib.data import Victims
from leaklib.models import build

DTYPE = torch.float64


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell starts background jobs with SIGINT ignored, and processes inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _one_thread():
    """Where threads outnumber cores, small kernels run several times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_victims(shape=(1, 8, 8), *, victims=3, batch=1, classes=10, seed=0, dtype=DTYPE):
    """Victims with uniform random pixels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(victims, batch, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (victims, batch), generator=generator)
    return Victims(images.to(dtype), labels)


def residual_network():
    """BatchNorm, a skip connection, stride, groups, a layer without bias."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.tanh(x + self.norm(self.conv(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), Block(), nn.Flatten(),
            nn.Linear(64, 10),
        )  # fmt: skip
        norm = model[2].norm
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.data.uniform_(0.5, 1.5)
    return model.eval().to(DTYPE)


def small_lenet(**settings):
    """DLG's LeNet on 8x8 grey pictures."""
    settings = {"input_shape": (1, 8, 8), "init": "uniform", "seed": 3} | settings
    return build("lenet", **settings).to(DTYPE)


def small_mlp(**settings):
    """A dense network with one hidden layer."""
    settings = {"input_shape": (1, 8, 8), "hidden": (12,), "seed": 4} | settings
    return build("mlp", **settings).to(DTYPE)


NETWORKS = {
    "lenet": small_lenet,
    "mlp": small_mlp,
    "linear": lambda: build("linear", input_shape=(1, 8, 8), seed=2).to(DTYPE),
    "residual": residual_network,
    "normalised": lambda: small_lenet(normalisation="mnist"),
}


@pytest.fixture(params=list(NETWORKS))
def network(request):
    """One of the small networks, in eval mode and float64."""
    return NETWORKS[request.param]()
