import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence.spectra import F64, Counted, lenet_spectrum, randn, symmetric
from scipy.sparse.linalg import cg

from leaklib.influence.conjugate_gradient import conjugate_gradient


def dense(K, b, shifts):
    """(K + εI)⁻¹ b by LU, (victims, vectors, shifts, d)."""
    eye = torch.eye(K.shape[-1], dtype=F64)
    shifts = shifts.expand(len(K), -1) if shifts.ndim == 1 else shifts
    return torch.stack(
        [
            torch.stack([torch.linalg.solve(k + e * eye, r.T).T for e in row.tolist()], dim=1)
            for k, r, row in zip(K, b, shifts, strict=True)
        ]
    )


def relative(found, expected):
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def test_every_victim_vector_and_shift_against_dense_solves():
    K, _ = symmetric(np.stack([np.geomspace(1e-2, 3, 24), np.linspace(5, 80, 24)]))
    b = randn(2, 3, 24) * torch.tensor([1.0, 1e-3, 1e6], dtype=F64)[None, :, None]
    shifts = torch.tensor([[1.0, 0.0, 0.1], [10.0, 3.0, 1e-3]], dtype=F64)  # in no order
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-13)
    assert found.converged.all()
    assert found.x.shape == (2, 3, 3, 24)
    assert relative(found.x, dense(K, b, shifts)).max() < 1e-10


def test_the_residual_is_the_true_one():
    K, _ = symmetric(np.geomspace(1e-3, 1, 40))
    b, shifts = randn(1, 2, 40), torch.tensor([0.0, 0.01, 1.0], dtype=F64)
    for limit in (6, 20, 1000):
        found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, max_products=limit)
        r = b[:, :, None] - found.x @ K[:, None] - shifts[:, None] * found.x
        expected = r.norm(dim=-1) / b.norm(dim=-1)[..., None]
        torch.testing.assert_close(found.residual, expected, rtol=1e-8, atol=1e-14)
        assert torch.equal(found.converged, found.residual <= 1e-6)
        assert (found.products <= limit).all()


def test_all_shifts_cost_one_krylov_space():
    K, _ = symmetric(np.geomspace(1e-2, 3, 60))
    b, shifts = randn(1, 1, 60), torch.tensor([1.0, 0.01, 0.1], dtype=F64)
    together = conjugate_gradient(lambda u: u @ K, b, shifts=shifts)
    alone = conjugate_gradient(lambda u: u @ K, b, shifts=shifts[1:2])
    assert together.products.item() == alone.products.item() + 2  # one more check for each shift
    assert together.converged.all()


def test_a_converged_shift_rests_while_others_go_on():
    K, _ = symmetric(np.geomspace(1e-3, 3, 50))
    b, shifts = randn(1, 1, 50), torch.tensor([1e-3, 1.0], dtype=F64)
    both = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-2)
    alone = conjugate_gradient(lambda u: u @ K, b, shifts=shifts[1:], tolerance=1e-2)
    assert both.products.item() > 3 * alone.products.item()
    # Smoothing brings the lone one, there the smallest shift, a little closer.
    assert alone.residual.item() < both.residual[0, 0, 1].item() < 3 * alone.residual.item()


def test_products_are_counted():
    K, _ = symmetric(np.stack([np.geomspace(1e-2, 3, 30), np.linspace(1, 2, 30)]))
    b = randn(2, 4, 30)
    b[0, 2] = 0
    counted = Counted(K)
    found = conjugate_gradient(counted, b, shifts=torch.tensor([0.0, 0.5]), tolerance=1e-8)
    assert found.applied == counted.vectors
    assert torch.equal(found.products.sum(1), counted.busy)
    assert found.products[0, 2] == 0
    assert found.converged.all()


def test_the_pass_narrows_as_vectors_converge():
    K, Q = symmetric(np.geomspace(1e-3, 3, 50))
    b = torch.stack([Q[0, :, 3], Q[0, :, 4], randn(50)])[None]  # one step each, and many
    counted = Counted(K)
    found = conjugate_gradient(counted, b, shifts=torch.tensor([0.01]))
    assert found.products[0, :2].tolist() == [2, 2]
    assert found.applied == int(found.products.sum()) == counted.vectors


def test_converged_pairs_are_left_alone():
    K, Q = symmetric(np.geomspace(1e-3, 3, 50))
    easy, hard, shifts = Q[:, None, :, 3], randn(1, 1, 50), torch.tensor([1e-3, 1.0], dtype=F64)
    alone = conjugate_gradient(lambda u: u @ K, easy, shifts=shifts)
    beside = conjugate_gradient(lambda u: u @ K, torch.cat([easy, hard], 1), shifts=shifts)
    torch.testing.assert_close(beside.x[:, :1], alone.x, rtol=0, atol=1e-15 * 1e3)
    assert beside.products[0, 0] == alone.products[0, 0] < beside.products[0, 1]


