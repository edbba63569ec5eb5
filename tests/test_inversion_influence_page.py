"""Every number of the page on inversion influence, from its stated model by another route.

The page writes K⁻¹Jδ. Here autograd gives the gradient and J, least squares gives the error, and a
nonlinear search gives the best match. The sentences and table rows of the page are written again
from these; a number that is changed on either side is not found on the page.
"""

import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import least_squares

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGE = " ".join((BOOK / "inversion_influence.md").read_text(encoding="utf-8").split())
DRAWING = BOOK / "_static" / "influence_ellipse.svg"
NUMBER = r"-?\d+(?:\.\d+)?"


# --- what the page states -----------------------------------------------------------------------


def stated_model():
    """Picture, weights and bias of the example."""
    body = re.search(r":label: i2f-model (.*?)```", PAGE).group(1)
    x1, x2, w1, w2, bias = (float(value) for value in re.findall(NUMBER, body))
    return np.array([x1, x2]), np.array([w1, w2]), bias


def stated_noises():
    """The three noises of equal length, as integers (hundredths)."""
    rows = re.findall(r"\| (strong|weak|mixed): \$\((.*?)\)\$ \|", PAGE)
    return {name: np.array([float(v) for v in entries.split(",")]) for name, entries in rows}


PIXELS, WEIGHTS, BIAS = stated_model()
NOISES = stated_noises()
WASTED = np.array([2.0, 2.0, -1.0])


# --- the same, from the model alone -------------------------------------------------------------


def shared_gradient(pixels, scale=1.0):
    """Gradient of scale · logistic loss of "yes" in (w1, w2, b), differentiable in the pixels."""
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    bias = torch.tensor(BIAS, dtype=torch.float64, requires_grad=True)
    logit = weights @ pixels + bias
    loss = scale * F.binary_cross_entropy_with_logits(logit, torch.ones_like(logit))
    grads = torch.autograd.grad(loss, [weights, bias], create_graph=True)
    return torch.cat([grads[0], grads[1].reshape(1)])


def gradient_at(pixels):
    return shared_gradient(torch.tensor(pixels)).detach().numpy()


@cache
def jacobian(scale=1.0, unit=1.0):
    """J (pixels × parameters); pixels counted in `unit`."""
    moved = torch.autograd.functional.jacobian(
        lambda pixels: shared_gradient(pixels * unit, scale), torch.tensor(PIXELS / unit)
    )
    return moved.numpy().T


def error(noise, damping=0.0, jac=None):
    """Minimiser of ‖Jᵀe − δ‖² + ε‖e‖², as one least-squares problem."""
    jac = jacobian() if jac is None else jac
    rows = np.vstack([jac.T, np.sqrt(damping) * np.eye(2)])
    return np.linalg.lstsq(rows, np.concatenate([noise, np.zeros(2)]), rcond=None)[0]


def search(noise):
    """Error of the picture whose gradient is closest to g + δ: the best of several starts."""
    target = gradient_at(PIXELS) + noise
    found = [
        least_squares(
            lambda pixels: gradient_at(pixels) - target,
            PIXELS + start,
            jac=lambda pixels: torch.autograd.functional.jacobian(
                shared_gradient, torch.tensor(pixels)
            ).numpy(),
            xtol=1e-14, ftol=1e-14, gtol=1e-14,
        )
        for start in ([0.0, 0.0], [0.3, -0.3], [-0.3, 0.3])
    ]  # fmt: skip
    return min(found, key=lambda fit: fit.cost).x - PIXELS


def length(vector):
    return float(np.linalg.norm(vector))


def rmse(vector):
    return float(np.sqrt(np.mean(vector**2)))


def bound(noise):
    return length(jacobian() @ noise) / float(np.linalg.norm(jacobian(), 2)) ** 2


# --- the page, written again --------------------------------------------------------------------


def exact(value):
    """A number that the page gives exactly."""
    text = f"{round(float(value), 9) + 0.0:.4g}"  # + 0.0: no minus zero
    assert float(text) == pytest.approx(value, abs=1e-9), f"{value} is not {text}"
    return text


def vector(values):
    return f"({', '.join(exact(value) for value in values)})"


def matrix(rows):
    body = r" \\ ".join(" & ".join(exact(value) for value in row) for row in np.atleast_2d(rows))
    return rf"\begin{{bmatrix}} {body} \end{{bmatrix}}"


