"""Counting a layer's rank agrees with matrices written out, and says where it may not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank.dense_rows import exact_ranks, singular_ranks
from rank.networks import NETWORKS, cnn6

from leaklib.layer_system import Geometry
from leaklib.rank import generic_rank, naive_deficit, security_index
from leaklib.rank.axis import read_axis

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def square(channels, side, filters, kernel, stride=1, padding=0, dilation=1, groups=1):
    size = side if isinstance(side, tuple) else (side, side)
    return Geometry(
        (channels, *size), filters, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2,
        groups,
    )  # fmt: skip


@st.composite
def geometries(draw, *, usual=True, side=10, most=120):
    """Small layers, rectangular and grouped; `usual` padding is at most half the kernel's reach."""
    axes = []
    for _ in range(2):
        kernel = draw(st.integers(1, 5))
        stride, dilation = draw(
            st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3)])
            if usual
            else st.tuples(st.integers(1, 4), st.integers(1, 3))
        )
        reach = dilation * (kernel - 1)
        padding = draw(st.integers(0, (reach + 1) // 2 if usual else 4))
        fewest = max(1, reach + 1 - 2 * padding)
        size = draw(st.integers(fewest, max(side, fewest)))
        axes.append((size, kernel, stride, padding, dilation))
    size, kernel, stride, padding, dilation = zip(*axes, strict=True)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = draw(st.integers(1, max(1, min(4, most // (size[0] * size[1])))))
    filters = draw(st.integers(1, 10))
    return Geometry(
        (groups * channels, *size), groups * filters, kernel, stride, padding, dilation, groups
    )


def counted(geometry):
    count = generic_rank(geometry)
    return count.weight_rank, count.gradient_rank, count.rank


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_papers(name):
    layers, deficits, index = NETWORKS[name]
    counts = [generic_rank(layer) for layer in layers]
    assert tuple(count.deficit for count in counts) == deficits
    assert all(count.reliable and not count.weight_doubts for count in counts)
    assert round(security_index(deficits), 2) == index


@given(geometries())
@PROPERTY
def test_counts_without_doubts_are_the_ranks_of_the_matrices(geometry):
    count = generic_rank(geometry)
    weight, gradient, both = exact_ranks(geometry)
    where = f"{geometry}: counted {counted(geometry)}, found {(weight, gradient, both)}"
    assert count.weight_doubts or count.weight_rank == weight, where
    assert count.doubts or (count.gradient_rank, count.rank) == (gradient, both), where


@given(geometries(usual=False))
@PROPERTY
def test_counts_are_upper_bounds_for_any_geometry(geometry):
    found = exact_ranks(geometry)
    assert all(a <= b for a, b in zip(found, counted(geometry), strict=True)), found


@given(geometries(side=8, most=60))
@settings(PROPERTY, max_examples=60)
def test_counts_are_the_numbers_of_singular_values(geometry):
    count = generic_rank(geometry)
    weight, gradient, both = singular_ranks(geometry)
    assert count.weight_doubts or count.weight_rank == weight
    assert count.doubts or (count.gradient_rank, count.rank) == (gradient, both)


# Deficient layers large enough that no doubt is raised: the regime that decides the index.
DEFICIENT = {
    "strided": square(3, 11, 3, 3, stride=2, padding=1),
    "strided, even kernel": square(2, 12, 3, 4, stride=2, padding=2),
    "grouped": square(6, 9, 6, 3, stride=2, padding=1, groups=2),
    "depthwise": square(3, 11, 3, 3, stride=2, padding=1, groups=3),
    "dilated": square(3, 11, 1, 3, padding=2, dilation=2),
    "no padding": square(4, 10, 2, 3),
    "pixels between the windows": square(4, 11, 5, 2, stride=3),
    "kernel of one tap, strided": square(3, 13, 2, 1, stride=3),
    "rectangular": Geometry((3, 8, 13), 2, (2, 3), (1, 2), (0, 1)),
    "borders never reached": square(2, 12, 3, 3, stride=2),
    "channels share a narrow null space": square(4, 8, 3, 4, stride=2, padding=2),
    "more filters than one tap serves": square(6, 9, 8, 3, stride=2, padding=1),
}


@pytest.mark.parametrize("name", DEFICIENT)
def test_deficient_layers_of_every_kind(name):
    geometry = DEFICIENT[name]
    count = generic_rank(geometry)
    assert count.reliable
    assert count.deficit < 0
    assert (count.weight_rank, count.gradient_rank, count.rank) == exact_ranks(geometry)


# Where counting ends: the one doubt, the layer, what is counted and what is true of W, K, [W; K].
ENDS = {
    "outputs at the edge see too few pixels": (
        square(2, (6, 3), 5, 2, 2, 1), (36, 32, 36), (30, 32, 36)),
    "one filter more than channels": (square(1, 8, 2, 2), (64, 8, 64), (62, 8, 64)),
    "filters commute": (square(1, 8, 3, 4), (64, 48, 64), (63, 48, 64)),
    "one channel more than filters, and full padding": (
        square(1, 9, 3, 3, 2, 1), (75, 27, 81), (72, 27, 81)),
    "filters commute on a map no larger than the kernel": (
        square(2, 5, 3, 3), (27, 50, 50), (27, 48, 50)),
    "two filters have common zeros": (square(1, 8, 2, 7), (8, 64, 64), (8, 62, 64)),
    "small map": (Geometry((2, 5, 5), 1, (4, 4), (1, 2), (2, 0)), (6, 32, 37), (6, 32, 36)),
    "padding with a stride of 3 or more": (
        square(2, 12, 6, 4, 3, 2), (150, 176, 288), (150, 176, 282)),
    "full padding": (square(3, 3, 1, 2, 1, 1), (16, 12, 27), (16, 12, 26)),
    "dilation on a small map": (square(3, 5, 3, 3, 1, 1, 2), (27, 75, 75), (27, 72, 75)),
    "taps at the edge meet too few pixels": (
        Geometry((1, 5, 5), 7, (3, 5), (1, 1), (2, 5), (3, 3)), (25, 25, 25), (25, 23, 25)),
    "dilation, and about as many equations as unknowns": (
        Geometry((3, 4, 10), 3, (2, 3), (1, 2), (2, 1), (3, 1)), (75, 54, 120), (75, 54, 114)),
    "dilation, and lattices with too many and with too few equations": (
        Geometry((2, 7, 4), 3, (1, 2), (1, 1), (0, 2), (2, 3)), (49, 12, 56), (49, 12, 52)),
}  # fmt: skip


@pytest.mark.parametrize("doubt", ENDS)
def test_where_counting_ends_it_says_so(doubt):
    geometry, expected, true = ENDS[doubt]
    count = generic_rank(geometry)
    assert counted(geometry) == expected != true
    assert exact_ranks(geometry) == true
    assert count.weight_doubts == (doubt,) or expected[0] == true[0]
    assert count.doubts == (doubt,) or expected[1:] == true[1:]


@pytest.mark.parametrize(
    ("doubt", "geometry"),
    [
        ("padding is more than half the kernel's reach",
         Geometry((1, 7, 4), 2, (4, 2), (3, 1), (3, 1))),
        ("stride and dilation are both above 1",
         Geometry((1, 6, 10), 3, (1, 4), (3, 2), (0, 1), (1, 3))),
    ],
)  # fmt: skip
def test_unusual_layers_are_always_doubted(doubt, geometry):
    count = generic_rank(geometry)
    assert doubt in count.doubts
    assert doubt in count.weight_doubts


def test_no_layer_in_use_is_doubted():
    """VGG, ResNet, MobileNet and the first layers of others, at the sizes they are used at."""
    for side in (7, 14, 28, 56, 112, 224):
        for channels, filters in ((3, 64), (64, 64), (64, 128), (256, 512)):
            for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (7, 2)):
                count = generic_rank(square(channels, side, filters, kernel, stride, kernel // 2))
                assert count.reliable, (side, channels, filters, kernel, stride, count)
            assert generic_rank(square(channels, side, channels, 3, 1, 1, 1, channels)).reliable


def test_constraints_on_the_layer_behind():
    first, second = (generic_rank(layer) for layer in cnn6(20)[:2])
    assert first.weight_constraints == 396
    assert first.joint_constraints == 396 + 576
    assert first.weight_constraints + second.deficit >= 0
    assert generic_rank(cnn6(side=64)[0]).weight_constraints == 780
    assert (second.unknowns, second.weight_equations, second.gradient_equations) == (
        3468, 1620, 2160)  # fmt: skip
    assert naive_deficit(cnn6(20)[1]) == 312


def test_large_images_are_counted():
    counts = [generic_rank(layer) for layer in cnn6(side=224)]
    assert [count.deficit for count in counts] == [0, -33672, 0, 0, -46500, 0]
    assert all(count.reliable for count in counts)
    unseen = generic_rank(square(64, 224, 128, 1, stride=2))
    assert unseen.rank == unseen.unknowns // 4


def test_a_kernel_that_covers_its_input_is_a_fully_connected_layer():
    count = generic_rank(Geometry((5, 4, 3), 7, (4, 3)))
    assert (count.gradient_rank, count.rank, count.weight_rank) == (60, 60, 7)


def test_an_axis_by_hand():
    axis = read_axis(5, 3, 2, 1, 1)  # outputs at -1, 1, 3: taps 0 and 2 meet pixels 1 and 3
    assert [(part.sources, part.pixels) for part in axis.taps] == [(2, 2), (1, 3)]
    assert [(part.sources, part.pixels) for part in axis.outputs] == [(3, 5)]
    assert (axis.live, axis.covered, axis.uncut) == (3, 5, True)
    apart = read_axis(6, 2, 1, 0, 3)  # taps three apart, outputs 0, 1, 2: three pairs of pixels
    assert [(part.sources, part.pixels) for part in apart.outputs] == [(1, 2)] * 3
    assert [(part.sources, part.pixels) for part in apart.taps] == [(2, 6)]
    both = read_axis(10, 3, 4, 0, 2)  # outputs 0, 4: taps 0 and 2 meet 0, 4, 8, tap 1 meets 2, 6
    assert [(part.sources, part.pixels) for part in both.taps] == [(2, 3), (1, 2)]
    assert [(part.sources, part.pixels) for part in both.outputs] == [(2, 5)]
    gaps = read_axis(7, 1, 3, 1, 1)  # outputs at -1, 2, 5: the first sees nothing
    assert (gaps.live, gaps.covered) == (2, 2)
