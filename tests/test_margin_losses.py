"""Losses of one logit: derivatives, the loss protocol, and roots of μ l'(μ) against bisection."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, vmap

from leaklib.margin_losses import (
    EXPONENTIAL,
    HINGE,
    LOGISTIC,
    MarginLoss,
    largest_tau,
    margin_roots,
)

DTYPE = torch.float64
LOSSES = [LOGISTIC, EXPONENTIAL, HINGE]
NAMES = [loss.name for loss in LOSSES]
SMOOTH = [LOGISTIC, EXPONENTIAL]
# τ(μ) = −μ l'(μ), written with nothing but the standard library
TAU = {
    "logistic": lambda mu: mu / (1 + math.exp(mu)),
    "exponential": lambda mu: mu * math.exp(-mu),
    "hinge": lambda mu: mu if mu < 1 else 0.0,
}


def bisect(function, low, high):
    """Root of a function that is negative at `low` and positive at `high`."""
    for _ in range(2000):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def summit(name):
    """Where τ is largest: the sign change of a central difference."""
    tau, h = TAU[name], 1e-5
    return bisect(lambda mu: tau(mu - h) - tau(mu + h), 0.5, 3.0)


def roots_by_bisection(name, value):
    top = summit(name)
    first = bisect(lambda mu: TAU[name](mu) - value, -60.0, top)
    second = bisect(lambda mu: value - TAU[name](mu), top, 700.0) if value > 0 else math.nan
    return first, second


# --- the losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_slope_and_curvature_are_derivatives(loss):
    mu = torch.tensor([-700.0, -30.0, -2.5, -0.1, 0.0, 0.3, 0.99, 1.01, 4.0, 30.0], dtype=DTYPE)
    if loss is EXPONENTIAL:
        mu = mu[1:]
    ours = loss.slope(mu)
    torch.testing.assert_close(vmap(grad(loss.value))(mu), ours, rtol=1e-13, atol=0)
    second = vmap(grad(grad(loss.value)))(mu)
    torch.testing.assert_close(second, loss.curvature(mu), rtol=1e-12, atol=1e-15)
    h, inner = 1e-5, mu[mu.abs() < 5]
    difference = (loss.value(inner + h) - loss.value(inner - h)) / (2 * h)
    torch.testing.assert_close(difference, loss.slope(inner), rtol=1e-8, atol=1e-10)
    assert bool((ours <= 0).all())


def test_values_known_on_paper():
    mu = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=DTYPE)
    expected = {
        "logistic": [math.log1p(math.exp(-m)) for m in mu.tolist()],
        "exponential": [math.exp(-m) for m in mu.tolist()],
        "hinge": [1.0, 0.0, 3.0, 0.0],
    }
    for loss in LOSSES:
        torch.testing.assert_close(loss.value(mu), torch.tensor(expected[loss.name], dtype=DTYPE))
    assert float(HINGE.slope(torch.tensor(1.0))) == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logistic_is_the_binary_cross_entropy(reduction):
    logits = torch.tensor([[0.3], [-2.0], [50.0], [-50.0]], dtype=DTYPE)
    labels = torch.tensor([1, 1, 0, 0])
    expected = F.binary_cross_entropy_with_logits(
        logits[:, 0], labels.to(DTYPE), reduction=reduction
    )
    for outputs in (logits, logits[:, 0]):
        torch.testing.assert_close(LOGISTIC(outputs, labels, reduction=reduction), expected)
    # two classes whose first logit is held at zero
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    torch.testing.assert_close(F.cross_entropy(two, labels, reduction=reduction), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_probabilities_mix_the_two_labels(loss):
    logits = torch.tensor([0.4, -1.5, 2.0], dtype=DTYPE)
    share = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0]], dtype=DTYPE)
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    single = [(loss(logits[[i]], zeros[[i]]), loss(logits[[i]], ones[[i]])) for i in range(3)]
    expected = sum(p[0] * a + p[1] * b for p, (a, b) in zip(share, single, strict=True))
    torch.testing.assert_close(loss(logits[:, None], share, reduction="sum"), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_twice_differentiated_under_vmap(loss):
    logits = torch.tensor([[-0.5], [0.2], [0.9]], dtype=DTYPE)
    labels = torch.tensor([[0], [1], [1]])

    def slope(logit, label):
        return grad(lambda z: loss(z, label))(logit)

    batched = vmap(jacrev(slope))(logits[:, :, None].mT, labels)
    y = 2.0 * labels[:, 0] - 1
    expected = loss.curvature(y * logits[:, 0])
    torch.testing.assert_close(batched.flatten(), expected)
    first = vmap(slope)(logits[:, :, None].mT, labels).flatten()
    torch.testing.assert_close(first, y * loss.slope(y * logits[:, 0]))


def test_a_loss_is_told_by_its_name():
    assert str(LOGISTIC) == "MarginLoss(name='logistic')"


@pytest.mark.parametrize(
    ("outputs", "labels", "settings", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2).long(), {}, r"one logit.*\(2, 3\).*classes=1"),
        (torch.zeros(2, 1), torch.zeros(3).long(), {}, r"integer labels \(2,\).*\(3,\)"),
        (torch.zeros(2, 1), torch.zeros(2), {}, r"probabilities \(2, 2\).*float32"),
        (torch.zeros(2), torch.zeros(2).long(), {"reduction": "none"}, "'mean' or 'sum'.*'none'"),
    ],
)
def test_bad_input_of_a_loss(outputs, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        LOGISTIC(outputs, labels, **settings)


# --- the roots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SMOOTH, ids=NAMES[:2])
def test_roots_equal_those_of_bisection(loss):
    top = TAU[loss.name](summit(loss.name))
    values = [-20.0, -3.0, -0.2, -1e-9, 1e-12, 1e-3, 0.1, 0.25, top * (1 - 1e-4)]
    found = margin_roots(loss, torch.tensor(values, dtype=DTYPE))
    expected = torch.tensor([roots_by_bisection(loss.name, v) for v in values], dtype=DTYPE)
    assert found.dtype == DTYPE
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss", SMOOTH, ids=NAMES[:2])
def test_roots_next_to_the_double_root_are_as_good_as_tau_allows(loss):
    offsets = torch.logspace(-7, -0.5, 40, dtype=DTYPE)
    centre = summit(loss.name)
    for column, sign in ((0, -1.0), (1, 1.0)):
        mu = centre + sign * offsets
        tau = torch.tensor([TAU[loss.name](m) for m in mu.tolist()], dtype=DTYPE)
        found = margin_roots(loss, tau)[:, column]
        # an error of τ in its last digit moves the root by that much divided by the slope of τ
        flat = (-loss.slope(mu) - mu * loss.curvature(mu)).abs()
        allowed = 4e-16 / flat + 1e-14
        assert bool(((found - mu).abs() <= allowed).all()), (found - mu).abs() / allowed


@pytest.mark.parametrize("loss", SMOOTH, ids=NAMES[:2])
def test_double_root_and_nothing_beyond(loss):
    top = largest_tau(loss)
    assert top == pytest.approx(TAU[loss.name](summit(loss.name)), abs=1e-15)
    tau = torch.tensor([top, top * (1 + 1e-13), top * (1 + 1e-9), 2.0, 1e4], dtype=DTYPE)
    found = margin_roots(loss, tau)
    assert found[:2, 0].tolist() == pytest.approx([summit(loss.name)] * 2, abs=1e-9)
    assert bool(found[:2, 1].isnan().all())
    assert bool(found[2:].isnan().all())
    assert float(margin_roots(loss, tau, tolerance=1e-8)[2, 0]) == float(found[0, 0])


def test_numbers_of_the_paper():
    assert largest_tau(LOGISTIC) == pytest.approx(0.278465, abs=5e-7)
    tau = torch.tensor([TAU["logistic"](1.0), TAU["logistic"](2.1685)], dtype=DTYPE)
    found = margin_roots(LOGISTIC, tau)
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1.597], dtype=DTYPE), rtol=0, atol=5e-4)
    pair = torch.tensor([0.6478, 2.1685], dtype=DTYPE)
    torch.testing.assert_close(found[1], pair, rtol=0, atol=1e-4)
    # a network at its start classifies barely right: the twin is ten thousand times larger
    weak = torch.tensor([TAU["logistic"](1e-4), TAU["logistic"](1e-3)], dtype=DTYPE)
    assert margin_roots(LOGISTIC, weak)[:, 1].tolist() == pytest.approx([12.4, 9.9], abs=0.05)


def test_hinge_has_one_root_below_its_bound():
    tau = torch.tensor([-5.0, 0.0, 0.7, 1.0, 1.1], dtype=DTYPE)
    found = margin_roots(HINGE, tau)
    assert found[:3, 0].tolist() == [-5.0, 0.0, 0.7]
    assert 0.999999 < float(found[3, 0]) < 1.0  # below 1, where the gradient is not zero
    assert bool(found[4].isnan().all())
    assert bool(found[:, 1].isnan().all())
    assert largest_tau(HINGE) == 1.0


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_extreme_values(loss):
    tau = torch.tensor([-1e4, -1e-300, 0.0, 1e-300, math.nan], dtype=DTYPE)
    found = margin_roots(loss, tau)
    assert bool(found[:4, 0].isfinite().all())
    assert float(found[2, 0]) == 0.0
    assert bool(found[:3, 1].isnan().all())
    assert bool(found[4].isnan().all())
    if loss is not HINGE:
        assert float(found[3, 1]) == pytest.approx(697.32, abs=0.01)
    misfit = -found[:4, 0] * loss.slope(found[:4, 0]) - tau[:4]
    assert bool((misfit.abs() <= 4e-16 * tau[:4].abs().clamp(min=1e-300)).all())


def test_float32_and_no_victims():
    single = torch.tensor([0.1], dtype=torch.float32)
    torch.testing.assert_close(
        margin_roots(LOGISTIC, single), margin_roots(LOGISTIC, single.double())
    )
    assert margin_roots(EXPONENTIAL, torch.zeros(0)).shape == (0, 2)


def test_a_loss_without_closed_form_is_refused():
    square = MarginLoss("square", lambda m: (1 - m) ** 2, lambda m: 2 * m - 2, torch.ones_like)
    with pytest.raises(ValueError, match="logistic, exponential, hinge, got 'square'"):
        margin_roots(square, torch.zeros(1))
    with pytest.raises(ValueError, match="'square'"):
        largest_tau(square)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = torch.tensor([[0.5], [-2.0]], dtype=DTYPE), torch.tensor([0, 1])
    torch.testing.assert_close(LOGISTIC(logits, labels.to(dtype)), LOGISTIC(logits, labels))