@cache
def sentences():
    """Every piece of the page that shows a number of the example."""
    jac = jacobian()
    gram = jac @ jac.T
    grad = gradient_at(PIXELS)
    left, sigma, right = np.linalg.svd(jac)
    lam = sigma**2
    z = float(WEIGHTS @ PIXELS + BIAS)
    q = 1 / (1 + np.exp(-z))
    names = list(NOISES)
    noises = {name: 0.01 * noise for name, noise in NOISES.items()}
    errors = {name: error(noise) for name, noise in noises.items()}
    size = length(NOISES["strong"])
    pinv_square = float((np.linalg.pinv(jac.T) ** 2).sum())
    target = 0.1
    relative = 0.01 * lam[0]
    sharper = error(noises["strong"], relative), error(noises["weak"], relative)
    dropped = [
        round(100 - 100 * rmse(damped) / rmse(errors[name]))
        for name, damped in zip(("strong", "weak"), sharper, strict=True)
    ]
    half = np.linalg.svd(jacobian(unit=0.5), compute_uv=False)
    tenth = np.linalg.svd(jacobian(scale=0.1), compute_uv=False) ** 2
    divided = (grad + 0.01 * WASTED)[0] / (grad + 0.01 * WASTED)[2]
    mixed = noises["mixed"]
    k, c, step = q - 1, q * (1 - q), q * (1 - q) * WEIGHTS[0]
    products = [" + ".join(exact(value) for value in row * NOISES["mixed"] if value) for row in jac]
    moved = jac @ NOISES["mixed"]
    det = 1 / np.linalg.det(gram)
    terms = np.diag(gram) * moved, -gram[0, 1] * moved[::-1]
    return [
        rf"x = {matrix(PIXELS[:, None])}, \quad w = {matrix(WEIGHTS)}, \quad b = {exact(BIAS)} ```",
        f"its label $y = {exact(q - grad[2])}$ (\"yes\")",
        f"$z = {exact(z)}$ and $q = {exact(q)}$",
        f"= q - 1 = {exact(k)}$",
        f"$q(1 - q) = {exact(c)}$",
        f"g = {matrix(grad)} ```",
        rf"$w_1 = {exact(WEIGHTS[0])}$, so $k$ grows by ${exact(c)} \cdot {exact(WEIGHTS[0])}"
        f" = {exact(step)}$",
        rf"${exact(step)} \cdot x_1 + k = {exact(step * PIXELS[0] + k)}$",
        rf"${exact(step)} \cdot x_2 = {exact(step * PIXELS[1])}$, the third by ${exact(step)}$.",
        rf"J = {matrix(jac)}, \quad K = {matrix(gram)} ```",
        rf"K^{{-1}} = \frac{{{exact(9 * det)}}}{{9}} {matrix(np.linalg.inv(gram) / det)} ```",
        f"$K(1, 1) = {exact(gram @ [1, 1] @ [.5, .5])}\\,(1, 1)$ and "
        f"$K(1, -1) = {exact(gram @ [1, -1] @ [.5, -.5])}\\,(1, -1)$",
        *(
            f"| {name} | {exact(lam[i])} | {exact(sigma[i])} "
            f"| ${vector(left[:, i] * np.sqrt(2) * np.sign(left[0, i]))}/\\sqrt{{2}}$ "
            f"| ${vector(np.sign(left[0, i]) * right[i] * np.sqrt(n))}/\\sqrt{{{n}}}$ |"
            for i, (name, n) in enumerate((("strong", 18), ("weak", 2)))
        ),
        f"| none | | | | ${vector(right[2] * np.sign(right[2, 0]) * 3)}/3$ |",
        rf"each noise has length $\sqrt{{{exact(size**2)}}} = {size:.2f}$",
        *(
            f"| {name}: ${vector(NOISES[name])}$ | ${vector(100 * jac @ noises[name])}$ "
            f"| ${vector(100 * errors[name])}$ | {100 * length(errors[name]):.2f} "
            f"| {100 * rmse(errors[name]):.2f} | {100 * rmse(search(noises[name])):.2f} |"
            for name in names
        ),
        rf"$J\delta = ({products[0]},\ {products[1]})$, and $e = \tfrac{{{exact(9 * det)}}}{{9}}"
        rf"({exact(terms[0][0])} - {exact(-terms[1][0])},\ {exact(terms[1][1])} + "
        rf"{exact(terms[0][1])})$.",
        f"${exact(sigma[0])}/{exact(sigma[1])} = {exact(sigma[0] / sigma[1])}$.",
        rf"noise ${vector(WASTED)}$ costs nothing: $J\delta = {vector(jac @ WASTED)}$",
        f"$1/{exact(lam[0])} + 1/{exact(lam[1])} = {pinv_square:.3f}$. The weak direction gives "
        f"{100 / lam[1] / pinv_square:.0f} % of it.",
        rf"For $r = {target}$ that is $s = {target}/\sqrt{{{pinv_square / 2:.3f}}} = "
        f"{target / np.sqrt(pinv_square / 2):.4f}$.",
        rf"| noise | $\varepsilon = 0$ | $\varepsilon = {exact(relative)}$ "
        r"| $\varepsilon = 0.25$ | $\varepsilon = 1$ |",
        *(
            f"| {name} | "
            + " | ".join(f"{100 * rmse(error(noises[name], eps)):.2f}" for eps in
                         (0, relative, 0.25, 1)) + " |"
            for name in ("strong", "weak")
        ),
        rf"| $I$ | $I/\sqrt{{{PIXELS.size}}}$ | search |",
        r"At $\varepsilon = 1$ the order is reversed.",
        f"With 28×28 pixels they differ by a factor of {exact(np.sqrt(28 * 28))}.",
        f"Divide the loss by 10, and every $\\lambda$ is divided by {exact(lam[0] / tenth[0])}.",
        rf"$\varepsilon = 0.01\,\lambda_{{\max}}$ moves with the loss. Here it is "
        f"${exact(relative)}$, and changes the answers by {dropped[0]} % and {dropped[1]} %.",
        *(
            f"| {name} | {100 * bound(noises[name]):.2f} | {100 * length(errors[name]):.2f} "
            f"| {exact(length(errors[name]) / bound(noises[name]))} |"
            for name in names
        ),
        f"reaches the first, ${size:.2f}/{exact(sigma[1])} = {size / sigma[1]:.2f}$.",
        rf"$I_{{\mathrm{{lb}}}} = {100 * bound(noises['strong']):.2f}$ and the RMSE is "
        f"{100 * rmse(errors['strong']):.2f}.",
        rf"If pixels are divided by 0.5, then $\sigma$ becomes {exact(half[0])} and "
        f"{exact(half[1])}, and the error doubles",
        *(
            f"| × {m} | {100 * m * rmse(errors['mixed']):.2f} "
            f"| {100 * rmse(search(m * mixed)):.2f} |"
            for m in (1, 3, 10)
        ),
        f"The noise ${vector(WASTED)}$, in hundredths, costs the match nothing, but the division "
        f"returns ${divided:.3f}$ for ${exact(PIXELS[0])}$.",
    ]  # fmt: skip


