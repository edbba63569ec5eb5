import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence.spectra import F64, Counted, lenet_spectrum, randn, symmetric
from scipy.sparse.linalg import eigsh

from leaklib.influence.lanczos import extreme_eigenvalues, lanczos, tridiagonal


def find(K, seed=0, **settings):
    """`extreme_eigenvalues` of dense matrices (victims, d, d)."""
    settings = {"dtype": K.dtype, "generator": torch.Generator().manual_seed(seed)} | settings
    apply = settings.pop("apply", lambda u: u @ K)
    return extreme_eigenvalues(apply, victims=len(K), d=K.shape[-1], **settings)


def test_against_eigh():
    K, _ = symmetric(np.stack([np.geomspace(1e-3, 3, 60), np.linspace(2, 9, 60)]))
    found = find(K, tolerance=1e-8, max_products=60, smallest=True)
    values, vectors = torch.linalg.eigh(K)
    torch.testing.assert_close(found.largest, values[:, -1], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.smallest, values[:, 0], rtol=1e-10, atol=1e-14)
    overlap = (found.largest_vector * vectors[..., -1]).sum(1).abs()
    torch.testing.assert_close(overlap, torch.ones(2, dtype=F64), rtol=1e-10, atol=0)
    assert found.converged.all()
    assert found.smallest_converged.all()


def test_scipy_agrees():
    K, _ = symmetric(lenet_spectrum(300))
    found = find(K, tolerance=1e-9)
    theirs = eigsh(K[0].numpy(), k=1, which="LA", return_eigenvectors=False)[0]
    assert found.largest.item() == pytest.approx(theirs, rel=1e-10)


def test_the_error_is_the_residual_of_the_pair():
    K, _ = symmetric(np.stack([np.geomspace(1e-3, 3, 80), np.linspace(2, 9, 80)]))
    for limit in (1, 4, 15):
        found = find(K, tolerance=1e-12, max_products=limit)
        v, theta = found.largest_vector, found.largest
        residual = ((v[:, None] @ K).squeeze(1) - theta[:, None] * v).norm(dim=-1)
        torch.testing.assert_close(found.largest_error, residual, rtol=1e-6, atol=1e-12)
        assert not found.converged.any()
        assert (found.products == limit).all()


def test_lambda_max_of_a_spectrum_like_lenets_is_quick_and_lambda_min_is_not():
    eigenvalues = lenet_spectrum()
    K, _ = symmetric(eigenvalues)
    found = find(K)
    assert found.converged.all()
    assert found.products.item() <= 25
    assert found.largest.item() == pytest.approx(eigenvalues[0], rel=1e-6)
    both = find(K, smallest=True, max_products=100)
    assert both.converged.all()
    assert not both.smallest_converged.any()
    assert both.products.item() == 100
    assert both.smallest.item() > eigenvalues[-1]  # an upper bound, and its error says how bad
    assert both.smallest.item() - both.smallest_error.item() <= eigenvalues[-1] * 10
    assert both.smallest_error.item() > 1e-4 * both.smallest.item()


def test_each_victim_stops_by_itself():
    easy, hard = np.ones(40), np.geomspace(0.5, 1, 40)
    easy[0] = 9
    K, _ = symmetric(np.stack([easy, hard]))
    counted = Counted(K)
    found = find(K, apply=counted, tolerance=1e-6)
    assert found.products[0] <= 3 < found.products[1]
    assert torch.equal(found.products, counted.busy)
    alone = find(K[:1], tolerance=1e-6)
    torch.testing.assert_close(found.largest[:1], alone.largest, rtol=1e-14, atol=0)
    overlap = (found.largest_vector[0] * alone.largest_vector[0]).sum().abs()  # sign is free
    assert overlap.item() == pytest.approx(1, rel=1e-14)


