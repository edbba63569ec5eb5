"""Targets in factors, against dense arithmetic."""

import torch
from attacks.ghost_checks import rng

from leaklib.attacks.ghost_targets import (
    choose_rows,
    factor_target,
    inner_product,
    squared_distance,
    squared_norm,
)


def test_targets_by_dense_arithmetic():
    """Rank 2 exactly, rank 2 and noise, and zero, for rows in and out of order."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    generator = rng(4)
    exact = draw(3, 7, 2) @ draw(3, 2, 11)
    exact[2] = 0
    noisy = exact + 1e-3 * draw(3, 7, 11)
    for released, dense in ((exact, False), (noisy, True)):
        target = factor_target(released, 2)
        assert (target.rest is not None) == dense
        rebuilt = target.left @ target.right + (0 if target.rest is None else target.rest)
        torch.testing.assert_close(rebuilt, released, rtol=1e-12, atol=1e-12)
        eye = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
        torch.testing.assert_close(target.left.mT @ target.left, eye)
        torch.testing.assert_close(target.square, released.square().sum((1, 2)))
        for victims in ([0, 1, 2], [0, 0, 1, 1, 2, 2], [2, 0, 0, 1], [1]):
            victims = torch.tensor(victims)
            rows = choose_rows(victims, 3)
            assert (rows.block is None) == (victims.tolist() in ([2, 0, 0, 1], [1]))
            a, delta = draw(len(victims), 2, 11), draw(len(victims), 2, 7)
            grads = delta.mT @ a
            torch.testing.assert_close(squared_norm(a, delta), grads.square().sum((1, 2)))
            chosen = released[victims]
            torch.testing.assert_close(
                inner_product(target, rows, a, delta), (grads * chosen).sum((1, 2))
            )
            torch.testing.assert_close(
                squared_distance(target, rows, a, delta), (grads - chosen).square().sum((1, 2))
            )
