"""Layers that draw noise: the noise as an input, and the terms they add to the loss.

A stochastic layer reads its noise ε from a buffer `noise`. In normal use the buffer is None and the
layer draws ε from torch's global generator, so any training loop works as it is. A function of the
model instead puts the buffer in by name, as it puts in a parameter:

    noise = draw_noise(model, batch, generator=generator)     # {"fc.bottleneck.noise": ...}
    functional_call(model, parameters | one_step(noise, 0), (images,))

so that victims, attackers and `vmap` share one function. What a layer adds to the loss (the
bottleneck's KL divergence) is collected by a context around the forward pass, never stored:

    with collected_losses() as terms:
        outputs = model(images)
    value = add_losses(loss(outputs, labels), terms, "mean")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from leaklib.gradients.payload import Reduction

Noise = dict[str, Tensor]
Sampling = Literal["always", "training"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)

_terms: ContextVar[list[Tensor] | None] = ContextVar("leaklib_loss_terms", default=None)


class StochasticLayer(nn.Module):
    """A layer that adds noise to what passes, and possibly a term to the loss.

    A subclass gives `noise_shape`, takes its noise from `current_noise` and reports its term to
    `report_loss`.

    Args:
        sampling: "always" draws in train and eval mode, "training" in train mode alone.

    Raises:
        ValueError: an unknown `sampling`.
    """

    noise: Tensor | None

    def __init__(self, sampling: Sampling = "always") -> None:
        super().__init__()
        if sampling not in SAMPLINGS:
            raise ValueError(f"expected sampling among {', '.join(SAMPLINGS)}, got {sampling!r}")
        self.sampling = sampling
        # not persistent: a state_dict holds weights alone
        self.register_buffer("noise", None, persistent=False)

    @property
    def draws(self) -> bool:
        """Whether the next forward pass needs noise."""
        return self.sampling == "always" or self.training

    def noise_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of the noise for `batch` inputs."""
        raise NotImplementedError

    def current_noise(self, like: Tensor) -> Tensor:
        """The noise put in from outside, else a fresh draw from torch's global generator.

        Raises:
            ValueError: noise of another shape than `like`.
        """
        if self.noise is None:
            return torch.randn_like(like)
        if self.noise.shape != like.shape:
            raise ValueError(
                f"expected noise of shape {tuple(like.shape)}, got {tuple(self.noise.shape)}; "
                "draw_noise(model, batch, ...) draws the right one"
            )
        return self.noise


@contextmanager
def collected_losses() -> Iterator[list[Tensor]]:
    """Collect the terms that layers add to the loss during the forward passes inside.

    Yields:
        A list that fills with tensors (batch,), one per such layer: empty for ordinary models.
    """
    terms: list[Tensor] = []
    token = _terms.set(terms)
    try:
        yield terms
    finally:
        _terms.reset(token)


def collecting() -> bool:
    """Whether anybody wants the terms: without, a layer need not compute its own."""
    return _terms.get() is not None


def report_loss(term: Tensor) -> None:
    """Hand a term of the loss, one number per input (batch,), to the context around."""
    terms = _terms.get()
    if terms is not None:
        terms.append(term)


def add_losses(value: Tensor, terms: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """The loss with what the layers add: value + Σ mean_batch(term), or Σ sum_batch(term).

    A client that sums its loss over the batch sums the terms too, so that both reductions weigh
    them alike against the loss of one input. Without terms, `value` itself.
    """
    for term in terms:
        value = value + (term.mean() if reduction == "mean" else term.sum())
    return value


def stochastic_layers(model: nn.Module) -> dict[str, StochasticLayer]:
    """Layers that will draw noise in the model's present mode: buffer name -> layer."""
    return {
        f"{name}.noise".removeprefix("."): module
        for name, module in model.named_modules()
        if isinstance(module, StochasticLayer) and module.draws
    }


def noise_shapes(model: nn.Module, batch: int, *, steps: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of the noise of one client: buffer name -> (local steps, *shape of the layer's noise).

    Empty for a deterministic model.
    """
    return {n: (steps, *layer.noise_shape(batch)) for n, layer in stochastic_layers(model).items()}


def draw_noise(
    model: nn.Module,
    batch: int,
    *,
    generator: torch.Generator | None,
    steps: int = 1,
    clients: int | None = None,
) -> Noise:
    """Standard normal noise for every stochastic layer, fresh in every local step.

    Drawn client by client: the first client does not depend on how many follow.

    Args:
        model: with or without stochastic layers; without, the answer is {} and needs no generator.
        batch: inputs per client.
        generator: source of the draws.
        steps: local steps, 1 for a plain gradient.
        clients: number of clients; None is one, without a leading axis.

    Returns:
        Buffer name -> ([clients,] steps, *shape of the layer's noise), in the model's dtype and on
        its device.

    Raises:
        ValueError: no generator for a stochastic model.
    """
    shapes = noise_shapes(model, batch, steps=steps)
    if not shapes:
        return {}
    if generator is None:
        raise ValueError(
            f"expected a generator for the noise of {', '.join(shapes)}, got none; pass "
            "generator=torch.Generator().manual_seed(seed)"
        )
    like = next(model.parameters())
    drawn = [
        {
            n: torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
            for n, shape in shapes.items()
        }
        for _ in range(1 if clients is None else clients)
    ]
    noise = {n: torch.stack([one[n] for one in drawn]).to(like.device) for n in shapes}
    return {n: tensor[0] for n, tensor in noise.items()} if clients is None else noise


def one_step(noise: Mapping[str, Tensor], step: int) -> Noise:
    """The buffers of one local step, to be put into `torch.func.functional_call`."""
    return {name: tensor[step] for name, tensor in noise.items()}


def check_noise(model: nn.Module, noise: Mapping[str, Tensor], *, steps: int | None = None) -> None:
    """Refuse a stochastic model without its noise, noise of other layers or of other local steps.

    Args:
        model: with or without stochastic layers.
        noise: as of `draw_noise`.
        steps: local steps that the noise must have; None takes any.

    Raises:
        ValueError: naming the buffers.
    """
    for name, tensor in noise.items():
        if steps is not None and len(tensor) != steps:
            raise ValueError(
                f"expected noise of {steps} local steps for {name!r}, got {len(tensor)}; draw it "
                f"with draw_noise(model, batch, generator=..., steps={steps})"
            )
    needed = set(stochastic_layers(model))
    if needed != set(noise):
        raise ValueError(
            f"expected noise for {sorted(needed) or 'no layer'}, got {sorted(noise) or 'none'}; "
            "draw it with draw_noise(model, batch, generator=...)"
        )
