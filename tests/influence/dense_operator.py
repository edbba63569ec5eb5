"""An operator whose Jacobian is given: the theory's tests need no network."""

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

PROPERTY = settings(deadline=None, derandomize=True)


@dataclass(frozen=True, eq=False)
class DenseOperator:
    """J as a tensor (victims, d, p), with the products of `InfluenceOperator`.

    Args:
        jacobian: J, (victims, d, p).
        parameter_shapes: name -> shape, with p entries in all; None is one vector "theta".
        input_shape: (batch, *shape of one input) with d entries; None is (1, d).
    """

    jacobian: Tensor
    parameter_shapes: dict[str, torch.Size] = None
    input_shape: tuple[int, ...] = None
    form: str = "dense"

    def __post_init__(self):
        _, d, p = self.jacobian.shape
        if self.parameter_shapes is None:
            object.__setattr__(self, "parameter_shapes", {"theta": torch.Size([p])})
        if self.input_shape is None:
            object.__setattr__(self, "input_shape", (1, d))
        assert sum(prod(s) for s in self.parameter_shapes.values()) == p
        assert prod(self.input_shape) == d

    victims = property(lambda self: self.jacobian.shape[0])
    unknowns = property(lambda self: self.jacobian.shape[1])
    parameters = property(lambda self: self.jacobian.shape[2])
    dtype = property(lambda self: self.jacobian.dtype)
    device = property(lambda self: self.jacobian.device)

    def flat(self, v):
        """Perturbations as (victims, vectors, p)."""
        parts = []
        for name, shape in self.parameter_shapes.items():
            one = v[name] if v[name].ndim == len(shape) + 2 else v[name][:, None]
            assert one.shape[0] == self.victims
            assert one.shape[2:] == shape
            parts.append(one.flatten(2))
        return torch.cat(parts, 2)

    def named(self, flat):
        """(victims, vectors, p) as name -> (victims, vectors, *shape)."""
        sizes = [prod(shape) for shape in self.parameter_shapes.values()]
        parts = flat.split(sizes, dim=2)
        shapes = self.parameter_shapes.items()
        return {n: part.unflatten(2, s) for (n, s), part in zip(shapes, parts, strict=True)}

    def jv(self, v):
        return self.flat(v) @ self.jacobian.mT

    def jtu(self, u):
        return self.named(u @ self.jacobian)

    def gram_product(self, u):
        return (u @ self.jacobian) @ self.jacobian.mT

    def select(self, rows):
        return DenseOperator(self.jacobian[rows], self.parameter_shapes, self.input_shape)

    def gram(self):
        """K = JJᵀ, (victims, d, d)."""
        return self.jacobian @ self.jacobian.mT


def random_operator(seed, *, victims=2, d=5, p=9, spread=0.0, rank=None, scale=1.0):
    """J = U Σ Vᵀ with random U, V and σ from `scale` down to scale·10^−spread; zero beyond `rank`.

    With d = 6 the input is (1, 2, 3) and with p = 9 the parameters are a matrix and a vector.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    k = min(d, p)
    u, v = torch.linalg.qr(draw(victims, d, d))[0], torch.linalg.qr(draw(victims, p, p))[0]
    exponents = torch.rand(victims, k, generator=generator, dtype=torch.float64).sort(1).values
    exponents = (exponents - exponents[:, :1]) / (exponents[:, -1:] - exponents[:, :1] + 1e-300)
    sigma = scale * 10 ** (-spread * exponents)
    if rank is not None:
        sigma[:, rank:] = 0
    jacobian = (u[:, :, :k] * sigma[:, None]) @ v[:, :, :k].mT
    shapes = {"weight": torch.Size([2, 3]), "bias": torch.Size([p - 6])} if p > 6 else None
    return DenseOperator(jacobian, shapes, (1, 2, 3) if d == 6 else (1, d))


def random_perturbation(operator, seed, *, vectors=3, scale=1.0):
    """δ ~ N(0, scale² I) as the operator takes it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    flat = torch.randn(
        operator.victims, vectors, operator.parameters, generator=generator, dtype=torch.float64
    )
    return operator.named(scale * flat.to(operator.dtype))


@st.composite
def operators(draw, *, full_rank=True, spread=4.0):
    """Random J of every small size and scale: wide or square, or rank-deficient on request."""
    d = draw(st.integers(1, 7))
    p = draw(st.integers(d, 12)) if full_rank else draw(st.integers(1, 12))
    rank = None if full_rank else draw(st.integers(0, min(d, p) - (p >= d)))
    return random_operator(
        draw(st.integers(0, 2**20)),
        victims=draw(st.integers(1, 3)),
        d=d,
        p=p,
        spread=draw(st.floats(0, spread)),
        rank=rank,
        scale=10 ** draw(st.floats(-6, 6)),
    )
