"""Every solver against a dense pseudo-inverse of rows that were built by loops."""

import numpy as np
import pytest
import torch
from systems import DTYPE, GEOMETRIES, dense_gradient_rows, dense_weight_rows, draw

from leaklib.layer_system import LayerSystem, balanced_scale, least_squares, solve_layer
from leaklib.layer_system.block import gradient_block, grouped_weight_grad, solve_block
from leaklib.layer_system.geometry import Geometry
from leaklib.layer_system.published import solve_stacked, weight_matrix
from leaklib.layer_system.split import solve_split

cases = pytest.mark.parametrize("name", GEOMETRIES)


def dense_answer(geometry, weight, k, z, g, scale):
    """Minimum norm least squares of one victim by numpy, and the rank."""
    rows = torch.cat(
        [dense_weight_rows(geometry, weight), scale * dense_gradient_rows(geometry, k)]
    )
    target = torch.cat([z.flatten(), scale * g.flatten()])
    x, _, rank, values = np.linalg.lstsq(rows.numpy(), target.numpy(), rcond=1e-12)
    return torch.as_tensor(x).view(geometry.input_shape), int(rank), values[0] / values[rank - 1]


@cases
@pytest.mark.parametrize("solver", ["auto", "balanced", "gradient first"])
def test_consistent_systems(name, solver):
    geometry = GEOMETRIES[name]
    weight, k, _x, z, g = draw(geometry)
    system = LayerSystem(geometry, weight, k, balanced_scale(geometry, weight, k))
    found = solve_layer(system, z, g, solver=solver)
    assert float(found.residual.max()) < 1e-11
    for victim in range(2):
        args = (weight, k[victim], z[victim], g[victim])
        want, _, condition = dense_answer(geometry, *args, system.scale[victim])
        torch.testing.assert_close(found.x[victim], want, rtol=1e-8, atol=1e-9)
        if solver == "balanced":
            assert float(found.condition[victim]) == pytest.approx(condition, rel=0.05)


@pytest.mark.parametrize("name", ["plain", "strided", "many filters"])
def test_inconsistent_systems_are_solved_in_the_balanced_norm(name):
    geometry = GEOMETRIES[name]
    weight, k, _x, z, g = draw(geometry)
    z = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    system = LayerSystem(geometry, weight, k, balanced_scale(geometry, weight, k))
    found = solve_layer(system, z, g, solver="balanced")
    for victim in range(2):
        args = (weight, k[victim], z[victim], g[victim])
        want, _, _ = dense_answer(geometry, *args, system.scale[victim])
        torch.testing.assert_close(found.x[victim], want, rtol=1e-7, atol=1e-8)


@cases
def test_the_published_rows_are_stacked_unscaled(name):
    geometry = GEOMETRIES[name]
    weight, k, _x, z, g = draw(geometry)
    k, g = 100 * k, 100 * g  # within the ridge's reach
    z = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    ones = torch.ones(2, dtype=DTYPE)
    found = solve_stacked(LayerSystem(geometry, weight, k, ones), z, g)
    for victim in range(2):
        want, _, _ = dense_answer(geometry, weight, k[victim], z[victim], g[victim], 1.0)
        torch.testing.assert_close(found[victim], want, rtol=1e-6, atol=1e-7)


@cases
def test_the_null_space_is_what_no_row_sees(name):
    geometry = GEOMETRIES[name]
    weight, k, _x, z, g = draw(geometry)
    found = solve_split(geometry, weight, z[0], k[0], g[0], null_space=True)
    scale = balanced_scale(geometry, weight, k)[0]
    want, rank, _ = dense_answer(geometry, weight, k[0], z[0], g[0], scale)
    null = found.null_space
    assert found.rank == rank
    assert null.shape == (geometry.unknowns, geometry.unknowns - rank)
    torch.testing.assert_close(null.T @ null, torch.eye(null.shape[1], dtype=DTYPE))
    assert float((dense_weight_rows(geometry, weight) @ null).norm()) < 1e-9
    assert float((dense_gradient_rows(geometry, k[0]) @ null).norm()) < 1e-9 * float(k.norm())
    torch.testing.assert_close(found.x, want, rtol=1e-8, atol=1e-9)


def test_truncation_leaves_weak_directions_to_the_weight_rows():
    geometry = Geometry((1, 5, 5), 3, (3, 3), padding=(1, 1))
    weight, k, x, z, g = draw(geometry, victims=20)
    noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(4), dtype=DTYPE)
    noisy = g + 1e-3 * float(g.square().mean().sqrt()) * noise

    def errors(truncation):
        found = [
            solve_split(geometry, weight, z[v], k[v], noisy[v], truncation=truncation).x
            for v in range(20)
        ]
        return (torch.stack(found) - x).flatten(1).norm(dim=1)

    assert float(errors(0.1).median()) < 0.7 * float(errors(1e-10).median())


