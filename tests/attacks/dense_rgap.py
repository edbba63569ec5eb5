"""R-GAP for one victim with every matrix written out: the slow, independent reference of the tests.

x_i = argmin ‖[W_i; s K_i] x − [z_i; s vec ∂L/∂W_i]‖, of minimum norm, by numpy's `lstsq`,
z_{i−1} = σ⁻¹(x_i),   k_{i−1} = (W_iᵀ k_i) σ'(z_{i−1}).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from attacks.dense_layers import (
    Activation,
    Shape,
    Stage,
    activation,
    describe,
    gradient_rows,
    output_shape,
    read,
    spread,
    weight_rows,
)
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import expit
from torch import nn

Grads = dict[str, ndarray]


@dataclass(frozen=True)
class Solved:
    """What the recursion found at one stage."""

    name: str
    x: ndarray
    unknowns: int
    rank: int
    residual: float
    k: ndarray  # ∂L/∂(W x + b)
    pull: ndarray  # ∂L/∂x


@dataclass(frozen=True)
class Found:
    """The image and the stages, image to output."""

    image: ndarray
    stages: tuple[Solved, ...]


def reconstruct(
    model: nn.Module,
    grads: Grads,
    image_shape: Shape,
    *,
    label: int,
    loss: str = "logistic",
    answer: int | None = None,
    gradient_first: bool = False,
) -> Found:
    """The whole recursion, output to image.

    Args:
        model: a chain of modules.
        grads: parameter name -> gradient of one victim.
        image_shape: (channels, height, width).
        label: class, or 0 and 1 of a single logit.
        loss: of a single logit: "logistic", "exponential" or "hinge".
        answer: which of `last_layer`'s answers to go on with; None takes the one whose image
            leaves [0, 1] least.
        gradient_first: leave the weight rows out where the gradient rows have full rank.
    """
    stages, behind = read(describe(model), image_shape)
    answers = last_layer(stages[-1], behind, grads, label=label, loss=loss)
    if answer is not None:
        answers = [answers[answer]]
    with np.errstate(invalid="ignore"):  # a wrong answer leaves the range of an activation
        found = [recurse(stages, grads, k, z, gradient_first) for k, z in answers]
    best = min(found, key=lambda one: np.nan_to_num(outside(one.image), nan=np.inf))
    return Found(best.image.reshape(image_shape), best.stages)


def outside(image: ndarray) -> float:
    """How far an image leaves [0, 1], as a mean square."""
    return float(np.square(image - image.clip(0, 1)).mean())


def recurse(
    stages: list[Stage], grads: Grads, k: ndarray, z: ndarray, gradient_first: bool = False
) -> Found:
    """From (k, z) of the output down to the image."""
    solved = []
    for stage in reversed(stages):
        if stage.layer["kind"] == "residual":
            one = solve_block(stage, grads, z, k)
        else:
            one = solve_stage(stage, grads, z, k, gradient_first)
        solved.append(one)
        z, k = one.x, one.pull
        for act in reversed(stage.before):
            z, k = np.where(act.known(z), act.inverse(z), np.nan), k * act.slope(z)
    return Found(z, tuple(reversed(solved)))


def solve_stage(
    stage: Stage, grads: Grads, z: ndarray, k: ndarray, gradient_first: bool = False
) -> Solved:
    """x of [Q W; s K] x = [z − Q b; s vec ∂L/∂W], minimum norm; NaN in z is no equation."""
    layer, rows, known = stage.layer, stage.rows, np.isfinite(z)
    if layer["kind"] == "pool":
        x, rank, residual = minimum_norm(rows, z)
        return Solved(layer["name"], x, rows.shape[1], rank, residual, k, rows.T @ k)
    behind = np.eye(len(rows)) if stage.pool is None else stage.pool
    k = behind.T @ k
    grad_rows, scale = gradient_rows(layer, stage.shape, k), balance(layer, k)
    weight_grad = grads[f"{layer['name']}.weight"].reshape(-1)
    system = np.concatenate([(behind @ rows)[known], scale * grad_rows])
    right = (z - behind @ spread(layer, stage.shape))[known]
    target = np.concatenate([right, scale * weight_grad])
    x, rank, residual = minimum_norm(system, target)
    if gradient_first and np.linalg.matrix_rank(grad_rows, tol=1e-6 / scale) == len(x):
        x = minimum_norm(grad_rows, weight_grad)[0]
        residual = float(np.linalg.norm(system @ x - target) / np.linalg.norm(target))
    return Solved(layer["name"], x, len(x), rank, residual, k, rows.T @ k)


def solve_block(stage: Stage, grads: Grads, z: ndarray, k: ndarray) -> Solved:
    """s = W₂ a + b₂ + S x + b_S, a = σ(W₁ x + b₁): a and x at once, the link linearised at a.

        [W₂    S ]         s − b₂ − b_S
        [K₂    0 ] [a]     ∂L/∂W₂
        [0     K_S] [x] =  ∂L/∂W_S                where the shortcut has weights
        [−σ'⁻¹ W₁]         σ⁻¹(a₀) − σ'⁻¹ a₀ − b₁
        [0     K₁]         ∂L/∂W₁,                k₁ = (W₂ᵀ k) σ'(a₀)

    The first answer, from which the signs of a come, has the rows without a₀ alone.
    """
    block, shape = stage.layer, stage.shape
    first, second, shortcut = block["first"], block["second"], block["shortcut"]
    middle, act = output_shape(first, shape), activation(*block["act"])
    w1, w2 = weight_rows(first, shape), weight_rows(second, middle)
    plain = shortcut["kind"] == "act"
    skip = np.eye(w1.shape[1]) if plain else weight_rows(shortcut, shape)
    inner, unknowns = len(w1), w1.shape[1]

    def rows(layer: dict, at: Shape, gradient: ndarray) -> tuple[ndarray, ndarray]:
        scale = balance(layer, gradient)
        wanted = grads[f"{layer['name']}.weight"].reshape(-1)
        return scale * gradient_rows(layer, at, gradient), scale * wanted

    right = z - spread(second, middle)
    if not plain:
        right = right - spread(shortcut, shape)
    fixed, targets = [np.hstack([w2, skip])], [right]
    k2, wanted = rows(second, middle, k)
    fixed.append(np.hstack([k2, np.zeros((len(k2), unknowns))]))
    targets.append(wanted)
    if not plain:
        ks, wanted = rows(shortcut, shape, k)
        fixed.append(np.hstack([np.zeros((len(ks), inner)), ks]))
        targets.append(wanted)
    both = minimum_norm(np.concatenate(fixed), np.concatenate(targets))[0]
    for _ in range(30):
        a0 = both[:inner]
        slope, told = act.slope(a0), act.known(a0)
        k1 = (w2.T @ k) * slope
        link = np.hstack([-np.diag(1 / np.where(told, slope, 1)), w1])[told]
        linked = (act.inverse(a0) - a0 / np.where(told, slope, 1) - spread(first, shape))[told]
        k1_rows, wanted = rows(first, shape, k1)
        k1_rows = np.hstack([np.zeros((len(k1_rows), inner)), k1_rows])
        system = np.concatenate([*fixed, link, k1_rows])
        target = np.concatenate([*targets, linked, wanted])
        before, (both, rank, residual) = both, minimum_norm(system, target)
        if np.abs(both - before).max() < 1e-13 * np.abs(both).max():
            break
    a, x = both[:inner], both[inner:]
    k1 = (w2.T @ k) * act.slope(a)
    pull = w1.T @ k1 + skip.T @ k
    return Solved(block["name"], x, len(x), rank - len(a), residual, k, pull)


def minimum_norm(system: ndarray, target: ndarray) -> tuple[ndarray, int, float]:
    """x of least squares and minimum norm, the rank, and ‖system x − target‖/‖target‖."""
    x, _, rank, _ = np.linalg.lstsq(system, target, rcond=1e-10)
    return x, int(rank), float(np.linalg.norm(system @ x - target) / np.linalg.norm(target))


def balance(layer: dict, k: ndarray) -> float:
    """s that makes a row of s K as long as a row of W."""
    filters = len(layer["weight"])
    places = max(1, len(k) // filters)
    weight = np.linalg.norm(layer["weight"]) / np.sqrt(filters)
    return weight / (np.linalg.norm(k) / np.sqrt(places))


# --- the last layer ---------------------------------------------------------------------------

# l'(μ) of the losses of a margin
SLOPES = {
    "logistic": lambda mu: -expit(-mu),
    "exponential": lambda mu: -np.exp(-mu),
    "hinge": lambda mu: -1.0 * (mu < 1),
}


def margins(tau: float, loss: str) -> list[float]:
    """All roots of μ l'(μ) = −τ, by bracketing on either side of the minimum of μ l'."""

    def miss(mu: float) -> float:
        return mu * SLOPES[loss](mu) + tau

    if loss == "hinge":
        return [tau] if tau < 1 else []
    turn = 1.0
    if loss == "logistic":  # where (μ l')' = 0: μ = 1 + e^−μ
        turn = brentq(lambda mu: mu - 1 - np.exp(-mu), 0, 3, xtol=1e-15)
    low, high = -1.0, turn + 1.0
    while miss(low) <= 0:
        low *= 2
    roots = []
    if miss(turn) <= 0:
        roots.append(brentq(miss, low, turn, xtol=1e-15, rtol=1e-15))
        while miss(high) <= 0 and high < 600:
            high *= 2
        if tau > 0 and miss(high) > 0:
            roots.append(brentq(miss, turn, high, xtol=1e-15, rtol=1e-15))
    return roots


def last_layer(
    stage: Stage, behind: tuple[Activation, ...], grads: Grads, *, label: int, loss: str
) -> list[tuple[ndarray, ndarray]]:
    """Every (k, z) of the output that explains the last layer's gradient under one label."""
    name, weight = stage.layer["name"], stage.layer["weight"]
    grad = grads[f"{name}.weight"]
    if f"{name}.bias" in grads:
        k = grads[f"{name}.bias"]
        return [(k, weight @ (grad.T @ k) / (k @ k) + stage.layer["bias"])]
    if len(weight) == 1:
        sign = 2 * label - 1
        roots = margins(-float((grad * weight).sum()), loss)
        answers = []
        for mu in roots:
            z = np.array([mu * sign])
            k = sign * SLOPES[loss](mu) * np.ones(1)
            for act in reversed(behind):
                z, k = act.inverse(z), k * act.slope(z)
            answers.append((k, z))
        return answers
    return softmax_answers(weight, grad, label)


def softmax_answers(weight: ndarray, grad: ndarray, label: int) -> list[tuple[ndarray, ndarray]]:
    """k = softmax(W x) − onehot, x = −g/t with g the label's row and t = 1 − softmax(W x)_label.

    Every t in (0, 1) whose softmax agrees with it and whose k explains the other rows too. Two
    classes have no row that could tell, and may leave two answers as a single logit does.
    """
    row = grad[label]

    def answer(t: float) -> tuple[ndarray, ndarray]:
        z = -weight @ row / t
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return p - np.eye(len(weight))[label], z

    def miss(log_t: float) -> float:
        return -answer(np.exp(log_t))[0][label] - np.exp(log_t)

    grid = np.concatenate([np.linspace(-14, -1, 2000), np.linspace(-1, -1e-12, 2000)[1:]])
    values = [miss(g) for g in grid]
    found = [
        answer(np.exp(brentq(miss, a, b, xtol=1e-16, rtol=1e-15)))
        for a, b, u, v in zip(grid, grid[1:], values, values[1:], strict=False)
        if u * v < 0
    ]

    def unexplained(k: ndarray) -> float:
        return float(np.linalg.norm(grad - np.outer(k, k @ grad / (k @ k))) / np.linalg.norm(grad))

    return [(k, z) for k, z in found if unexplained(k) < 1e-6]
