import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence.spectra import F64, Counted, lenet_spectrum, symmetric

from leaklib.influence.trace import trace_estimate, trace_of_function


def run(function, K, *arguments, seed=0, **settings):
    settings = {"dtype": K.dtype, "generator": torch.Generator().manual_seed(seed)} | settings
    apply = settings.pop("apply", lambda u: u @ K)
    return function(apply, *arguments, victims=len(K), d=K.shape[-1], **settings)


def exact(K, function=lambda t: t):
    return function(torch.linalg.eigvalsh(K).clamp(min=0)).sum(1)


def expected_square(damping):
    """Σ λ/(λ+ε)², what Gaussian noise of unit variance does on average."""
    return lambda t: t / (t + damping) ** 2


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_unbiased_within_the_standard_error(method):
    K, _ = symmetric(np.stack([np.geomspace(1e-3, 1, 40), np.linspace(0.1, 2, 40)]))
    runs = [run(trace_estimate, K, samples=8, method=method, seed=s) for s in range(300)]
    means = torch.stack([r.mean for r in runs])
    spread = means.std(0)
    assert ((means.mean(0) - exact(K)).abs() < 4 * spread / 300**0.5).all()
    claimed = torch.stack([r.standard_error for r in runs]).square().mean(0).sqrt()
    # XTrace shares its vectors among the values it averages: its error is a rule of thumb.
    slack = 0.15 if method == "hutchinson" else 0.5
    torch.testing.assert_close(claimed, spread, rtol=slack, atol=0)


def test_hutchinsons_variance():
    K, _ = symmetric(np.geomspace(1e-2, 1, 30))
    off = K[0] - torch.diag(torch.diagonal(K[0]))
    means = torch.stack([run(trace_estimate, K, samples=4, seed=s).mean for s in range(600)])
    assert means.var().item() == pytest.approx(2 * off.square().sum().item() / 4, rel=0.25)


def test_xtrace_is_far_closer_where_the_spectrum_decays():
    K, _ = symmetric(0.7 ** np.arange(100))
    found = run(trace_estimate, K, samples=25, method="xtrace")
    plain = run(trace_estimate, K, samples=50)
    assert found.products.item() == plain.products.item() == 50
    assert found.standard_error.item() < 0.01 * plain.standard_error.item()
    assert abs(found.mean - exact(K)).item() < 5 * found.standard_error.item()


def test_xtrace_leaves_one_vector_out():
    """Every estimate against its definition: basis without ω_i, the rest by Hutchinson with ω_i."""
    K, _ = symmetric(np.geomspace(1e-3, 1, 30))
    drawn = []

    def recording(u):
        drawn.append(u)
        return u @ K

    found = run(trace_estimate, K, samples=6, method="xtrace", apply=recording)
    omega, k, values = drawn[0][0], K[0], []
    for i in range(6):
        Q = torch.linalg.qr(k @ torch.cat([omega[:i], omega[i + 1 :]]).mT)[0]
        v = omega[i] - Q @ (Q.mT @ omega[i])
        values.append(torch.trace(Q.mT @ k @ Q) + v @ k @ v)
    values = torch.stack(values)
    assert found.mean.item() == pytest.approx(values.mean().item(), rel=1e-10)
    assert found.standard_error.item() == pytest.approx(values.std().item() / 6**0.5, rel=1e-8)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_xtrace_of_low_rank_is_exact(dtype):
    K, _ = symmetric(np.concatenate([np.zeros(36), [1.0, 2.0, 3.0, 4.0]]))
    found = run(trace_estimate, K.to(dtype), samples=8, method="xtrace")
    assert found.mean.item() == pytest.approx(10, rel=1e-6)
    assert found.standard_error.item() < 1e-5


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_the_zero_operator(method):
    found = run(trace_estimate, torch.zeros(2, 40, 40, dtype=F64), samples=4, method=method)
    assert found.mean.tolist() == found.standard_error.tolist() == [0, 0]


@pytest.mark.parametrize("method", ["hutchinson", "xtrace"])
def test_exact_once_the_diagonal_is_no_dearer(method):
    K, _ = symmetric(np.stack([np.geomspace(1e-3, 1, 9), np.ones(9)]))
    counted = Counted(K)
    found = run(trace_estimate, K, samples=9, method=method, apply=counted)
    torch.testing.assert_close(found.mean, exact(K), rtol=1e-12, atol=0)
    assert (found.standard_error == 0).all()
    assert found.products.tolist() == counted.busy.tolist() == [9, 9]


