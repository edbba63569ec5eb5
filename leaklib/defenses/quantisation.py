"""Quantisation: release signs, or a few levels per tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.defenses._base import check_generator, per_victim, rows
from leaklib.gradients.payload import SharedGradient, check_finite

__all__ = ["Quantize", "Sign"]


@dataclass(frozen=True)
class Sign:
    """Release only signs: ĝ = sign(g), or mean|g| · sign(g) with ``scaled``.

    The mean is taken per victim and tensor; zero stays zero.

    Settings:
        scaled: Keep the mean magnitude of each tensor.

    Raises:
        ValueError: The gradient is not finite.

    Source: J. Bernstein et al., ICML 2018, arXiv:1802.04434; scaled: S. P. Karimireddy et al.,
    ICML 2019, arXiv:1901.09847.

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[-4.0, 0.0, 2.0]])}, batch=1)
    >>> Sign(scaled=True)(shared).tensors["fc.weight"]
    tensor([[-2.,  0.,  2.]])
    """

    scaled: bool = False

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the signs."""
        check_finite(shared)
        if not self.scaled:
            return shared.replace({name: tensor.sign() for name, tensor in shared.items()})
        means = {
            name: rows(tensor).abs().mean(dim=1, dtype=torch.float64)
            for name, tensor in shared.items()
        }
        return shared.replace(
            {
                name: tensor.sign() * per_victim(means[name], tensor)
                for name, tensor in shared.items()
            }
        )


@dataclass(frozen=True)
class Quantize:
    """Round every entry to one of a few evenly spaced levels between −s and s, s = max|g|.

    With b bits, the levels are j·s/L for j = −L..L, L = 2^(b−1) − 1: zero is one of them, and one
    of the 2^b codes stays unused. A single bit leaves the two levels −s and s. s is taken per
    victim and tensor.

    The nearest level is released; ``stochastic`` instead rounds up with a probability equal to the
    fraction, so that E[ĝ] = g.

    Settings:
        bits: Bits per entry, 1 to 16.
        stochastic: Unbiased random rounding; then the call needs a generator.

    Raises:
        ValueError: A setting out of range; at the call, a gradient that is not finite, or a
            missing generator or one on another device where it is needed.

    Source: random rounding as in QSGD, D. Alistarh et al., NIPS 2017, arXiv:1610.02132, with the
    maximum in place of the norm.

    Two bits give the levels −s, 0 and s:

    >>> shared = SharedGradient({"fc.weight": torch.tensor([[-8.0, 3.0, 5.0]])}, batch=1)
    >>> Quantize(2)(shared).tensors["fc.weight"]
    tensor([[-8.,  0.,  8.]])
    """

    bits: int
    stochastic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise ValueError(f"expected bits to be an integer, got {self.bits!r}; 8 is usual")
        if not 1 <= self.bits <= 16:
            raise ValueError(f"expected bits from 1 to 16, got {self.bits}; 8 is usual")

    def __call__(
        self, shared: SharedGradient, *, generator: torch.Generator | None = None
    ) -> SharedGradient:
        """Return the quantised gradient, in the dtype of the input."""
        if self.stochastic:
            generator = check_generator(generator, shared.device, "Quantize(stochastic=True)")
        else:
            generator = None
        check_finite(shared)
        return shared.replace(
            {name: self._quantize(tensor, generator) for name, tensor in shared.items()}
        )

    def _quantize(self, tensor: Tensor, generator: torch.Generator | None) -> Tensor:
        # Float64 inside: in float32 the random number added to code 65535 would itself be rounded.
        grad = tensor.double()
        peak = per_victim(rows(grad).abs().amax(dim=1), grad)
        half = max(2 ** (self.bits - 1) - 1, 0.5)  # levels on one side of zero
        unit = torch.where(peak > 0, grad / peak, 0.0)  # in [-1, 1]
        codes = (unit + 1) * half if self.bits == 1 else unit * half
        if generator is None:
            codes = codes.round()
        else:
            uniform = torch.rand(
                tensor.shape, generator=generator, dtype=torch.float64, device=tensor.device
            )
            codes = (codes + uniform).floor()
        unit = codes / half - 1 if self.bits == 1 else codes / half
        return (unit.clamp(-1, 1) * peak).to(tensor.dtype)
