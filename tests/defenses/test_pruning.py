"""Pruning against numpy's interpolated quantile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaklib.defenses import Prune
from leaklib.gradients.payload import SharedGradient


def pruned_by_definition(values, ratio, rows=None):
    threshold = np.quantile(np.abs(values if rows is None else rows), ratio)
    return np.where(np.abs(values) > threshold, values, 0.0)


# Ratios that are exact in binary: otherwise ratio·(n − 1) lies a rounding error below an integer
# and numpy rounds the interpolated value up to an entry that the definition keeps.
EXACT = st.integers(1, 63).map(lambda k: k / 64)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(values=st.lists(st.integers(-50, 50), min_size=6, max_size=40), ratio=EXACT, split=st.data())
def test_entries_kept_are_those_above_the_quantile(values, ratio, split):
    # Few distinct values: ties at the threshold happen all the time.
    cut = split.draw(st.integers(1, len(values) - 1))
    g = np.array([values, values[::-1]], dtype=np.float64)
    shared = SharedGradient({"a": torch.tensor(g[:, :cut]), "b": torch.tensor(g[:, cut:])}, batch=1)
    whole = Prune(ratio)(shared)
    tensorwise = Prune(ratio, scope="tensor")(shared)
    for v in range(2):
        for name, part in (("a", g[v, :cut]), ("b", g[v, cut:])):
            expected = pruned_by_definition(part, ratio, rows=g[v])
            assert np.array_equal(whole.tensors[name][v].numpy(), expected)
            expected = pruned_by_definition(part, ratio)
            assert np.array_equal(tensorwise.tensors[name][v].numpy(), expected)


@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.5, 0.9, 0.99, 0.999])
def test_share_removed_on_continuous_values(ratio):
    generator = torch.Generator().manual_seed(0)
    shared = SharedGradient({"w": torch.randn(2, 25, 40, generator=generator)}, batch=1)
    released = Prune(ratio)(shared).tensors["w"].flatten(1)
    removed = (released == 0).sum(dim=1) / 1000
    assert removed.tolist() == pytest.approx([ratio, ratio], abs=1.1e-3)
    for v in range(2):
        g = shared.tensors["w"][v].flatten().double().numpy()
        assert np.array_equal(released[v].double().numpy(), pruned_by_definition(g, ratio))


def test_neighbouring_float32_numbers_are_told_apart():
    # An interpolated threshold rounded to float32 would land on the larger one and remove it.
    low = np.float32(1.0)
    high = np.nextafter(low, np.float32(2.0))
    shared = SharedGradient({"w": torch.tensor([[low, high]])}, batch=1)
    assert Prune(0.9)(shared).tensors["w"].tolist() == [[0.0, float(high)]]


def test_more_entries_than_float32_can_count():
    n = 2**24 + 1000
    grad = torch.arange(n, dtype=torch.int32).remainder(7).float()[None]
    released = Prune(0.5)(SharedGradient({"w": grad}, batch=1)).tensors["w"]
    assert torch.equal(released, torch.where(grad > 3, grad, 0.0))


def test_zero_ratio_removes_nothing():
    shared = SharedGradient({"w": torch.tensor([[1.0, -2.0, 2.0]])}, batch=1)
    assert torch.equal(Prune(0.0)(shared).tensors["w"], shared.tensors["w"])


def test_removed_entries_are_positive_zeros():
    shared = SharedGradient({"w": torch.tensor([[-1.0, -2.0, -3.0]])}, batch=1)
    assert not torch.signbit(Prune(0.5)(shared).tensors["w"][0, :2]).any()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 90, float("nan")])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="expected a ratio in \\[0, 1\\), got"):
        Prune(ratio)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope to be one of"):
        Prune(0.5, scope="layer")
