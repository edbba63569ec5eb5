import itertools
from dataclasses import fields

import pytest
import scipy.optimize
import torch

from leaklib.attacks import lbfgs


def rosenbrock(x, rows=None):
    """Sum over consecutive pairs; value and gradient in closed form."""
    a, b = x[:, :-1], x[:, 1:]
    value = (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum(1)
    gradient = torch.zeros_like(x)
    gradient[:, :-1] += -400 * a * (b - a**2) - 2 * (1 - a)
    gradient[:, 1:] += 200 * (b - a**2)
    return value, gradient


def starts(rows=4, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64)


def run(x, evaluate, *, history=10, budget=500, watch=None):
    state = lbfgs.start(x, history=history)
    while state.active.any() and int(state.evaluations.max()) < budget:
        lbfgs.tick(state, evaluate, gradient_tolerance=1e-10)
        if watch is not None:
            watch(state)
    return state


def two_loop(s, y, g):
    """The textbook recursion (Nocedal & Wright 2006, Alg. 7.4), oldest pair first."""
    q, alphas = g.clone(), []
    for si, yi in zip(reversed(s), reversed(y), strict=True):
        alpha = (si @ q) / (si @ yi)
        alphas.append(alpha)
        q = q - alpha * yi
    q = q * (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for si, yi, alpha in zip(s, y, reversed(alphas), strict=True):
        q = q + si * (alpha - (yi @ q) / (si @ yi))
    return q


def test_reaches_the_minimum_of_rosenbrock_as_scipy_does():
    x = starts()
    state = run(x, rosenbrock)
    for row, begin in enumerate(x):
        reference = scipy.optimize.minimize(
            lambda p: tuple(v[0].numpy() for v in rosenbrock(torch.tensor(p)[None])),
            begin.numpy(), jac=True, method="L-BFGS-B",
            options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        assert float(state.value[row]) <= reference.fun + 1e-12
        # Local minimum or global one: the gradient decides.
        assert float(state.gradient[row].abs().max()) <= 1e-10
        assert int(state.evaluations[row]) <= 2 * reference.nfev


@pytest.mark.parametrize("history", [3, 50])
def test_direction_equals_the_two_loop_recursion(history):
    pairs = []

    def watch(state):
        """Rebuild the pairs from the accepted iterates and compare directions."""
        here = (state.x[0].clone(), state.gradient[0].clone())
        if not pairs or not torch.equal(pairs[-1][0], here[0]):
            pairs.append(here)
        if len(pairs) < 2 or not state.active[0]:
            return
        steps = list(itertools.pairwise(pairs))[-history:]
        s = [b[0] - a[0] for a, b in steps]
        y = [b[1] - a[1] for a, b in steps]
        expected = -two_loop(s, y, pairs[-1][1])
        error = (state.direction[0] - expected).norm() / expected.norm()
        assert error < 1e-6, f"after {len(pairs)} iterates: {error:.1e}"

    run(starts(rows=1), rosenbrock, history=history, watch=watch)
    assert len(pairs) > 12


def test_accepted_steps_satisfy_the_strong_wolfe_conditions():
    log = []

    def watch(state):
        log.append((state.x.clone(), state.value.clone(), state.gradient.clone()))

    run(starts(rows=3), rosenbrock, watch=watch)
    accepted = 0
    for (x0, f0, g0), (x1, f1, g1) in itertools.pairwise(log):
        for row in range(3):
            step = x1[row] - x0[row]
            if not step.any():
                continue
            accepted += 1
            slope0, slope1 = float(g0[row] @ step), float(g1[row] @ step)
            assert slope0 < 0
            assert float(f1[row]) <= float(f0[row]) + 1e-4 * slope0 + 1e-12
            assert abs(slope1) <= 0.9 * abs(slope0) + 1e-12
    assert accepted > 60


def test_batched_rows_walk_the_path_of_single_rows():
    x = starts(rows=5)
    together, log = lbfgs.start(x, history=7), []
    for _ in range(60):
        lbfgs.tick(together, rosenbrock)
        log.append(together.x.clone())
    for row in range(5):
        alone = lbfgs.start(x[row : row + 1], history=7)
        for t in range(60):
            lbfgs.tick(alone, rosenbrock)
            torch.testing.assert_close(alone.x[0], log[t][row], rtol=1e-7, atol=1e-9)


def test_a_row_that_stops_leaves_the_others_alone():
    def evaluate(x, rows):
        value, gradient = rosenbrock(x)
        easy = rows == 0
        value[easy], gradient[easy] = (x[easy] ** 2).sum(1), 2 * x[easy]
        return value, gradient

    state = run(starts(rows=2), evaluate)
    assert int(state.evaluations[0]) < 10 < int(state.evaluations[1])
    assert float(state.x[0].abs().max()) <= 1e-10


def test_a_wall_of_infinity_is_backed_away_from():
    def evaluate(x, rows=None):
        inside = (x > 0).all(1)
        value = torch.where(inside, (x - x.clamp_min(1e-30).log()).sum(1), torch.inf)
        return value, torch.where(inside[:, None], 1 - 1 / x, torch.nan)

    state = run(torch.full((1, 3), 8.0, dtype=torch.float64), evaluate)
    torch.testing.assert_close(state.x, torch.ones_like(state.x))


def test_not_finite_at_the_start_stops_the_row():
    def evaluate(x, rows):
        value, gradient = rosenbrock(x)
        value[rows == 1] = torch.nan
        return value, gradient

    state = run(starts(rows=2), evaluate)
    assert int(state.evaluations[1]) == 1
    assert not torch.isfinite(state.value[1])
    assert float(state.gradient[0].abs().max()) <= 1e-10


def test_float32_ends_at_its_floor_and_not_in_a_loop():
    state = lbfgs.start(starts().float(), history=10)
    for _ in range(3000):
        if not state.active.any():
            break
        lbfgs.tick(state, rosenbrock)
    assert not state.active.any()
    assert float(state.gradient.abs().max()) < 0.05


def test_state_is_tensors_only():
    """A checkpoint saves every field: none may hide a closure or a Python number."""
    state = lbfgs.start(starts())
    assert all(isinstance(getattr(state, f.name), torch.Tensor) for f in fields(state))


def test_a_search_that_cannot_end_keeps_the_best_point_it_found():
    """At a kink no step has a flat enough slope; what was gained on the way must not be lost."""

    def kink(x, rows=None):
        away = x[:, 0] - 0.123
        return torch.maximum(away, -2 * away), torch.where(away > 0, 1.0, -2.0).double()[:, None]

    state = run(torch.tensor([[3.3]], dtype=torch.float64), kink, budget=300)
    assert float(state.value[0]) < 1e-6
    assert not state.active[0]


@pytest.mark.parametrize("scale", [1e-6, 1e8])
def test_the_path_does_not_depend_on_the_scale_of_the_objective(scale):
    """Steep but sound curvature pairs must be learned, in float32 too."""

    def scaled(x, rows=None):
        value, gradient = rosenbrock(x)
        return scale * value, scale * gradient

    plain = lbfgs.start(starts().float(), history=10)
    steep = lbfgs.start(starts().float(), history=10)
    for _ in range(60):
        if plain.active.any():
            lbfgs.tick(plain, rosenbrock)
        if steep.active.any():
            lbfgs.tick(steep, scaled)
    assert int(steep.pairs.max()) > 10
    assert float(steep.value.max()) / scale < 2 * float(plain.value.max()) + 1e-6


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="history >= 1"):
        lbfgs.start(starts(), history=0)
