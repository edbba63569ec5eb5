"""Torch's global random numbers, borrowed and given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def global_seed(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's global generators start at `seed`; afterwards they are as they were.

    For code that can only draw from the global generators: the construction of layers, dropout.
    Unlike `torch.manual_seed`, it leaves the generators of other devices alone.

    Args:
        seed: of the CPU's generator, and of the device's where that is a GPU.
        device: the device that the code inside works on.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
