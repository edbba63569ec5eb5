"""L-BFGS over many independent problems, each with its own line search and stopping.

One tick evaluates every active row once, at that row's own trial point. Rows never wait for each
other: one may bracket a step while its neighbour zooms and a third starts a new direction.

Direction: the compact form of the inverse L-BFGS matrix (Byrd, Nocedal & Schnabel 1994, Thm 2.2).
Line search: strong Wolfe by bracketing and zooming (Nocedal & Wright 2006, Alg. 3.5 and 3.6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9
SEARCH_LIMIT = 25


@dataclass
class LBFGSState:
    """Everything a run needs to go on; tensors with a leading row axis.

    Line search: the trial step, the bracket ends (lo, hi) with value and slope, and whether the
    row is zooming. At lo the gradient is kept too, so that lo can be accepted without evaluating
    it again.
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    direction: Tensor
    slope: Tensor
    step: Tensor
    searches: Tensor
    zooming: Tensor
    lo: Tensor
    lo_value: Tensor
    lo_slope: Tensor
    lo_gradient: Tensor
    hi: Tensor
    hi_value: Tensor
    hi_slope: Tensor
    s: Tensor
    y: Tensor
    sy: Tensor
    yy: Tensor
    pairs: Tensor
    active: Tensor
    evaluations: Tensor

    @property
    def best_x(self) -> Tensor:
        """The last accepted iterate: the method only ever descends."""
        return self.x

    @property
    def best_value(self) -> Tensor:
        """Objective at the last accepted iterate."""
        return self.value


def start(x: Tensor, *, history: int = 100) -> LBFGSState:
    """State before the first evaluation, at x (rows, size)."""
    if history < 1:
        raise ValueError(f"expected history >= 1, got {history}")
    rows, size = x.shape

    def scalars(fill: float = 0.0) -> Tensor:
        return torch.full((rows,), fill, dtype=torch.float64, device=x.device)

    def counts() -> Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=x.device)

    def flags(fill: bool) -> Tensor:
        return torch.full((rows,), fill, device=x.device)

    def small() -> Tensor:
        return torch.zeros(rows, history, history, dtype=torch.float64, device=x.device)

    return LBFGSState(
        x=x.clone(), value=scalars(float("inf")), gradient=torch.zeros_like(x),
        direction=torch.zeros_like(x), slope=scalars(), step=scalars(), searches=counts(),
        zooming=flags(False), lo=scalars(), lo_value=scalars(), lo_slope=scalars(),
        lo_gradient=torch.zeros_like(x), hi=scalars(), hi_value=scalars(), hi_slope=scalars(),
        s=x.new_zeros(rows, history, size), y=x.new_zeros(rows, history, size), sy=small(),
        yy=small(), pairs=counts(), active=flags(True), evaluations=counts(),
    )  # fmt: skip


def tick(state: LBFGSState, evaluate: Evaluate, *, gradient_tolerance: float = 0.0) -> None:
    """Evaluate every active row once and advance its line search; changes `state` in place.

    Args:
        state: from `start` or a checkpoint.
        evaluate: (x (k, size), rows (k,)) -> value (k,), gradient (k, size).
        gradient_tolerance: a row stops when its largest gradient entry is at most this.
    """
    rows = state.active.nonzero().squeeze(1)
    trial = state.x[rows] + state.step[rows, None].to(state.x.dtype) * state.direction[rows]
    value, gradient = evaluate(trial, rows)
    value = torch.where(torch.isfinite(value), value, torch.inf).double()
    state.evaluations[rows] += 1
    state.searches[rows] += 1
    slope = (gradient * state.direction[rows]).sum(1).double()

    first = state.evaluations[rows] == 1
    accept_trial = _advance_search(state, rows, value, slope, gradient) & ~first
    accept_trial |= first
    _restart_exhausted(state, rows[~accept_trial], gradient_tolerance)
    _accept(state, rows[accept_trial], trial[accept_trial], value[accept_trial],
            gradient[accept_trial], gradient_tolerance)  # fmt: skip


