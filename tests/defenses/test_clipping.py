"""Clipping against numpy's norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaklib.defenses import Clip
from leaklib.gradients.payload import SharedGradient


def flat(shared):
    return np.concatenate([t.reshape(t.shape[0], -1).numpy() for t in shared.tensors.values()], 1)


@settings(deadline=None, derandomize=True)
@given(max_norm=st.floats(1e-3, 1e3), size=st.floats(1e-3, 1e3), seed=st.integers(0, 2**20))
def test_global_clipping_keeps_the_direction_and_bounds_the_length(max_norm, size, seed):
    generator = torch.Generator().manual_seed(seed)
    shared = SharedGradient(
        {
            "w": size * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
            "b": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        },
        batch=1,
    )
    before, after = flat(shared), flat(Clip(max_norm)(shared))
    for g, clipped in zip(before, after, strict=True):
        length = np.linalg.norm(g)
        if length <= max_norm:
            assert np.array_equal(clipped, g)
        else:
            np.testing.assert_allclose(clipped, g * max_norm / length, rtol=1e-12)


def test_scope_tensor_bounds_each_tensor():
    shared = SharedGradient(
        {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]]), "b": torch.tensor([[0.0, 2.0], [0.0, 0.5]])},
        batch=1,
    )
    released = Clip(1.0, scope="tensor")(shared)
    torch.testing.assert_close(released.tensors["w"], torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    torch.testing.assert_close(released.tensors["b"], torch.tensor([[0.0, 1.0], [0.0, 0.5]]))


def test_half_precision_squares_do_not_overflow():
    shared = SharedGradient({"w": torch.full((1, 4), 1000.0, dtype=torch.float16)}, batch=1)
    assert Clip(1.0)(shared).tensors["w"].tolist() == [[0.5, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_bounds_are_refused(max_norm):
    with pytest.raises(ValueError, match="expected a finite max_norm > 0"):
        Clip(max_norm)


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope to be one of 'global', 'tensor', got 'layer'"):
        Clip(1.0, scope="layer")