def test_scipy_agrees():
    K, _ = symmetric(np.geomspace(1e-2, 2, 80))
    b, shift = randn(1, 1, 80), 0.05
    shifts = torch.tensor([shift], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-12)
    steps = []
    theirs, info = cg(K[0].numpy() + shift * np.eye(80), b[0, 0].numpy(), rtol=1e-12, atol=0,
                      callback=steps.append)  # fmt: skip
    assert info == 0
    np.testing.assert_allclose(found.x[0, 0, 0].numpy(), theirs, rtol=1e-9, atol=1e-9)
    assert abs(found.products.item() - len(steps)) <= 4


@pytest.mark.parametrize(
    ("shift", "published"), [(1.0, 8), (0.1, 21), (0.01, 59), (0.001, 151), (0.0, None)]
)
def test_steps_on_a_spectrum_like_lenets(shift, published):
    eigenvalues = lenet_spectrum()
    K, Q = symmetric(eigenvalues)
    b = (randn(1, 1, 784) * torch.as_tensor(eigenvalues).sqrt()) @ Q.mT  # Jδ for Gaussian δ
    shifts = torch.tensor([shift], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-4)
    assert found.converged.all()
    assert relative(found.x, dense(K, b, shifts)).max() < 1e-2
    if published:
        assert published / 2 < found.products.item() < 2 * published


def test_undamped_at_condition_4e4():
    K, _ = symmetric(np.geomspace(1 / 4.2e4, 1, 200))
    b, shifts = randn(1, 2, 200), torch.tensor([0.0], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-12,
                               max_products=3000)  # fmt: skip
    assert found.converged.all()
    assert relative(found.x, dense(K, b, shifts)).max() < 1e-8


def test_float32_is_refined_to_its_tolerance():
    K, Q = symmetric(lenet_spectrum(200))
    b = (randn(1, 3, 200) * torch.as_tensor(lenet_spectrum(200)).sqrt()) @ Q.mT
    shifts = torch.tensor([1.0, 0.1, 0.01], dtype=F64)
    low = K.float()
    found = conjugate_gradient(lambda u: u @ low, b.float(), shifts=shifts, tolerance=1e-5)
    assert found.x.dtype == torch.float32
    assert found.residual.dtype == F64
    assert found.converged.all()
    expected = dense(K, b, shifts)
    assert relative(found.x.double(), expected).max() < 1e-4
    r = b[:, :, None] - found.x.double() @ K[:, None] - shifts[:, None] * found.x.double()
    assert (r.norm(dim=-1) / b.norm(dim=-1)[..., None]).max() < 1.2e-5  # in float64 as well


def test_a_sloppy_operator_is_refined():
    """Products wrong by 1e-3: the recursion drifts off, the measured residual does not."""
    K, _ = symmetric(np.linspace(0.05, 1, 40))
    drifts = iter(range(10**6))

    def sloppy(u):
        wobble = 1 + 1e-3 * torch.sin(torch.arange(40, dtype=F64) + next(drifts))
        return (u @ K) * wobble

    b = randn(1, 1, 40)
    found = conjugate_gradient(sloppy, b, shifts=torch.tensor([0.1]), tolerance=0.02)
    assert found.converged.all()
    strict = conjugate_gradient(sloppy, b, shifts=torch.tensor([0.1]), tolerance=1e-9)
    assert not strict.converged.any()
    assert strict.residual.max() < 0.01
    r = b - strict.x[:, :, 0] @ K - 0.1 * strict.x[:, :, 0]
    assert strict.residual.item() > 0.1 * (r.norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_singular_outside_the_range(dtype):
    eigenvalues = np.concatenate([np.zeros(20), np.geomspace(1e-2, 3, 30)])
    K, Q = symmetric(eigenvalues)
    b = randn(1, 2, 50)
    floor = (b @ Q)[..., :20].norm(dim=-1) / b.norm(dim=-1)
    k, shifts = K.to(dtype), torch.tensor([0.0, 0.1])
    found = conjugate_gradient(lambda u: u @ k, b.to(dtype), shifts=shifts, tolerance=1e-5)
    assert found.x.isfinite().all()
    assert not found.converged[..., 0].any()
    assert found.converged[..., 1].all()  # damped, the same right-hand side is no problem
    torch.testing.assert_close(found.residual[..., 0], floor, rtol=1e-3, atol=0)
    assert (found.products < 500).all()  # it stops by itself


def test_singular_inside_the_range_gives_the_minimum_norm():
    eigenvalues = np.concatenate([np.zeros(20), np.geomspace(1e-2, 3, 30)])
    K, _ = symmetric(eigenvalues)
    b = randn(1, 2, 50) @ K
    found = conjugate_gradient(lambda u: u @ K, b, shifts=torch.tensor([0.0]), tolerance=1e-12)
    expected = torch.linalg.lstsq(K, b.mT, driver="gelsd", rcond=1e-10).solution.mT
    assert found.converged.all()
    assert relative(found.x[:, :, 0], expected).max() < 1e-9


def test_right_hand_side_in_the_null_space():
    K, Q = symmetric(np.concatenate([np.zeros(20), np.geomspace(1e-2, 3, 30)]))
    b = Q.mT[:, :20].contiguous()
    found = conjugate_gradient(lambda u: u @ K, b, shifts=torch.tensor([0.0, 0.5]))
    assert found.converged.tolist() == [[[False, True]] * 20]
    # As rounded, K has eigenvalues of 1e-16 there; a few directions stand out of the rounding.
    assert (found.x[:, :, 0].norm(dim=-1) == 0).double().mean() > 0.85
    assert found.residual[..., 0].min() > 0.5
    torch.testing.assert_close(found.x[:, :, 1], 2 * b, rtol=0, atol=1e-9)


def test_an_exact_null_space():
    K = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=F64))
    b = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=torch.tensor([0.0]))
    assert found.converged.tolist() == [[[False], [True]]]
    torch.testing.assert_close(found.x[0, 0, 0], torch.zeros(4, dtype=F64))
    assert found.residual[0, 0, 0] == 1