@cases
def test_the_block_is_the_dense_rows_of_one_channel(name):
    geometry = GEOMETRIES[name]
    _weight, k, _x, _z, _g = draw(geometry)
    block = gradient_block(geometry, k)
    per_group = geometry.input_shape[0] // geometry.groups
    pixels = geometry.input_shape[1] * geometry.input_shape[2]
    for victim in range(2):
        dense = dense_gradient_rows(geometry, k[victim])
        dense = dense.view(
            geometry.groups, -1, per_group, *geometry.kernel, geometry.groups, per_group, pixels
        )
        for group in range(geometry.groups):
            want = dense[group, :, 0, :, :, group, 0].reshape(-1, pixels)
            torch.testing.assert_close(block[victim, group], want)


def test_the_block_alone_gives_the_input_where_it_has_full_rank():
    geometry = GEOMETRIES["many filters"]
    _weight, k, x, _z, g = draw(geometry)
    found, condition = solve_block(gradient_block(geometry, k), grouped_weight_grad(geometry, g))
    torch.testing.assert_close(found.mT.reshape(x.shape), x, rtol=1e-9, atol=1e-10)
    values = torch.linalg.svdvals(gradient_block(geometry, k))[:, 0]
    torch.testing.assert_close(condition, values[:, 0] / values[:, -1], rtol=1e-5, atol=0)


def test_a_block_without_full_rank_says_so():
    geometry = GEOMETRIES["plain"]
    _weight, k, _x, _z, _g = draw(geometry)
    k[1] = 0
    geometry = Geometry((2, 3, 3), 3, (3, 3))
    k = k[:, :, :1, :1]
    condition = solve_block(
        gradient_block(geometry, k),
        torch.zeros(2, 1, 27, 2, dtype=DTYPE),
    )[1]
    assert float(condition[0]) < 1e3
    assert float(condition[1]) == torch.inf


@cases
def test_the_dense_weight_matrix(name):
    geometry = GEOMETRIES[name]
    weight, *_ = draw(geometry)
    torch.testing.assert_close(weight_matrix(geometry, weight), dense_weight_rows(geometry, weight))


class TestLeastSquares:
    def test_minimum_norm_and_condition(self):
        generator = torch.Generator().manual_seed(0)
        low = torch.randn(9, 3, generator=generator, dtype=DTYPE)
        matrix = low @ torch.randn(3, 6, generator=generator, dtype=DTYPE)
        target = torch.randn(1, 9, generator=generator, dtype=DTYPE)
        found = least_squares(lambda x: (x @ matrix.T,), lambda r: r[0] @ matrix, (target,))
        torch.testing.assert_close(found.x, target @ torch.linalg.pinv(matrix).T)
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(found.condition[0], values[0] / values[2], rtol=1e-6, atol=0)
        assert bool(found.converged)

    def test_every_victim_stops_by_itself(self):
        matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE))
        target = torch.tensor([[1.0, 0, 0], [1.0, 1, 1], [0.0, 0, 0]], dtype=DTYPE)
        found = least_squares(lambda x: (x @ matrix,), lambda r: r[0] @ matrix, (target,))
        assert found.iterations.tolist() == [1, 3, 0]
        torch.testing.assert_close(found.x, target / matrix.diagonal())

    def test_a_start_keeps_its_null_component(self):
        row = torch.tensor([[1.0, 0.0]], dtype=DTYPE)
        start = torch.tensor([[0.0, 7.0]], dtype=DTYPE)
        target = torch.tensor([[3.0]], dtype=DTYPE)
        found = least_squares(lambda x: (x @ row.T,), lambda r: r[0] @ row, (target,), start=start)
        assert found.x.tolist() == [[3.0, 7.0]]

    def test_a_spent_budget_is_told(self):
        matrix = torch.diag(torch.logspace(0, 6, 30, dtype=DTYPE))
        ones = torch.ones(1, 30, dtype=DTYPE)
        found = least_squares(
            lambda x: (x @ matrix,), lambda r: r[0] @ matrix, (ones,), max_iterations=5
        )
        assert not bool(found.converged)
        assert found.iterations.tolist() == [5]


def test_a_dense_weight_matrix_has_a_largest_size():
    geometry = Geometry((64, 32, 32), 64, (3, 3), padding=(1, 1))
    weight = torch.zeros(geometry.weight_shape, dtype=DTYPE)
    with pytest.raises(ValueError, match='4.3e\\+09; use solver="auto".*minimum norm'):
        weight_matrix(geometry, weight)


def test_more_iterations_than_the_first_history_holds():
    """Singular values over three decades; the condition is read off all iterations."""
    values = torch.logspace(0, 3, 400, dtype=DTYPE)
    x = torch.ones(1, 400, dtype=DTYPE)
    found = least_squares(
        lambda x: (x * values,), lambda r: r[0] * values, (x * values,), max_iterations=4_000
    )
    assert int(found.iterations) > 512
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-4)
    assert float(found.condition) == pytest.approx(1000, rel=1e-2)
