"""The private loss as a pure function of parameters and input: what both forms differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from leaklib.gradients.client import Loss
from leaklib.gradients.payload import Reduction
from leaklib.gradients.stochastic import add_losses, collected_losses

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """L(θ, x, y) of one private batch.

    Attributes:
        params: the shared θ, detached, in the model's order.
        value: (θ, x, y) -> the scalar loss; pure, so safe under every `torch.func` transform.
    """

    params: Parameters
    value: Callable[[Parameters, Tensor, Tensor], Tensor]


def private_objective(
    model: nn.Module, *, loss: Loss, reduction: Reduction, names: tuple[str, ...]
) -> Objective:
    """L(θ, x, y) = loss(model(x; θ), y), θ the named parameters.

    Args:
        model: already free of side effects; it is called, never changed.
        loss: called as loss(outputs, labels, reduction=...).
        reduction: "mean" or "sum" over the batch.
        names: parameters that are differentiated; all others are constants.

    Returns:
        The objective.
    """
    everything = {n: p.detach() for n, p in model.named_parameters()}
    still = {n: p for n, p in everything.items() if n not in names} | dict(model.named_buffers())

    def value(params: Parameters, inputs: Tensor, labels: Tensor) -> Tensor:
        with differentiable_attention(), collected_losses() as terms:
            outputs = functional_call(model, params | still, (inputs,))
        return add_losses(loss(outputs, labels, reduction=reduction), terms, reduction)

    return Objective({n: everything[n] for n in names}, value)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by matmul and softmax inside.

    The fused kernels of `scaled_dot_product_attention` have no second derivative, and neither has
    the inference shortcut of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def explained_failures() -> Iterator[None]:
    """Say what to do where torch cannot differentiate a network twice, or not under `vmap`.

    Raises:
        RuntimeError: torch's own error with the way out in front.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one too
        text = str(error)
        if any(word in text for word in ("vmap", "functorch", "torch.func", "Batching rule")):
            raise RuntimeError(
                "expected a network that torch.func can transform, got an operation that it "
                f"cannot; pass form='graph' to influence_operator. torch says: {text}"
            ) from error
        if "derivative" in text or "differentiate twice" in text or "ouble backward" in text:
            raise RuntimeError(
                "expected a network that can be differentiated twice, got an operation that "
                "cannot: fused attention needs torch.nn.attention.sdpa_kernel(SDPBackend.MATH) "
                "where the network calls it, a recurrent layer "
                "torch.backends.cudnn.flags(enabled=False) or cells in a loop. torch says: "
                f"{text}"
            ) from error
        raise