def test_the_zero_operator():
    b = randn(1, 2, 5)
    found = conjugate_gradient(torch.zeros_like, b, shifts=torch.tensor([0.0, 2.0]))
    assert found.converged.tolist() == [[[False, True]] * 2]
    torch.testing.assert_close(found.x[:, :, 1], b / 2)
    assert (found.residual[..., 0] == 1).all()
    assert (found.x[:, :, 0] == 0).all()


def test_zero_right_hand_side():
    K, _ = symmetric(np.ones(4))
    found = conjugate_gradient(lambda u: u @ K, torch.zeros(1, 2, 4), shifts=torch.tensor([0.0]))
    assert found.converged.all()
    assert (found.x == 0).all()
    assert (found.residual == 0).all()
    assert (found.products == 0).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_of_the_right_hand_side(scale):
    K, _ = symmetric(np.geomspace(0.1, 1, 12))
    b = randn(1, 1, 12)
    plain = conjugate_gradient(lambda u: u @ K, b, shifts=torch.tensor([0.0]))
    scaled = conjugate_gradient(lambda u: u @ K, b * scale, shifts=torch.tensor([0.0]))
    torch.testing.assert_close(scaled.x / scale, plain.x, rtol=1e-9, atol=1e-9)
    assert scaled.converged.all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 25),
    decades=st.floats(0, 6),
    exponents=st.lists(st.floats(-4, 2), min_size=1, max_size=4),
)
def test_random_spectra(seed, d, decades, exponents):
    rng = np.random.default_rng(seed)
    K, _ = symmetric(10 ** -rng.uniform(0, decades + 1e-9, (2, d)), seed)
    b = randn(2, 2, d, seed=seed)
    shifts = torch.tensor([10**e for e in exponents], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-9,
                               max_products=2000)  # fmt: skip
    assert found.converged.all()
    # ‖e‖ <= ‖r‖/(λ_min + ε), and r is measured
    bound = found.residual * b.norm(dim=-1)[..., None] / shifts
    error = (found.x - dense(K, b, shifts)).norm(dim=-1)
    assert (error <= bound + 1e-10 * found.x.norm(dim=-1)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.integers(2, 40))
def test_an_unconverged_norm_is_too_small_and_its_residual_too_large(seed, limit):
    eigenvalues = np.geomspace(1e-3, 1, 40)
    K, _ = symmetric(eigenvalues, seed)
    b = randn(1, 2, 40, seed=seed)
    shifts = torch.tensor([0.0, 0.01], dtype=F64)
    found = conjugate_gradient(lambda u: u @ K, b, shifts=shifts, tolerance=1e-12,
                               max_products=limit + 1)  # fmt: skip
    exact = dense(K, b, shifts)
    # Rounding costs the basis its orthogonality, hence the slack.
    assert (found.x.norm(dim=-1) <= exact.norm(dim=-1) * (1 + 1e-6)).all()
    assert (found.residual[..., 0] <= 1 + 1e-12).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(3, 4)}, "victims, vectors, d"),
        ({"b": torch.zeros(1, 1, 4, dtype=torch.int64)}, "floating"),
        ({"b": torch.full((1, 1, 4), torch.nan)}, "finite right-hand"),
        ({"shifts": torch.tensor([-1.0])}, "shifts >= 0"),
        ({"shifts": torch.zeros(3, 1)}, "1 victims"),
        ({"shifts": torch.tensor(1.0)}, "torch.tensor"),
        ({"tolerance": 0.0}, "tolerance > 0"),
        ({"max_products": 1}, "max_products > 1"),
        ({"apply": lambda u: u[..., :2]}, "takes and returns"),
        ({"apply": lambda u: u * torch.nan}, r"finite products.*\[0\]"),
    ],
)
def test_refusals(change, message):
    arguments = {"apply": lambda u: u, "b": torch.ones(1, 1, 4), "shifts": torch.tensor([1.0])}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(arguments.pop("apply"), arguments.pop("b"), **arguments)