@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_expected_square_of_a_spectrum_like_lenets(damping):
    K, _ = symmetric(lenet_spectrum(300))
    function = expected_square(damping)
    found = run(trace_of_function, K, function, samples=32, steps=40)
    reference = exact(K, function)
    error = (found.mean - reference).abs()
    assert (error <= 4 * found.standard_error + 4 * found.quadrature_error).all()
    assert (found.standard_error < 0.1 * reference).all()
    assert (found.quadrature_error < 0.02 * reference).all()


def test_too_few_steps_are_said():
    K, _ = symmetric(np.geomspace(1e-5, 1, 200))
    function = expected_square(1e-4)
    found = run(trace_of_function, K, function, samples=16, steps=8)
    error = (found.mean - exact(K, function)).abs()
    assert (error > 4 * found.standard_error).all()
    assert (found.quadrature_error > 0.1 * error).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 14), damping=st.floats(1e-3, 10))
def test_exact_for_small_spaces(seed, d, damping):
    rng = np.random.default_rng(seed)
    K, _ = symmetric(10 ** -rng.uniform(0, 4, (2, d)), seed)
    function = expected_square(damping)
    found = run(trace_of_function, K, function, samples=14, steps=14)
    torch.testing.assert_close(found.mean, exact(K, function), rtol=1e-9, atol=0)
    assert (found.standard_error == 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 5))
def test_quadrature_is_exact_for_polynomials(seed, steps):
    rng = np.random.default_rng(seed)
    K, _ = symmetric(rng.uniform(0.2, 1, 12), seed)
    degree = 2 * steps - 1
    found = run(trace_of_function, K, lambda t: t**degree, samples=12, steps=steps)
    torch.testing.assert_close(found.mean, exact(K, lambda t: t**degree), rtol=1e-10, atol=0)


def test_unbiased_trace_of_a_function():
    K, _ = symmetric(np.geomspace(1e-2, 1, 30))
    function = expected_square(0.1)
    runs = [run(trace_of_function, K, function, samples=4, steps=16, seed=s) for s in range(100)]
    means = torch.cat([r.mean for r in runs])
    assert abs(means.mean() - exact(K, function).item()) < 4 * means.std() / 100**0.5


def test_early_invariant_rows_do_not_spoil_an_inverse():
    """Two distinct eigenvalues beside a victim with many: padding never reaches f."""
    two = np.repeat([0.5, 2.0], 15)
    K, _ = symmetric(np.stack([two, np.geomspace(0.1, 1, 30)]))
    counted = Counted(K)
    found = run(trace_of_function, K, lambda t: 1 / t, samples=30, steps=30, apply=counted)
    torch.testing.assert_close(found.mean, exact(K, lambda t: 1 / t), rtol=1e-9, atol=0)
    assert found.products[0] == 60
    assert torch.equal(found.products, counted.busy)
    assert (found.quadrature_error == 0).all()


def test_rounding_below_zero_does_not_reach_the_function():
    K, _ = symmetric(np.concatenate([np.zeros(20), np.linspace(1, 2, 10)]))
    K = K - 1e-12 * torch.eye(30, dtype=F64)  # far more than rounding would
    found = run(trace_of_function, K, torch.sqrt, samples=30, steps=30)
    assert found.mean.item() == pytest.approx(np.sqrt(np.linspace(1, 2, 10)).sum(), rel=1e-6)


def test_an_inverse_of_a_singular_operator_is_infinite():
    K = torch.diag(torch.tensor([0.0, 1.0, 2.0], dtype=F64))[None]
    assert run(trace_of_function, K, lambda t: 1 / t).mean.item() == torch.inf


def test_float32():
    K, _ = symmetric(lenet_spectrum(200))
    function = expected_square(0.1)
    low = run(trace_of_function, K.float(), function)
    high = run(trace_of_function, K, function)
    assert low.mean.dtype == F64
    torch.testing.assert_close(low.mean, high.mean, rtol=1e-4, atol=0)
    low, high = run(trace_estimate, K.float()), run(trace_estimate, K)
    torch.testing.assert_close(low.mean, high.mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda K: run(trace_estimate, K, samples=1), "samples >= 2"),
        (lambda K: run(trace_estimate, K, method="hutch"), "'hutchinson' or 'xtrace'"),
        (lambda K: run(trace_estimate, K, apply=lambda u: u * torch.inf), "finite products"),
        (lambda K: run(trace_of_function, K, lambda t: t, steps=0), "steps >= 1"),
        (lambda K: run(trace_of_function, K, lambda t: t.sum()), "elementwise"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.eye(5, dtype=F64)[None])
