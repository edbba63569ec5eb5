"""Conjugate gradients for (K + εI) x = b: many right-hand sides, many shifts, one Krylov space.

K is symmetric and positive semi-definite and known only by its products; see `products`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leaklib.influence.products import Apply, dot, normalised, packed_product

# The recursion aims below the tolerance, so that rounding seldom costs a second pass.
AIM = 0.5


@dataclass(frozen=True)
class Solution:
    """Solutions of (K + εI) x = b, with what was measured about them.

    Attributes:
        x: (victims, vectors, shifts, d).
        residual: (victims, vectors, shifts), ‖b − (K + εI)x‖/‖b‖ measured with a product of its
            own; 0 where b = 0.
        converged: (victims, vectors, shifts), residual <= tolerance.
        products: (victims, vectors), products with K spent on each right-hand side, those that
            measured the residuals included.
        applied: vectors that went through the operator in all. It exceeds the sum of `products`
            by the idle places of victims that had finished.
    """

    x: Tensor
    residual: Tensor
    converged: Tensor
    products: Tensor
    applied: int


def conjugate_gradient(
    apply: Apply,
    b: Tensor,
    *,
    shifts: Tensor,
    tolerance: float = 1e-6,
    max_products: int = 1000,
) -> Solution:
    """Solve (K + εI) x = b for every shift ε from one Krylov space per right-hand side.

    The residuals of all shifts stay collinear with that of the smallest one, r_ε = ζ_ε r with
    0 < ζ_ε <= 1, so that a single product per step serves them all and the smallest shift is the
    last to converge. Each pair of right-hand side and shift stops by itself. At the end each
    residual is measured; where it exceeds the tolerance, which rounding in float32 may cause, the
    correction is solved for (iterative refinement) until that no longer helps.

    A pair that does not converge says so. For the smallest shift, the only one with K + εI possibly
    singular, x is smoothed to the smallest residual in the Krylov space (what MINRES returns), so
    that it never leaves the floor that b outside the range sets. For b inside, the norms of the
    iterates grow towards that of the (minimum-norm) solution: an unconverged ‖x‖ is too small.

    Cost: one product a step, and one per shift at the end. Steps grow like √((λ_max+ε)/(λ_min+ε)).
    Memory: 2 float64 vectors of size d per right-hand side and shift,
    about 8 more per right-hand side.
    Source: Hestenes & Stiefel 1952; shifts by Frommer & Maass 1999; smoothing by Zhou & Walker
    1994; norms by Steihaug 1983, Fong & Saunders 2012.

    Args:
        apply: u (victims, vectors, d) -> K u, K symmetric and positive semi-definite.
        b: (victims, vectors, d), the right-hand sides; their dtype and device are those of the
            products.
        shifts: (shifts,) or (victims, shifts), each >= 0; 0 is allowed.
        tolerance: on ‖b − (K + εI)x‖/‖b‖.
        max_products: for each right-hand side, all shifts and all checks together.

    Returns:
        Solution; x has the dtype of b.

    Raises:
        ValueError: arguments that do not fit, or products that are not finite.

    >>> K = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    >>> b = torch.tensor([[[4.0, 6.0]]], dtype=torch.float64)
    >>> found = conjugate_gradient(lambda u: u @ K, b, shifts=torch.tensor([0.0, 1.0]))
    >>> torch.round(found.x, decimals=9)
    tensor([[[[4.0000, 2.0000],
              [2.0000, 1.5000]]]], dtype=torch.float64)
    >>> found.converged.all().item(), found.products.item()
    (True, 4)
    """
    shifts = _checked(b, shifts, tolerance, max_products)
    victims, vectors, d = b.shape
    count = shifts.shape[1]
    # Unit right-hand sides: squares neither overflow nor underflow on the way.
    unit, scale = normalised(b.double())
    ascending, order = shifts.sort(dim=1)
    budget = torch.full_like(scale, max_products - count, dtype=torch.int64) * (scale > 0)
    aim = torch.full_like(scale, AIM * tolerance)
    each = ascending[:, None].expand(-1, vectors, -1)
    x, used, applied, top = _krylov(apply, unit, each, budget, aim, 0 * aim, b.dtype)
    back = order.argsort(dim=1)[:, None, :, None].expand_as(x)
    x = (x * scale[..., None, None]).gather(2, back)

    # From here every pair is a right-hand side with one shift: their residuals, as rounded, are
    # no longer collinear.
    pairs = (victims, vectors * count)
    epsilon = shifts[:, None].expand(-1, vectors, -1).reshape(*pairs, 1)
    target = b.double().repeat_interleave(count, dim=1)
    size = scale.repeat_interleave(count, dim=1)

    def residual(x: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
        found, width = packed_product(apply, x, wanted, dtype=b.dtype)
        return target - found - epsilon * x, width

    x = x.reshape(*pairs, d).to(b.dtype).double()
    r, width = residual(x, size > 0)
    used, applied = used + count * (scale > 0), applied + width
    error = _relative(r, size)
    top = top.repeat_interleave(count, dim=1)
    stalled = torch.zeros_like(error, dtype=torch.bool)
    while True:
        wanted = (error > tolerance) & ~stalled
        asked = wanted.view(victims, vectors, count).sum(2)
        share = (max_products - used) // asked.clamp(min=1) - 1
        share = share.repeat_interleave(count, dim=1) * wanted
        wanted &= share > 0
        if not wanted.any():
            break
        unit, norm = normalised(r)
        aim = AIM * tolerance * size / norm
        step, spent, width, top = _krylov(apply, unit, epsilon, share * wanted, aim, top, b.dtype)
        trial = (x + step[:, :, 0] * norm[..., None]).to(b.dtype).double()
        r_trial, checked = residual(trial, wanted)
        applied += width + checked
        used = used + (spent + wanted).view(victims, vectors, count).sum(2)
        error_trial = _relative(r_trial, size)
        # Less than half is rounding, or a floor that x would grow along the null space to lower.
        better = wanted & ((error_trial <= 0.5 * error) | (error_trial <= tolerance))
        stalled |= wanted & ~better
        x = torch.where(better[..., None], trial, x)
        r = torch.where(better[..., None], r_trial, r)
        error = torch.where(better, error_trial, error)
    error = error.view(victims, vectors, count)
    return Solution(
        x=x.view(victims, vectors, count, d).to(b.dtype),
        residual=error,
        converged=error <= tolerance,
        products=used,
        applied=applied,
    )


def _krylov(
    apply: Apply,
    b: Tensor,
    shifts: Tensor,
    budget: Tensor,
    aim: Tensor,
    top: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, int, Tensor]:
    """The recursion, from x = 0.

    With ρ = ζ'/ζ the ratio of a shift's new and old residual to the base system's,
    1/ρ' = 1 + τα + (αβ₋/α₋)(1 − ρ), τ >= 0 the distance to the smallest shift; the shift's own
    step is αρ' and its own update βρ'². All ρ lie in (0, 1]: nothing here overflows.

    Args:
        apply: the operator.
        b: (victims, vectors, d), unit vectors or zero.
        shifts: (victims, vectors, shifts), ascending.
        budget: (victims, vectors), products to spend at most.
        aim: (victims, vectors), residual norm at which to stop.
        top: (victims, vectors), the largest curvature pᵀ(K + εI)p/pᵀp met so far.
        dtype: the precision the operator works in.

    Returns:
        x (victims, vectors, shifts, d), products used (victims, vectors), vectors applied in all,
        top.
    """
    base, tau = shifts[..., :1], shifts - shifts[..., :1]
    r = b.clone()
    p = b[:, :, None].repeat(1, 1, shifts.shape[2], 1)
    x = torch.zeros_like(p)
    x_low, r_low = x[:, :, 0].clone(), b
    rr, least = dot(r, r), torch.full_like(aim, torch.inf)
    rounding = 16 * torch.finfo(dtype).eps
    alpha_old, beta_old = torch.ones_like(aim), torch.zeros_like(aim)
    zeta, rho = torch.ones_like(tau), torch.ones_like(tau)
    used, applied = torch.zeros_like(budget), 0
    running = (rr.sqrt() > aim) & (budget > 0)
    while running.any():
        q = p[:, :, 0]
        found, width = packed_product(apply, q, running, dtype=dtype)
        kq = found + base * q
        used, applied = used + running, applied + width
        # A direction whose curvature is rounding only lies in the null space: no step along it.
        curvature, length = dot(q, kq), dot(q, q)
        quotient = curvature / length
        top = torch.where(running, torch.maximum(top, quotient), top)
        running = running & (quotient > rounding * top)
        least = torch.where(running, torch.minimum(least, quotient), least)
        alpha = torch.where(running, rr / curvature, 0.0)
        rho = 1 / (
            1 + tau * alpha[..., None] + (alpha * beta_old / alpha_old)[..., None] * (1 - rho)
        )
        open_ = running[..., None] & (zeta * rr.sqrt()[..., None] > aim[..., None])
        x.addcmul_(torch.where(open_, alpha[..., None] * rho, 0.0)[..., None], p)
        r = torch.addcmul(r, -alpha[..., None], kq)
        rr_new = dot(r, r)
        # Residual smoothing: along (x_low, x) the point of smallest residual.
        gap = r - r_low
        eta = -dot(r_low, gap) / dot(gap, gap).clamp(min=torch.finfo(torch.float64).tiny)
        eta = torch.where(running, eta, 0.0)[..., None]
        x_low = x_low + eta * (x[:, :, 0] - x_low)
        r_low = r_low + eta * gap
        beta = torch.where(running, rr_new / rr, 0.0)
        zeta = zeta * rho
        p = zeta[..., None] * r[:, :, None] + (beta[..., None] * rho**2)[..., None] * p
        alpha_old = torch.where(running, alpha, alpha_old)
        beta_old, rr = beta, torch.where(running, rr_new, rr)
        running = running & (rr.sqrt() > aim) & (used < budget)
    # A step that only the later curvatures expose as one along the null space spoils the rest.
    x[:, :, 0] = torch.where((least > rounding * top)[..., None], x_low, 0.0)
    return x, used, applied, top


def _relative(r: Tensor, size: Tensor) -> Tensor:
    """‖r‖/‖b‖, 0 where b = 0."""
    return torch.where(size > 0, normalised(r)[1] / size, 0.0)


def _checked(b: Tensor, shifts: Tensor, tolerance: float, max_products: int) -> Tensor:
    """The shifts as float64 (victims, shifts) on b's device."""
    if b.ndim != 3 or not b.is_floating_point():
        raise ValueError(
            "expected b of shape (victims, vectors, d), floating point, got "
            f"{tuple(b.shape)}, {b.dtype}; one right-hand side of one victim is b[None, None]"
        )
    if not b.isfinite().all():
        raise ValueError("expected finite right-hand sides, got NaN or infinity; check δ and J")
    shifts = shifts.detach().to(b.device, torch.float64)
    if shifts.ndim == 1:
        shifts = shifts.expand(len(b), -1)
    if shifts.ndim != 2 or len(shifts) != len(b) or shifts.shape[1] == 0:
        raise ValueError(
            f"expected shifts of shape (shifts,) or (victims, shifts) with {len(b)} victims, got "
            f"{tuple(shifts.shape)}; one shift is torch.tensor([shift])"
        )
    if not (shifts.isfinite() & (shifts >= 0)).all():
        raise ValueError(f"expected finite shifts >= 0, got {shifts.flatten().tolist()}")
    if not tolerance > 0:
        raise ValueError(f"expected tolerance > 0, got {tolerance}; try 1e-4 in float32")
    if max_products <= shifts.shape[1]:
        raise ValueError(
            f"expected max_products > {shifts.shape[1]}, got {max_products}: every shift takes one "
            "product to check its residual"
        )
    return shifts