def test_every_number_of_the_example_is_recomputed():
    missing = [text for text in sentences() if PAGE.count(text) != 1]
    assert not missing, "not on the page exactly once:\n" + "\n".join(missing)


def test_no_other_number_is_on_the_page():
    rest = PAGE
    for text in sorted(sentences(), key=len, reverse=True):
        rest = rest.replace(text, " ")
    assert not re.findall(r".{30}\d[.]\d.{10}|.{30}\d %|\|\s*-?\d.{10}", rest)


# --- what the page says in words ----------------------------------------------------------------


def test_noises_have_one_length_and_lie_where_their_names_say():
    assert list(NOISES) == ["strong", "weak", "mixed"]
    assert {round(float(noise @ noise), 12) for noise in NOISES.values()} == {18.0}
    right = np.linalg.svd(jacobian())[2]
    for i, name in enumerate(("strong", "weak")):
        assert abs(right[i] @ NOISES[name]) == pytest.approx(length(NOISES[name]))
    assert right @ NOISES["mixed"] == pytest.approx(
        np.sign(right @ NOISES["mixed"]) * np.sqrt([4.5, 4.5, 9])
    )


def test_wasted_noise_leaves_the_best_match_at_the_private_picture():
    np.testing.assert_allclose(search(0.01 * WASTED), 0, atol=1e-8)


def test_slope_of_the_search_is_the_formulas():
    jac = jacobian()
    formula = np.linalg.solve(jac @ jac.T, jac)
    step = 1e-4
    slopes = [(search(step * row) - search(-step * row)) / (2 * step) for row in np.eye(3)]
    np.testing.assert_allclose(np.transpose(slopes), formula, atol=1e-5)


