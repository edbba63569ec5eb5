"""A model as a function: no buffer changes, no random draws, BatchNorm's inputs in view."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leaklib.gradients.stochastic import Noise, check_noise, one_step, stochastic_layers


def batchnorm_statistics(
    model: nn.Module, images: Tensor, noise: Noise | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of every BatchNorm layer's input, per channel.

    Args:
        model: any module; not changed.
        images: (batch, channels, height, width).
        noise: of the first local step, for a stochastic model; see `draw_noise`.

    Returns:
        Layer name -> (mean, variance), each (channels,), differentiable in the images.
    """
    return statistics_function(model)(images, noise or {})


def statistics_function(
    model: nn.Module,
) -> Callable[[Tensor, Noise], dict[str, tuple[Tensor, Tensor]]]:
    """`batchnorm_statistics` as a function of images and noise, safe under `vmap` and `vjp`."""
    frozen = without_side_effects(model, noise=True)

    def measure(images: Tensor, noise: Noise) -> dict[str, tuple[Tensor, Tensor]]:
        check_noise(frozen, noise)
        with _recorded_inputs(frozen) as inputs:
            functional_call(frozen, one_step(noise, 0), (images,))
        result = {}
        for name, value in inputs.items():
            dims = [d for d in range(value.ndim) if d != 1]
            result[name] = (value.mean(dims), value.var(dims, unbiased=False))
        return result

    return measure


@contextmanager
def _recorded_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what enters each BatchNorm layer during the forward passes inside."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
            inputs[name] = args[0]

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


class _BatchStatisticsNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm in train mode written out, without the running update.

    An in-place buffer update is no function, and torch's fused kernel cannot be differentiated
    twice under vmap in float32.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Any number of dimensions: the layer this stands for has checked its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(x − mean) / √(var + eps) · γ + β per channel, statistics of this batch."""
        dims = [d for d in range(input.ndim) if d != 1]
        centred = input - input.mean(dims, keepdim=True)
        scaled = centred / (centred.square().mean(dims, keepdim=True) + self.eps).sqrt()
        if self.weight is None:
            return scaled
        shape = (1, -1) + (1,) * (input.ndim - 2)
        return scaled * self.weight.view(shape) + self.bias.view(shape)


class _ComposedPReLU(nn.PReLU):
    """PReLU written out: torch's own, differentiated twice under two vmaps, is silently wrong."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map x to x where x > 0, and to w x elsewhere; w one number or one per channel."""
        shape = (1, -1) + (1,) * (input.ndim - 2) if input.ndim > 1 else (-1,)
        return torch.where(input > 0, input, self.weight.view(shape) * input)


def without_side_effects(model: nn.Module, *, noise: bool = False) -> nn.Module:
    """A copy whose forward pass changes no buffer and draws no random number.

    Args:
        model: any module; not changed.
        noise: the caller puts in the noise of stochastic layers (`gradients.stochastic`).

    Raises:
        ValueError: dropout in train mode, or a stochastic layer whose noise nobody puts in.
    """
    frozen = copy.deepcopy(model)
    if not noise and (drawing := stochastic_layers(model)):
        raise ValueError(
            f"expected a deterministic model, got layers that draw noise ({', '.join(drawing)}); "
            "build them with sampling='training' and call model.eval()"
        )
    for name, module in frozen.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            module.__class__ = _BatchStatisticsNorm
        if type(module) is nn.PReLU:
            module.__class__ = _ComposedPReLU
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"expected a deterministic model, got dropout {name!r} in train mode; "
                "call model.eval(), or set its p to 0"
            )
    return frozen