def _advance_search(
    state: LBFGSState, rows: Tensor, value: Tensor, slope: Tensor, gradient: Tensor
) -> Tensor:
    """Strong-Wolfe decisions for every row; returns which rows accept their trial point."""
    step, start_value, start_slope = state.step[rows], state.value[rows], state.slope[rows]
    lo, lo_value, lo_slope = state.lo[rows], state.lo_value[rows], state.lo_slope[rows]
    hi, hi_value, hi_slope = state.hi[rows], state.hi_value[rows], state.hi_slope[rows]
    zooming, searches = state.zooming[rows], state.searches[rows]

    too_high = value > start_value + SUFFICIENT_DECREASE * step * start_slope
    too_high |= (value >= lo_value) & (zooming | (searches > 1))
    accept = ~too_high & (slope.abs() <= -CURVATURE * start_slope)
    rising = ~too_high & ~accept
    # While bracketing, lo is the previous trial point and hi is not yet known. Zooming keeps the
    # invariant that the slope at lo points towards hi.
    flip = rising & torch.where(zooming, slope * (hi - lo) >= 0, slope >= 0)
    new_lo = rising
    extrapolate = rising & ~zooming & ~flip

    state.hi[rows] = torch.where(too_high, step, torch.where(flip, lo, hi))
    state.hi_value[rows] = torch.where(too_high, value, torch.where(flip, lo_value, hi_value))
    state.hi_slope[rows] = torch.where(too_high, slope, torch.where(flip, lo_slope, hi_slope))
    previous = lo
    state.lo[rows] = torch.where(new_lo, step, lo)
    state.lo_value[rows] = torch.where(new_lo, value, lo_value)
    state.lo_slope[rows] = torch.where(new_lo, slope, lo_slope)
    state.lo_gradient[rows[new_lo]] = gradient[new_lo]
    state.zooming[rows] = zooming | too_high | flip

    lo, lo_value, lo_slope = state.lo[rows], state.lo_value[rows], state.lo_slope[rows]
    hi, hi_value, hi_slope = state.hi[rows], state.hi_value[rows], state.hi_slope[rows]
    inside = _cubic_minimum(lo, lo_value, lo_slope, hi, hi_value, hi_slope)
    near, far = torch.minimum(lo, hi), torch.maximum(lo, hi)
    margin = 0.1 * (far - near)
    inside = torch.where(torch.isfinite(inside), inside, (lo + hi) / 2)
    inside = torch.clamp(inside, near + margin, far - margin)
    # Extrapolation in `lo` (now the trial) and the point before it; at most tenfold.
    beyond = torch.clamp(2 * lo + (lo - previous), max=10 * lo)
    state.step[rows] = torch.where(extrapolate, beyond, inside)
    # Keep the accepted step: `_accept` needs it.
    state.step[rows] = torch.where(accept, step, state.step[rows])
    return accept


def _cubic_minimum(
    a: Tensor, a_value: Tensor, a_slope: Tensor, b: Tensor, b_value: Tensor, b_slope: Tensor
) -> Tensor:
    """Minimiser of the cubic through two values and slopes (Nocedal & Wright, eq. 3.59)."""
    d1 = a_slope + b_slope - 3 * (a_value - b_value) / (a - b)
    d2 = torch.sign(b - a) * torch.sqrt(d1 * d1 - a_slope * b_slope)
    return b - (b - a) * (b_slope + d2 - d1) / (b_slope - a_slope + 2 * d2)


def _restart_exhausted(state: LBFGSState, rows: Tensor, tolerance: float) -> None:
    """End searches that cannot go on: take the best point found, or forget the history."""
    width = (state.hi[rows] - state.lo[rows]).abs()
    reach = state.direction[rows].abs().amax(1).double()
    scale = state.x[rows].abs().amax(1).double().clamp_min(1.0)
    resolution = torch.finfo(state.x.dtype).eps * scale
    over = state.searches[rows] >= SEARCH_LIMIT
    over |= state.zooming[rows] & (width * reach <= resolution)
    rows = rows[over]
    if not len(rows):
        return
    descended = rows[(state.lo[rows] > 0) & (state.lo_value[rows] < state.value[rows])]
    if len(descended):
        state.step[descended] = state.lo[descended]
        moved = state.lo[descended, None].to(state.x.dtype) * state.direction[descended]
        _accept(state, descended, state.x[descended] + moved, state.lo_value[descended],
                state.lo_gradient[descended].clone(), tolerance)  # fmt: skip
    failed = rows[~((state.lo[rows] > 0) & (state.lo_value[rows] < state.value[rows]))]
    failed = failed[~torch.isin(failed, descended)]
    # No descent even along the negative gradient: a floating-point floor, or a kink of ReLU.
    state.active[failed[state.pairs[failed] == 0]] = False
    again = failed[state.pairs[failed] > 0]
    state.pairs[again] = 0
    _aim(state, again)


def _accept(
    state: LBFGSState, rows: Tensor, x: Tensor, value: Tensor, gradient: Tensor, tolerance: float
) -> None:
    """Move to the accepted point, learn its curvature pair and aim again."""
    if not len(rows):
        return
    moved = state.evaluations[rows] > 1
    if moved.any():
        _learn(state, rows[moved], x[moved] - state.x[rows[moved]],
               gradient[moved] - state.gradient[rows[moved]])  # fmt: skip
    state.x[rows], state.value[rows], state.gradient[rows] = x, value, gradient
    done = gradient.abs().amax(1) <= tolerance
    done |= ~torch.isfinite(value) | ~torch.isfinite(gradient).all(1)
    state.active[rows[done]] = False
    _aim(state, rows[~done])


def _learn(state: LBFGSState, rows: Tensor, s: Tensor, y: Tensor) -> None:
    """Store the pair (s, y) where its curvature is positive."""
    # Relative to both lengths: a bound on sᵀy / yᵀy would reject every steep but sound pair.
    good = (s * y).sum(1) > torch.finfo(s.dtype).eps * s.norm(dim=1) * y.norm(dim=1)
    rows, s, y = rows[good], s[good], y[good]
    slots = state.pairs[rows] % state.s.shape[1]
    state.s[rows, slots], state.y[rows, slots] = s, y
    state.pairs[rows] += 1