def test_bounds_hold_and_the_stated_ones_are_reached():
    sigma = np.linalg.svd(jacobian(), compute_uv=False)
    rng = np.random.default_rng(0)
    for noise in rng.normal(size=(200, 3)):
        plain = length(error(noise))
        assert bound(noise) <= plain * (1 + 1e-12) <= length(noise) / sigma[-1] * (1 + 1e-9)
        for eps in (0.01, 0.25, 1.0):
            damped = length(error(noise, eps))
            assert length(jacobian() @ noise) / (sigma[0] ** 2 + eps) <= damped * (1 + 1e-12)
            assert damped <= length(noise) / (2 * np.sqrt(eps)) * (1 + 1e-12)
            assert damped <= plain


def test_damping_reverses_the_order_and_a_smaller_loss_changes_nothing_undamped():
    weak, strong = NOISES["weak"], NOISES["strong"]
    assert rmse(error(weak)) == pytest.approx(3 * rmse(error(strong)))
    assert rmse(error(weak, 1.0)) < rmse(error(strong, 1.0))
    np.testing.assert_allclose(error(weak / 10, jac=jacobian(scale=0.1)), error(weak))
    np.testing.assert_allclose(error(weak, jac=jacobian(unit=0.5)), 2 * error(weak))


def test_noise_for_a_target_error_gives_that_error():
    draws = np.random.default_rng(1).normal(scale=0.1 / np.sqrt(20 / 9), size=(100_000, 3))
    errors = np.linalg.lstsq(jacobian().T, draws.T, rcond=None)[0]
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(0.1, rel=0.01)


# --- the drawing --------------------------------------------------------------------------------


def shapes(kind):
    tree = ElementTree.parse(DRAWING)
    return [node.attrib for node in tree.iter() if node.get("class") == kind]


def centre(shape):
    return np.array([float(shape["cx"]), float(shape["cy"])])


def drawing_frame():
    """Right singular vectors as drawn, noise length, points of the drawing per unit, centres."""
    (circle,), (ellipse,) = shapes("noise"), shapes("influence")
    strong, weak = (NOISES[name] / length(NOISES[name]) for name in ("strong", "weak"))
    size = 0.01 * length(NOISES["strong"])
    return strong, weak, size, float(circle["r"]) / size, centre(circle), centre(ellipse)


def on_paper(point):
    """Upwards is minus in a drawing."""
    return np.array([point[0], -point[1]])


def test_drawn_ellipses_have_the_predicted_axes():
    sigma = np.linalg.svd(jacobian(), compute_uv=False)
    _, _, size, scale, _, middle = drawing_frame()
    axes = {"influence": size / sigma, "bound": size * sigma / sigma[0] ** 2}
    for kind, (short, weak) in axes.items():
        (shape,) = shapes(kind)
        assert float(shape["rx"]) == pytest.approx(weak * scale, abs=0.02)
        assert float(shape["ry"]) == pytest.approx(short * scale, abs=0.02)
        angle, *around = (float(v) for v in re.findall(NUMBER, shape["transform"]))
        assert around == list(middle) == list(centre(shape))
        turned = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        np.testing.assert_allclose(turned, on_paper([1, -1]) / np.sqrt(2), atol=1e-9)


def test_drawn_dots_are_found_by_the_search():
    strong, weak, size, scale, _, middle = drawing_frame()
    dots = shapes("match")
    assert len(dots) == 24
    for dot, angle in zip(dots, 2 * np.pi * np.arange(24) / 24, strict=True):
        moved = search(size * (np.cos(angle) * weak + np.sin(angle) * strong))
        np.testing.assert_allclose(centre(dot), middle + scale * on_paper(moved), atol=0.02)


def test_drawn_arrows_are_the_three_noises_and_their_errors():
    strong, weak, _, scale, start, middle = drawing_frame()
    wanted = []
    for noise in NOISES.values():
        flat = 0.01 * np.array([noise @ weak, noise @ strong])
        wanted += [[start, flat], [middle, error(0.01 * noise)]]
    drawn = [re.findall(NUMBER, shape["d"]) for shape in shapes("arrow")]
    for numbers, (origin, tip) in zip(drawn, wanted, strict=True):
        values = np.array([float(v) for v in numbers]).reshape(2, 2)
        np.testing.assert_allclose(values[0], origin, atol=1e-9)
        np.testing.assert_allclose(values[1], origin + scale * on_paper(tip), atol=0.02)