def test_a_finished_victim_keeps_its_error():
    K, _ = symmetric(np.stack([np.geomspace(1e-3, 1, 40), np.geomspace(0.5, 1, 40)]))
    both, alone = find(K, tolerance=1e-2), find(K[:1], tolerance=1e-2)
    assert both.products[0] < both.products[1]
    assert both.products[0] == alone.products[0]
    torch.testing.assert_close(both.largest_error[:1], alone.largest_error)
    assert alone.largest_error.item() > 1e-6


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_small_spaces_are_exact(d):
    K, _ = symmetric(np.stack([np.linspace(1, 2, d), np.geomspace(1e-6, 1, d)[::-1]]))
    found = find(K, tolerance=1e-15, smallest=True)
    values = torch.linalg.eigvalsh(K)
    torch.testing.assert_close(found.largest, values[:, -1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.smallest, values[:, 0], rtol=0, atol=1e-14)
    assert (found.products <= d).all()
    assert found.converged.all()
    assert found.smallest_converged.all()


def test_invariant_subspace():
    """Three distinct eigenvalues: three steps are all there is, beside a victim that goes on."""
    few = np.repeat([0.0, 1.0, 4.0], 10)
    K, _ = symmetric(np.stack([few, np.geomspace(1e-3, 3, 30)]))
    found = find(K, tolerance=1e-9, smallest=True, max_products=30)
    assert found.products[0] == 3
    assert found.largest[0].item() == pytest.approx(4)
    assert abs(found.smallest[0].item()) < 1e-13
    assert found.converged.all()
    assert found.smallest_converged.all()


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_multiples_of_the_identity_beside_another_victim(scale):
    eye = torch.eye(20, dtype=F64)
    K = torch.stack([scale * eye, symmetric(np.geomspace(0.1, 1, 20))[0][0]])
    found = find(K, smallest=True)
    assert found.products[0] == 1
    assert found.largest[0].item() == pytest.approx(scale)
    assert found.smallest[0].item() == pytest.approx(scale)
    torch.testing.assert_close(found.largest_vector.norm(dim=1), torch.ones(2, dtype=F64))
    assert found.converged.all()


def test_float32():
    K, _ = symmetric(np.stack([lenet_spectrum(200), np.geomspace(1e-9, 1e-6, 200)]))
    found = find(K.float(), tolerance=1e-4)
    assert found.converged.all()
    assert found.largest.dtype == F64
    assert found.largest_vector.dtype == torch.float32
    torch.testing.assert_close(found.largest, torch.linalg.eigvalsh(K)[:, -1], rtol=1e-5, atol=0)
    tiny = find(torch.eye(3)[None])  # exact, and yet no better than the products
    assert tiny.largest_error.item() == pytest.approx(torch.finfo(torch.float32).eps, rel=1e-3)


def test_the_decomposition():
    K, _ = symmetric(np.stack([np.geomspace(1e-4, 1, 40), np.linspace(-3, 9, 40)]))
    m = 12
    space = lanczos(lambda u: u @ K, randn(2, 3, 40), max_steps=m, dtype=F64)
    Q, T = space.basis, tridiagonal(space.diagonal, space.off_diagonal)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(m, dtype=F64).expand(2, 3, m, m))
    torch.testing.assert_close(Q @ K[:, None] @ Q.mT, T, rtol=0, atol=1e-13)
    rest = (Q @ K[:, None] - T @ Q)[:, :, -1].norm(dim=-1)
    torch.testing.assert_close(space.last, rest)


def test_orthogonal_after_convergence():
    """Without reorthogonalisation λ_max comes back as copies of itself."""
    eigenvalues = np.concatenate([np.linspace(0.01, 1, 60), [100.0]])
    K, _ = symmetric(eigenvalues)
    space = lanczos(lambda u: u @ K, randn(1, 1, 61), max_steps=61, dtype=F64)
    gram = (space.basis @ space.basis.mT)[0, 0]
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=F64), rtol=0, atol=1e-13)
    values, _ = space.ritz()
    np.testing.assert_allclose(values[0, 0].numpy(), eigenvalues, rtol=0, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 20), decades=st.floats(0, 8))
def test_bounds_and_interlacing(seed, d, decades):
    rng = np.random.default_rng(seed)
    spectrum = np.sort(10 ** -rng.uniform(0, decades + 1e-9, d))
    K, _ = symmetric(spectrum, seed)
    exact = torch.linalg.eigvalsh(K)[0]
    slack = 1e-13 * exact[-1]
    previous = None
    for m in range(1, d + 1):
        space = lanczos(lambda u: u @ K, randn(1, 1, d, seed=seed), max_steps=m, dtype=F64)
        values, vectors = space.ritz()
        values, errors = values[0, 0], space.ritz_errors(vectors)[0, 0]
        nearest = (values[:, None] - exact).abs().amin(1)
        assert (nearest <= errors + slack).all()
        assert (values >= exact[: len(values)] - slack).all()  # Cauchy
        assert (values <= exact[d - len(values) :] + slack).all()
        if previous is not None and len(values) == len(previous) + 1:
            assert (values[:-1] <= previous + slack).all()
            assert (previous <= values[1:] + slack).all()
        previous = values


@pytest.mark.parametrize("d", [2, 3, 30])
def test_an_asymmetric_operator_is_refused(d):
    K = randn(1, d, d)
    with pytest.raises(ValueError, match="symmetric"):
        find(K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 0.0}, "tolerance > 0"),
        ({"max_products": 0}, "max_products >= 1"),
        ({"apply": lambda u: u * torch.nan}, "finite products"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        find(torch.eye(3)[None], **change)


def test_zero_start():
    with pytest.raises(ValueError, match="nonzero"):
        lanczos(lambda u: u, torch.zeros(1, 1, 3), max_steps=2, dtype=F64)


@pytest.mark.parametrize("noise", [1e-3, 1e-7])
def test_rounding_of_the_products_enters_the_error(noise):
    """Products off by a share of their norm: no refusal, and no error below what was seen."""
    K, _ = symmetric(np.geomspace(1e-3, 3, 60)[None])
    rough = K + noise * randn(1, 60, 60, seed=5) / 60**0.5
    found = extreme_eigenvalues(
        lambda u: u @ rough.mT, victims=1, d=60, dtype=F64,
        generator=torch.Generator().manual_seed(0), max_products=40,
    )  # fmt: skip
    assert bool(found.converged) is (noise < 1e-4)
    assert abs(float(found.largest) - 3) <= 10 * max(noise, float(found.largest_error))
    assert float(found.largest_error) >= 0.1 * noise