def _aim(state: LBFGSState, rows: Tensor) -> None:
    """Set a new search direction and its first trial step."""
    if not len(rows):
        return
    state.direction[rows] = -state.gradient[rows]
    fresh = state.pairs[rows] == 0
    informed = rows[~fresh]
    if len(informed):
        view, pick = _history(state, informed)
        state.direction[informed] = -_inverse_product(state, view)[pick]
    slope = (state.gradient[rows] * state.direction[rows]).sum(1).double()
    # Rounding can spoil a long history: fall back to steepest descent when it points uphill.
    uphill = ~(slope < 0) & ~fresh
    if uphill.any():
        state.pairs[rows[uphill]] = 0
        state.direction[rows[uphill]] = -state.gradient[rows[uphill]]
        slope = (state.gradient[rows] * state.direction[rows]).sum(1).double()
        fresh = fresh | uphill
    first = 1 / state.gradient[rows].abs().sum(1).double().clamp_min(1e-300)
    state.slope[rows] = slope
    state.step[rows] = torch.where(fresh, first.clamp_max(1.0), 1.0)
    state.searches[rows] = 0
    state.zooming[rows] = False
    for name in ("lo", "hi", "hi_value", "hi_slope"):
        getattr(state, name)[rows] = 0.0
    state.lo_value[rows], state.lo_slope[rows] = state.value[rows], slope


def _history(state: LBFGSState, rows: Tensor) -> tuple[slice | Tensor, Tensor | slice]:
    """How to read the curvature pairs of `rows`: index of the read, index into its result.

    Gathering rows copies their whole history, so when most rows are wanted all are read in place.
    """
    if 2 * len(rows) >= len(state.x):
        return slice(None), rows
    return rows, slice(None)


def _inverse_product(state: LBFGSState, view: slice | Tensor) -> Tensor:
    """H g by the compact form, H ≈ the inverse Hessian, from the stored pairs.

    H = γI + [S γY] [[R⁻ᵀ(D + γYᵀY)R⁻¹, −R⁻ᵀ], [−R⁻¹, 0]] [S γY]ᵀ, R the upper triangle of SᵀY
    in order of age, D its diagonal, γ = sᵀy / yᵀy of the newest pair. Two passes over the history:
    the products with the newest y, which R and YᵀY still lack, share one with those with g.
    """
    memory = state.s.shape[1]
    s, y, g, pairs = state.s[view], state.y[view], state.gradient[view], state.pairs[view]
    row = torch.arange(len(g), device=g.device)
    count = pairs.clamp_max(memory)
    slot = (pairs - 1) % memory
    # Long rows times long rows: several times faster on a CPU than long rows times two columns.
    both = torch.stack([y[row, slot], g], dim=1)
    on_s, on_y = (both @ s.mT).double(), (both @ y.mT).double()
    sy, yy = state.sy[view], state.yy[view]
    sy[row, :, slot] = on_s[:, 0]
    yy[row, :, slot] = on_y[:, 0]
    yy[row, slot, :] = on_y[:, 0]
    state.sy[view], state.yy[view] = sy, yy

    # Age order in the ring: slot of the k-th oldest pair; unused slots go last and are inert.
    order = (torch.arange(memory, device=g.device) + (pairs - count)[:, None]) % memory
    used = torch.arange(memory, device=g.device) < count[:, None]
    live = used[:, :, None] & used[:, None, :]
    by_age = (row[:, None, None], order[:, :, None], order[:, None, :])
    unit = torch.eye(memory, dtype=sy.dtype, device=g.device)
    upper = torch.where(live, sy[by_age], unit).triu()
    yy = torch.where(live, yy[by_age], 0.0)
    diagonal = torch.where(used, upper.diagonal(dim1=1, dim2=2), 0.0)
    newest = (count - 1).clamp_min(0)[:, None]
    gamma = diagonal.gather(1, newest) / yy.diagonal(dim1=1, dim2=2).gather(1, newest)

    sg = on_s[:, 1].gather(1, order) * used
    yg = on_y[:, 1].gather(1, order) * used
    w = torch.linalg.solve_triangular(upper, sg[:, :, None], upper=True)
    middle = diagonal[:, :, None] * w + gamma[:, :, None] * (yy @ w - yg[:, :, None])
    to_s = torch.linalg.solve_triangular(upper.mT, middle, upper=False).squeeze(2) * used
    to_y = -gamma * w.squeeze(2) * used
    to_s = torch.zeros_like(to_s).scatter(1, order, to_s).to(s.dtype)
    to_y = torch.zeros_like(to_y).scatter(1, order, to_y).to(s.dtype)
    product = gamma.to(s.dtype) * g + (to_s[:, None, :] @ s).squeeze(1)
    return product + (to_y[:, None, :] @ y).squeeze(1)
