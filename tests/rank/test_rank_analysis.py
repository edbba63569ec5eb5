"""A network's report: the right layers in the right order, by either method."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from rank.networks import NETWORKS
from torch import nn

from leaklib.chain import PoolStage, read_chain
from leaklib.models.residual import ResidualBlock
from leaklib.rank import generic_rank, pooling_rank, rank_analysis, residual_rank
from leaklib.rank import singular as module

METHODS = ("counting", "singular values")


def network(layers, *, activation=nn.LeakyReLU, classes=1):
    """Convolutions as given, each with an activation, then a linear layer."""
    parts = OrderedDict()
    for number, g in enumerate(layers, 1):
        parts[f"conv{number}"] = nn.Conv2d(
            g.input_shape[0], g.filters, g.kernel, g.stride, g.padding, bias=False
        )
        parts[f"act{number}"] = activation()
    parts["flatten"] = nn.Flatten()
    parts["fc"] = nn.Linear(int(np.prod(layers[-1].output_shape)), classes)
    return nn.Sequential(parts)


def small(*extra, activation=nn.LeakyReLU):
    """Convolutions on 3x8x8; the second is short of 30 equations."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), activation(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1), activation(), *extra,
        nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip


def ready(model, shape=(3, 8, 8)):
    model(torch.zeros(1, *shape))
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_reports_of_the_papers_networks(name):
    layers, deficits, index = NETWORKS[name]
    with torch.device("meta"):
        model = network(layers)
    report = rank_analysis(model, layers[0].input_shape)
    assert report.deficits == deficits
    assert round(report.index, 2) == index
    expected = -sum(
        (len(layers) - i) / len(layers) * -d / g.unknowns
        for i, (d, g) in enumerate(zip(deficits, layers, strict=True))
    )
    assert report.normalised_index == pytest.approx(expected)
    assert all(layer.exact for layer in report.layers)


def test_cnn6_d_row_by_row():
    layers = NETWORKS["cnn6-d"][0]
    table = rank_analysis(network(layers), (3, 32, 32)).table()
    assert table.columns.tolist() == [
        "layer", "kind", "input", "unknowns", "rank", "deficit", "virtual", "joint", "filled_by",
        "exact",
    ]  # fmt: skip
    assert table.layer.tolist() == [f"conv{i}" for i in range(1, 7)] + ["fc"]
    assert table.kind.tolist() == ["conv"] * 6 + ["linear"]
    second = table.iloc[1]
    assert (second.input, second.unknowns, second["rank"]) == ("12x17x17", 3468, 3188)
    assert (second.virtual, second.joint, second.filled_by) == (396, 972, "weights")
    assert table.iloc[0].virtual == 0
    assert table.iloc[6].deficit == 0


def test_what_fills_a_deficit():
    found = {
        name: [layer.filled_by for layer in rank_analysis(
            network(NETWORKS[name][0]), NETWORKS[name][0][0].input_shape).layers]
        for name in ("lenet 8-12-12", "lenet 12-8-12", "cnn3_c1")
    }  # fmt: skip
    assert found["lenet 8-12-12"] == ["nothing", "", "", ""]  # nothing is before the image
    assert found["lenet 12-8-12"] == ["", "weights and gradients", "", ""]
    assert found["cnn3_c1"] == ["", "nothing", ""]


def test_both_methods_agree_on_a_deficient_network():
    model = ready(small())
    reports = [rank_analysis(model, (3, 8, 8), method=method) for method in METHODS]
    assert reports[0] == reports[1]
    assert reports[0].deficits[1] < 0
    assert (
        reports[0].layers[1].virtual
        == generic_rank(read_chain(model, (3, 8, 8))[0].geometry).weight_constraints
    )


def test_singular_values_see_the_weights_at_hand():
    model = ready(small())
    before = rank_analysis(model, (3, 8, 8), method="singular values")
    counted = rank_analysis(model, (3, 8, 8))
    with torch.no_grad():
        model[0].weight[2:] = 0  # two filters of 64 outputs are left
        model[2].weight[2:] = 0
    after = rank_analysis(model, (3, 8, 8), method="singular values", seed=5)
    assert after.layers[1].deficit < before.layers[1].deficit
    assert (before.layers[1].virtual, after.layers[1].virtual) == (512 - 192, 512 - 128)
    assert rank_analysis(model, (3, 8, 8)) == counted


def test_pooling_behind_a_convolution_is_part_of_its_equations():
    model = ready(nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2), nn.LeakyReLU(),
        nn.Conv2d(8, 4, 3, padding=1), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.LazyLinear(2),
    ))  # fmt: skip
    report = rank_analysis(model, (3, 8, 8))
    assert [layer.kind for layer in report.layers] == ["conv + pool", "conv", "pool", "linear"]
    assert len(report.deficits) == 2
    first, second, pool, _ = report.layers
    assert first.deficit < generic_rank(read_chain(model, (3, 8, 8))[0].geometry).deficit + 1
    assert second.virtual == second.joint == 0  # what lies between is no activation
    assert (pool.unknowns, pool.rank) == (64, 16)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d((2, 3), (1, 2)),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveAvgPool2d(1),
    ],
)  # fmt: skip
def test_rank_of_average_pooling_is_that_of_its_matrix(pool):
    pool = pool.double()
    identity = torch.eye(2 * 5 * 6, dtype=torch.float64).view(-1, 2, 5, 6)
    out = pool(identity)
    expected = int(torch.linalg.matrix_rank(out.flatten(1)))
    assert pooling_rank(PoolStage("pool", pool, (2, 5, 6), tuple(out.shape[1:]))) == expected


