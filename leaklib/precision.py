"""Float32 that is float32: no TF32 inside attacks and shared gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 off inside, and back to what it was.

    On recent GPUs convolutions round float32 to 10 bits of mantissa by default: an error of about
    1e-3 in the gradient, which no search for a matching gradient gets past.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
