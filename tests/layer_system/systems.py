"""Small layers of every geometry, with dense rows built by loops."""

import itertools

import torch

from leaklib.layer_system.geometry import Geometry

DTYPE = torch.float64

GEOMETRIES = {
    "plain": Geometry((2, 5, 5), 3, (3, 3)),
    "padded": Geometry((2, 5, 4), 3, (3, 3), padding=(1, 1)),
    "strided": Geometry((2, 7, 6), 4, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": Geometry((1, 7, 7), 3, (3, 2), dilation=(2, 3), padding=(2, 1)),
    "grouped": Geometry((4, 5, 5), 6, (3, 3), padding=(1, 1), groups=2),
    "uncovered": Geometry((1, 5, 5), 5, (1, 1), stride=(2, 2)),
    "many filters": Geometry((2, 4, 4), 9, (3, 3), padding=(1, 1)),
}


def draw(geometry, victims=2, seed=0):
    """Weight, k, an input, and the exact z and ∂L/∂W that belong to them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(geometry.weight_shape, generator=generator, dtype=DTYPE)
    k = 1e-3 * torch.randn(victims, *geometry.output_shape, generator=generator, dtype=DTYPE)
    x = torch.rand(victims, *geometry.input_shape, generator=generator, dtype=DTYPE)
    z = torch.stack([(dense_weight_rows(geometry, weight) @ one.flatten()) for one in x])
    g = torch.stack(
        [dense_gradient_rows(geometry, a) @ b.flatten() for a, b in zip(k, x, strict=True)]
    )
    return (
        weight, k, x, z.view(victims, *geometry.output_shape),
        g.view(victims, *geometry.weight_shape),
    )  # fmt: skip


def _meetings(geometry):
    """(filter, row, column, channel in group, tap row, tap column, pixel index)."""
    channels, height, width = geometry.input_shape
    rows, columns = geometry.output_size
    per_group, filters = channels // geometry.groups, geometry.filters // geometry.groups
    for f, r, c in itertools.product(range(geometry.filters), range(rows), range(columns)):
        for ch, i, j in itertools.product(range(per_group), *map(range, geometry.kernel)):
            y = r * geometry.stride[0] + i * geometry.dilation[0] - geometry.padding[0]
            x = c * geometry.stride[1] + j * geometry.dilation[1] - geometry.padding[1]
            if 0 <= y < height and 0 <= x < width:
                channel = (f // filters) * per_group + ch
                yield f, r, c, ch, i, j, (channel * height + y) * width + x


def dense_weight_rows(geometry, weight):
    """W (filters · positions, unknowns), entry by entry."""
    matrix = torch.zeros(*geometry.output_shape, geometry.unknowns, dtype=DTYPE)
    for f, r, c, ch, i, j, pixel in _meetings(geometry):
        matrix[f, r, c, pixel] += weight[f, ch, i, j]
    return matrix.flatten(0, 2)


def dense_gradient_rows(geometry, k):
    """K (weights, unknowns) of one victim, entry by entry."""
    matrix = torch.zeros(*geometry.weight_shape, geometry.unknowns, dtype=DTYPE)
    for f, r, c, ch, i, j, pixel in _meetings(geometry):
        matrix[f, ch, i, j, pixel] += k[f, r, c]
    return matrix.flatten(0, 3)
