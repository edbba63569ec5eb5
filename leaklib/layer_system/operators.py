"""The linear system that one layer poses about its input: U x = [W; K] x = [z; ∇W].

The weight rows W say what the layer made of its input x: W x = z (without the bias). The gradient
rows K, linear in k = ∂L/∂z, say what its gradient is: K x = vec ∂L/∂W. Both see x through the same
windows, so one unfolding serves both and no matrix is ever built:

    W x = w · unfold(x),      K x = k · unfold(x)ᵀ,
    Uᵀ(u, v) = fold(wᵀ u + vᵀ k).

Source: Zhu & Blaschko 2021 (R-GAP), Algorithm 1 and released code; Chen & Campbell 2021 (COPA) pose
the same system.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from leaklib.layer_system.geometry import Geometry, fold, unfold

Rows = tuple[Tensor, ...]


class LinearMap(Protocol):
    """A linear map without parameters behind the layer, such as average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""

    def transposed(self, y: Tensor) -> Tensor:
        """Apply its transpose."""


@dataclass(frozen=True)
class LayerSystem:
    """Rows [W; s K] of one layer for many victims.

    Args:
        geometry: sizes of the layer.
        weight: w (filters, channels per group, kernel height, kernel width).
        preactivation_grad: k = ∂L/∂z (victims, filters, height, width).
        scale: s (victims,), weight of the gradient rows beside the weight rows.
        known: which entries of z are known (victims, filters, height, width); None: all.
        pool: a linear map behind the layer: then z is known as P z only, and P W are the rows.
    """

    geometry: Geometry
    weight: Tensor
    preactivation_grad: Tensor
    scale: Tensor
    known: Tensor | None = None
    pool: LinearMap | None = None

    def rows(self, x: Tensor) -> Rows:
        """[W; s K] x for x (victims, channels, height, width).

        Returns:
            W x as (victims, filters, height, width), and s K x shaped as (victims, *weight shape).
            Cost: two small matrix products on the unfolded input.
        """
        geometry = self.geometry
        seen = unfold(geometry, x)  # (victims, groups, channels·taps, positions)
        preactivation = (self._weight() @ seen).flatten(1, 2)
        preactivation = preactivation.view(-1, *geometry.output_shape)
        if self.pool is not None:
            preactivation = self.pool.forward(preactivation)
        grad = (self._grad() @ seen.mT).view(-1, *geometry.weight_shape)
        if self.known is not None:
            preactivation = preactivation * self.known
        return preactivation, grad * self.scale.view(-1, 1, 1, 1, 1)

    def adjoint(self, rows: Rows) -> Tensor:
        """[W; s K]ᵀ applied to what `rows` returns: (victims, channels, height, width)."""
        u, v = rows
        if self.known is not None:
            u = u * self.known
        if self.pool is not None:
            u = self.pool.transposed(u)
        v = v * self.scale.view(-1, 1, 1, 1, 1)
        u = u.reshape(len(u), self.geometry.groups, -1, self.geometry.positions)
        v = v.reshape(len(v), self.geometry.groups, -1, self._weight().shape[-1])
        return fold(self.geometry, self._weight().mT @ u + v.mT @ self._grad())

    def target(self, preactivation: Tensor, weight_grad: Tensor) -> Rows:
        """Right-hand side [z; s ∇W], with what is unknown of z set to zero."""
        if self.known is not None:
            preactivation = preactivation * self.known
        return preactivation, weight_grad * self.scale.view(-1, 1, 1, 1, 1)

    def select(self, victims: Tensor) -> LayerSystem:
        """The same system for some victims."""
        return replace(
            self,
            preactivation_grad=self.preactivation_grad[victims],
            scale=self.scale[victims],
            known=None if self.known is None else self.known[victims],
        )

    def _weight(self) -> Tensor:
        return grouped_weight(self.geometry, self.weight)

    def _grad(self) -> Tensor:
        return grouped_grad(self.geometry, self.preactivation_grad)


def balanced_scale(geometry: Geometry, weight: Tensor, preactivation_grad: Tensor) -> Tensor:
    """Scale s = (‖w‖/√filters) / (‖k‖/√positions): rows of W and of s K have one typical length.

    Unscaled, the gradient rows are 100 to 1000 times shorter, and least squares trusts the weight
    rows instead, which carry all the error of the layers behind. Source: our derivation.

    Args:
        geometry: sizes of the layer.
        weight: (filters, channels per group, kernel height, kernel width).
        preactivation_grad: (victims, filters, height, width).

    Returns:
        (victims,); 1 where k = 0.
    """
    weight_row = weight.norm() / geometry.filters**0.5
    grad_row = preactivation_grad.flatten(1).norm(dim=1) / geometry.positions**0.5
    return torch.where(grad_row > 0, weight_row / grad_row, torch.ones_like(grad_row))


def transposed_weight_rows(
    geometry: Geometry, weight: Tensor, preactivation_grad: Tensor
) -> Tensor:
    """Wᵀ k: the gradient at the layer's input, (victims, channels, height, width)."""
    k = grouped_grad(geometry, preactivation_grad)
    return fold(geometry, grouped_weight(geometry, weight).mT @ k)


def grouped_weight(geometry: Geometry, weight: Tensor) -> Tensor:
    """The kernel as a matrix a group: (groups, filters per group, channels·taps)."""
    return weight.reshape(geometry.groups, geometry.filters // geometry.groups, -1)


def grouped_grad(geometry: Geometry, preactivation_grad: Tensor) -> Tensor:
    """Reshape k to matrices: (victims, groups, filters per group, positions)."""
    return preactivation_grad.reshape(
        len(preactivation_grad), geometry.groups, -1, geometry.positions
    )