def test_relu_is_counted_by_nobody_and_decomposed_with_what_it_hides():
    model = ready(small(activation=nn.ReLU))
    with pytest.raises(ValueError, match=r"behind '0' to count, got 'ReLU'.*singular values"):
        rank_analysis(model, (3, 8, 8))
    report = rank_analysis(model, (3, 8, 8), method="singular values")
    leaky = rank_analysis(ready(small()), (3, 8, 8))
    assert report.layers[1].rank < leaky.layers[1].rank
    assert report.layers[1].virtual == 0  # its zeros hide the pre-activation


# --- residual blocks ----------------------------------------------------------------------------


def residual(channels=3, filters=5, stride=2, *, skip=True, seed=0):
    torch.manual_seed(seed)
    return ResidualBlock(channels, filters, nn.LeakyReLU, stride=stride, skip=skip).eval()


def joint_rank(stage, seed):
    """Rank of the equations about (a, x) together, written out: nothing is eliminated."""
    generator = torch.Generator().manual_seed(seed)

    def dense(function, shape):
        identity = torch.eye(int(np.prod(shape)), dtype=torch.float64).view(-1, *shape)
        return function(identity).flatten(1).T

    first, second, shortcut = stage.first, stage.second, stage.shortcut
    z = torch.randn(first.output_shape, generator=generator, dtype=torch.float64)
    slope = torch.where(z >= 0, 1.0, 0.01).double()
    grad = torch.randn(second.output_shape, generator=generator, dtype=torch.float64)

    def conv(part, x, weight):
        return nn.functional.conv2d(x, weight, None, part.geometry.stride, part.geometry.padding)

    def kernel_grad(part, k):
        def rows(x):
            w = part.weight.clone().requires_grad_()
            return torch.stack([
                torch.autograd.grad((conv(part, one[None], w) * k).sum(), w)[0] for one in x
            ])  # fmt: skip

        return rows

    a_shape, x_shape = first.output_shape, stage.input_shape
    a = torch.zeros(1, *a_shape, dtype=torch.float64, requires_grad=True)
    at_a = torch.autograd.grad((conv(second, a, second.weight) * grad).sum(), a)[0][0]
    n_a, n_x = int(np.prod(a_shape)), int(np.prod(x_shape))
    across = torch.eye(n_x, dtype=torch.float64)
    if shortcut is not None:
        across = dense(lambda x: conv(shortcut, x, shortcut.weight), x_shape)
    k_2 = dense(kernel_grad(second, grad), a_shape)
    w_2 = dense(lambda x: conv(second, x, second.weight), a_shape)
    w_1 = dense(lambda x: conv(first, x, first.weight), x_shape)
    k_1 = dense(kernel_grad(first, at_a * slope), x_shape)
    rows = [
        torch.cat([k_2, torch.zeros(len(k_2), n_x)], 1),
        torch.cat([w_2, across], 1),
        torch.cat([-torch.diag(1 / slope.flatten()), w_1], 1),
        torch.cat([torch.zeros(len(k_1), n_a), k_1], 1),
    ]
    if shortcut is not None:
        k_h = dense(kernel_grad(shortcut, grad), x_shape)
        rows.append(torch.cat([torch.zeros(len(k_h), n_a), k_h], 1))
    stack = torch.cat([block / block.norm(dim=1).median() for block in rows])
    return int(torch.linalg.matrix_rank(stack, rtol=1e-10)), n_a, n_x


BLOCKS = {
    "identity": (4, 4, 1, 5), "identity, one channel": (1, 1, 1, 6), "projecting": (3, 5, 2, 6),
    "projecting, short": (4, 2, 2, 6), "projecting, same size": (2, 3, 1, 5),
    "projecting, hardly any filters": (3, 1, 2, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_the_rank_of_its_joint_equations(name):
    channels, filters, stride, side = BLOCKS[name]
    (stage, _) = read_chain(residual(channels, filters, stride), (channels, side, side))
    generator = torch.Generator().manual_seed(3)
    found = residual_rank(stage, generator=generator)
    both, n_a, n_x = joint_rank(stage, 4)
    assert found == both - n_a
    assert (found == n_x) == ("short" not in name and "hardly" not in name)


def test_cutting_a_skip_lowers_the_rank_and_keeps_the_number_of_layers():
    def model(skip):
        torch.manual_seed(0)
        return nn.Sequential(
            ResidualBlock(3, 3, nn.LeakyReLU, skip=skip),
            ResidualBlock(3, 3, nn.LeakyReLU, stride=2, skip=skip), nn.Flatten(), nn.Linear(75, 1),
        ).eval()  # fmt: skip

    whole, cut = (rank_analysis(model(skip), (3, 10, 10)) for skip in (True, False))
    assert [layer.kind for layer in whole.layers] == ["residual", "residual", "linear"]
    assert [layer.kind for layer in cut.layers] == ["conv"] * 4 + ["linear"]
    assert len(whole.deficits) == len(cut.deficits) == 4
    assert whole.layers[0].deficit == 0
    assert whole.unknowns == cut.unknowns
    assert cut.index < whole.index <= 0
    again = rank_analysis(model(True), (3, 10, 10), method="singular values")
    assert again.deficits == whole.deficits


def test_large_blocks_are_refused(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 10_000)
    model = nn.Sequential(residual(), nn.Flatten(), nn.Linear(125, 1))
    with pytest.raises(ValueError, match="at most 10,000 entries.*use smaller images"):
        rank_analysis(model, (3, 10, 10))


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="'counting', 'singular values'.*'svd'"):
        rank_analysis(ready(small()), (3, 8, 8), method="svd")
