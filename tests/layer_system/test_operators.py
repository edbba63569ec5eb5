import pytest
import torch
from systems import DTYPE, GEOMETRIES, dense_gradient_rows, dense_weight_rows, draw
from torch import nn

from leaklib.layer_system import LayerSystem, balanced_scale, conv_geometry
from leaklib.layer_system.geometry import Geometry
from leaklib.layer_system.operators import transposed_weight_rows

cases = pytest.mark.parametrize("name", GEOMETRIES)


def system_of(name, **settings):
    geometry = GEOMETRIES[name]
    weight, k, x, _z, _g = draw(geometry)
    return LayerSystem(geometry, weight, k, torch.tensor([2.0, 5.0], dtype=DTYPE), **settings), x


@cases
def test_rows_are_those_of_autograd(name):
    geometry = GEOMETRIES[name]
    weight, k, x, z, g = draw(geometry)
    for v in range(2):
        w = weight.clone().requires_grad_()
        out = nn.functional.conv2d(
            x[v : v + 1], w, None, geometry.stride, geometry.padding, geometry.dilation,
            geometry.groups,
        )  # fmt: skip
        (grad,) = torch.autograd.grad((out[0] * k[v]).sum(), w)
        torch.testing.assert_close(out[0].detach(), z[v])
        torch.testing.assert_close(grad, g[v])
    pre, grad = LayerSystem(geometry, weight, k, torch.ones(2, dtype=DTYPE)).rows(x)
    torch.testing.assert_close(pre, z)
    torch.testing.assert_close(grad, g)


@cases
def test_the_adjoint_is_the_transpose_of_the_dense_rows(name):
    system, _x = system_of(name)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(2, *system.geometry.output_shape, generator=generator, dtype=DTYPE)
    v = torch.randn(2, *system.geometry.weight_shape, generator=generator, dtype=DTYPE)
    found = system.adjoint((u, v))
    dense = dense_weight_rows(system.geometry, system.weight)
    for victim in range(2):
        rows = dense_gradient_rows(system.geometry, system.preactivation_grad[victim])
        want = dense.T @ u[victim].flatten()
        want = want + system.scale[victim] * rows.T @ v[victim].flatten()
        torch.testing.assert_close(found[victim].flatten(), want)


def test_unknown_entries_and_pooling_stay_adjoint():
    pool = _Halve()
    known = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(2)) > 0.4
    geometry = Geometry((2, 6, 6), 3, (3, 3))
    weight, k, x, _z, _g = draw(geometry)
    system = LayerSystem(geometry, weight, k, torch.ones(2, dtype=DTYPE), known, pool)
    rows = system.rows(x)
    assert bool((rows[0][~known] == 0).all())
    back = tuple(torch.randn_like(part) for part in rows)
    left = sum((a * b).sum() for a, b in zip(rows, back, strict=True))
    torch.testing.assert_close(left, (x * system.adjoint(back)).sum())


class _Halve:
    def forward(self, x):
        return nn.functional.avg_pool2d(x, 2)

    def transposed(self, y):
        return y.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4


@cases
def test_the_gradient_at_the_input(name):
    geometry = GEOMETRIES[name]
    weight, k, _x, _z, _g = draw(geometry)
    want = (dense_weight_rows(geometry, weight).T @ k.flatten(1).T).T
    torch.testing.assert_close(transposed_weight_rows(geometry, weight, k).flatten(1), want)


def test_balanced_rows_have_one_typical_length():
    geometry = GEOMETRIES["padded"]
    weight, k, _x, _z, _g = draw(geometry)
    scale = balanced_scale(geometry, weight, k)
    for victim in range(2):
        grad_row = k[victim].square().sum().div(geometry.positions).sqrt()
        weight_row = weight.square().sum().div(geometry.filters).sqrt()
        torch.testing.assert_close(scale[victim] * grad_row, weight_row)
    assert balanced_scale(geometry, weight, torch.zeros_like(k)).tolist() == [1.0, 1.0]


class TestGeometry:
    @pytest.mark.parametrize(
        "module",
        [
            nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            nn.Conv2d(4, 8, 3, padding="same", groups=4),
            nn.Conv2d(1, 3, 2, padding="valid", stride=3),
        ],
    )
    def test_the_output_shape_is_torchs(self, module):
        shape = (module.in_channels, 9, 8)
        geometry = conv_geometry(module, shape)
        assert geometry.output_shape == tuple(module(torch.zeros(1, *shape)).shape[1:])
        assert geometry.weight_shape == tuple(module.weight.shape)

    def test_padding_that_repeats_pixels(self):
        with pytest.raises(ValueError, match="zero padding.*reflect"):
            conv_geometry(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 8, 8))

    def test_same_padding_that_is_uneven(self):
        with pytest.raises(ValueError, match="odd kernel"):
            conv_geometry(nn.Conv2d(1, 1, 2, padding="same"), (1, 8, 8))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kernel": (9, 9)}, "no larger than the padded input"),
            ({"kernel": (3, 3), "groups": 2}, "groups that divide"),
            ({"kernel": (3, 3), "stride": (0, 1)}, "sizes >= 1"),
        ],
    )
    def test_sizes_that_do_not_fit(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Geometry((1, 5, 5), 3, **settings)
