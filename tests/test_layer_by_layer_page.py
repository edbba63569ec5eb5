"""Every number of the page on the hybrid attack, recomputed from the network that the page states.

Autograd gives the gradients and both halves of the system, singular values the ranks; the attack
itself gives the pictures that come back. The page's sentences and table rows are written again
from these, so a number that is changed on either side is not found.
"""

import re
from collections import OrderedDict
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leaklib.attacks import Correction, hybrid
from leaklib.attacks.hybrid import PUBLISHED
from leaklib.data import Victims
from leaklib.gradients import share_gradient
from leaklib.layer_system import Geometry, LayerSystem
from leaklib.layer_system.split import solve_split
from leaklib.models import Normalise, build
from leaklib.models.copa_networks import PLANS
from leaklib.rank import generic_rank, rank_analysis, security_index, singular_rank

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGE = " ".join((BOOK / "layer_by_layer.md").read_text(encoding="utf-8").split())
ROWS, ANSWERS = BOOK / "_static" / "layer_rows.svg", BOOK / "_static" / "layer_answers.svg"
DTYPE = torch.float64
SHAPE = (1, 4, 4)

# What the page says of its own runs.
STEPS, RATE, SMALL_TV = 300, 0.01, 0.1


# --- what the page states -----------------------------------------------------------------------


def stated(label):
    """Matrices of a labelled equation."""
    body = re.search(rf":label: {label} (.*?)```", PAGE).group(1)
    return [
        torch.tensor(
            [[float(v) for v in row.split("&")] for row in matrix.split(r"\\")], dtype=DTYPE
        )
        for matrix in re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", body)
    ]


PICTURE, FILTER, DENSE = stated("layer-picture")
SECOND, SECOND_DENSE = stated("layer-second")
SLOPE = float(re.search(r"negative by (0\.\d+), and a dense", PAGE).group(1))
SHIFT = float(re.search(r"the network sees \$x = p - (0\.\d+)\$", PAGE).group(1))
X = PICTURE - SHIFT


# --- the network, by autograd -------------------------------------------------------------------


@cache
def passing(count):
    """Model, released gradients, z and k = ∂L/∂z (filters, 2, 2), with one filter or two."""
    filters = torch.stack([FILTER, SECOND][:count])[:, None]
    dense = torch.cat([DENSE[0], SECOND_DENSE[0]][:count])
    model = nn.Sequential(OrderedDict(
        normalise=Normalise((SHIFT,), (1.0,)).to(DTYPE),
        conv=nn.Conv2d(1, count, 3, bias=False, dtype=DTYPE),
        act=nn.LeakyReLU(SLOPE), flatten=nn.Flatten(),
        fc=nn.Linear(len(dense), 2, dtype=DTYPE),
    )).eval()  # fmt: skip
    z = F.conv2d(X[None, None], filters)
    half = dense @ F.leaky_relu(z, SLOPE).flatten()
    with torch.no_grad():
        model.conv.weight.copy_(filters)
        model.fc.weight.copy_(torch.stack([-dense, dense]))
        model.fc.bias.copy_(torch.stack([half, -half]))  # both logits are 0
    z.requires_grad_()
    loss = F.cross_entropy(model.fc(F.leaky_relu(z, SLOPE).flatten(1)), torch.tensor([0]))
    k = torch.autograd.grad(loss, z)[0][0]
    victims = Victims(PICTURE[None, None, None], torch.tensor([[0]]))
    return model, share_gradient(model, victims), z.detach()[0], k


def system_rows(count):
    """U = [W; K] as the Jacobian of (z, ∂L/∂W) in the picture, with k held, and its height of W."""
    model, _, _, k = passing(count)

    def both(x):
        taps = model.conv.weight.detach().clone().requires_grad_()
        z = F.conv2d(x.view(1, *SHAPE), taps)
        grad = torch.autograd.grad((k * z).sum(), taps, create_graph=True)[0]
        return torch.cat([z.flatten(), grad.flatten()])

    rows = torch.autograd.functional.jacobian(both, torch.zeros(16, dtype=DTYPE))
    return rows, k.numel()


@cache
def answer(count, tv=None, prior="none"):
    """What `hybrid` gives back; `tv` weighs the prior of a correction, None: no correction."""
    model, shared, _, _ = passing(count)
    first = PUBLISHED[0]
    steps = 0 if tv is None else STEPS
    weights = Correction(first.cosine, tv or 0.0, first.system, steps)
    found = hybrid(
        model, shared, image_shape=SHAPE, corrections=[weights], lr=RATE, image_prior=prior
    )
    return found.images[0, 0, 0]


def off(picture):
    return float((picture - PICTURE).square().mean().sqrt())


def objective_terms(count, picture):
    """The weighted terms of J at a picture: matching, total variation, equations."""
    model, shared, z, _ = passing(count)
    weights = PUBLISHED[0]
    loss = F.cross_entropy(model(picture[None, None]), torch.tensor([0]))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    cosines = [
        F.cosine_similarity(grad.flatten(), shared.tensors[name][0].flatten(), dim=0)
        for grad, name in zip(grads, names, strict=True)
    ]
    variation = picture.diff(dim=0).abs().mean() + picture.diff(dim=1).abs().mean()
    rows, _ = system_rows(count)
    known = torch.cat([z.flatten(), shared.tensors["conv.weight"].flatten()])
    wrong = rows @ (picture - SHIFT).flatten() - known
    terms = [
        weights.cosine * sum(1 - c for c in cosines), weights.tv * variation,
        weights.system * wrong.square().sum(),
    ]  # fmt: skip
    return [float(term) for term in terms]


def hidden_directions(count):
    """Orthonormal directions that no row sees, as columns."""
    rows, _ = system_rows(count)
    _, values, directions = torch.linalg.svd(rows)
    return directions[int((values > 1e-10).sum()) :].T


# --- counting -----------------------------------------------------------------------------------


def closed_form(geometry):
    """The page's formula: seen, weight rows, gradient rows, repeats, rank."""
    channels = geometry.input_shape[0]
    seen = channels * len(pixels_in_windows(geometry))
    filters, taps = geometry.filters, channels * geometry.kernel[0] * geometry.kernel[1]
    weight, gradient = filters * geometry.positions, filters * taps
    return seen, weight, gradient, filters**2, min(seen, weight + gradient - filters**2)


def pixels_in_windows(geometry):
    one = [
        {
            o * stride + t - padding
            for o in range(out) for t in range(kernel)
            if 0 <= o * stride + t - padding < side
        }
        for side, kernel, stride, padding, out in zip(
            geometry.input_shape[1:], geometry.kernel, geometry.stride, geometry.padding,
            geometry.output_shape[1:], strict=True,
        )
    ]  # fmt: skip
    return {(i, j) for i in one[0] for j in one[1]}


LAYERS = [(1, 3, 1), (2, 3, 1), (1, 3, 2), (1, 2, 2), (2, 2, 2), (4, 2, 2)]
WORDS = {1: "one", 2: "two", 4: "four"}


def geometry_of(filters, kernel, stride):
    return Geometry(SHAPE, filters, (kernel, kernel), stride=(stride, stride))


@cache
def copa_geometries():
    found = []
    for plan in PLANS.values():
        channels, side = 3, 32
        for filters, kernel, stride, padding in plan.layers:
            found.append(
                Geometry(
                    (channels, side, side), filters, (kernel, kernel), stride=(stride, stride),
                    padding=(padding, padding),
                )
            )  # fmt: skip
            channels, side = found[-1].output_shape[:2]
    return found


# --- the page, written again --------------------------------------------------------------------


def exact(value):
    """A number that the page gives exactly."""
    text = f"{round(float(value), 9) + 0.0:.5g}"
    assert float(text) == pytest.approx(float(value), abs=1e-9), f"{value} is not {text}"
    return text


def minus(text):
    return text.replace("-", "−")


def vector(values):
    return f"({', '.join(exact(v) for v in np.ravel(values))})"


def example_sentences():
    _, shared, z, k = passing(1)
    head, step = shared.tensors["fc.weight"][0], shared.tensors["fc.bias"][0]
    inputs = F.leaky_relu(z, SLOPE).flatten()
    gains = SLOPE + (1 - SLOPE) * (z > 0).to(DTYPE)
    torch.testing.assert_close(head[0] / step[0], inputs)
    torch.testing.assert_close(k, DENSE.view(1, 2, 2) * gains)
    size, (height, width) = PICTURE.numel(), PICTURE.shape
    return [
        f"The picture has {size} pixels. A filter of 3×3 weights meets it at {z.numel()} "
        f"positions, LeakyReLU multiplies what is negative by {exact(SLOPE)}, and",
        f"the network sees $x = p - {exact(SHIFT)}$.",
        rf"so $\partial L/\partial b_D = {vector(step)}$.",
        f"is ${vector(head[0])}$. Divided by ${exact(step[0])}$ it is ${vector(inputs)}$.",
        rf"$z = {vector(z)}$, and $\varphi'(z) = {vector(gains)}$.",
        f"The dense rows give ${exact(step[1])}a + {exact(-step[0])}a = a$, and so "
        f"$k = {vector(k)}$.",
        f"For a picture of {height}×{width} pixels:",
    ]  # fmt: skip


def matrix_sentences():
    """Matrices are read from the page and so cannot differ; they only have to be on it once."""
    found = []
    for label in ("layer-picture", "layer-second"):
        found.append(re.search(rf":label: {label} .*?```", PAGE).group())
    return found


def count_sentences():
    rows, found = [], []
    for filters, kernel, stride in LAYERS:
        geometry = geometry_of(filters, kernel, stride)
        seen, weight, gradient, twice, rank = closed_form(geometry)
        name = f"{WORDS[filters]} {kernel}×{kernel}" + f", stride {stride}" * (stride > 1)
        cells = (geometry.unknowns, seen, weight, gradient, twice, rank, rank - geometry.unknowns)
        rows.append(f"| {name} | {' | '.join(minus(str(cell)) for cell in cells)} |")
        found.append(sum(closed_form(geometry)[1:3]))
    more, repeats = found[1] - found[0], 2**2 - 1**2
    _, shared, z, k = passing(1)
    both = {
        exact((k * z).sum()), exact((FILTER * shared.tensors["conv.weight"][0, 0, 0]).sum())
    }  # fmt: skip
    (product,) = both
    return [
        *rows,
        f"A second filter adds {more} rows, but {repeats} of them are repeats.",
        f"For the {len(copa_geometries())} convolutions",
        f"both sides are ${product}$.",
    ]


def missing_sentences():
    rows, _ = system_rows(1)
    rank, hidden = int(torch.linalg.matrix_rank(rows)), hidden_directions(1)
    kept = answer(1) - SHIFT
    lost = X - kept
    assert float(kept.square().sum() + lost.square().sum()) == pytest.approx(X.square().sum())
    black = float((hidden @ (hidden.T @ PICTURE.flatten())).square().mean().sqrt())
    small, large = off(answer(1)), off(answer(1, PUBLISHED[0].tv))
    smooth, spoiled = off(answer(1, prior="null space")), off(answer(2, PUBLISHED[0].tv))
    return [
        f"Many pictures obey the {rank} equations. They differ along {hidden.shape[1]} hidden",
        f"the equations alone are off by {small:.2f}, the published correction by {large:.2f}, the "
        f"smoothest picture that obeys them by {smooth:.3f}. With two filters, the equations "
        f"alone are exact, the published correction is off by {spoiled:.2f}.",
        f"Of the squared length {exact(X.square().sum())}, {kept.square().sum():.2f} comes back "
        f"and {lost.square().sum():.2f} is lost.",
        f"Had 0 been black, the picture would be off by {black:.2f}, not {small:.2f}.",
        f"{large:.2f} is better than {small:.2f}, and far from {smooth:.3f}.",
    ]  # fmt: skip


def correction_sentences():
    names = ("next to the picture", "the one behind it", "all others")
    found = answer(2, PUBLISHED[0].tv)
    truth, ended = objective_terms(2, PICTURE), objective_terms(2, found)
    table = [
        f"| {name} | " + " | ".join("0" if abs(v) < 1e-9 else f"{v:.4f}" for v in pair) + " |"
        for name, *pair in [
            *zip(("matching", "total variation", "equations"), truth, ended, strict=True),
            ("sum", sum(truth), sum(ended)),
        ]
    ]
    dark, bright = (v == PICTURE for v in (PICTURE.min(), PICTURE.max()))
    return [
        "Adam, at a rate of 0.001,",
        *(
            f"| {name} | {exact(c.cosine)} | {exact(c.tv)} | {exact(c.system)} | {c.steps} |"
            for name, c in zip(names, PUBLISHED, strict=True)
        ),
        *table,
        f"dark {exact(PICTURE.min())} becomes {found[dark].mean():.2f}, bright "
        f"{exact(PICTURE.max())} becomes {found[bright].mean():.2f}.",
        f"With {exact(SMALL_TV)} in place of {exact(PUBLISHED[0].tv)}, the picture is off by "
        f"{off(answer(2, SMALL_TV)):.3f}.",
        f"We ran {STEPS} steps at a rate of {exact(RATE)}, which is enough for 16 pixels.",
    ]  # fmt: skip


def index_sentences():
    rows = []
    for name in ("cnn2_c1", "cnn2_c2", "cnn3_c1", "cnn3_c2"):
        report = rank_analysis(build(name), (3, 32, 32))
        depth = len(report.deficits)
        terms = [(depth - i) / depth * deficit for i, deficit in enumerate(report.deficits)]
        index = security_index(report.deficits, rounding="published")
        cells = [
            ", ".join(map(str, report.deficits)), ", ".join(map(exact, terms)), exact(index),
            f"{report.normalised_index:.2f}",
        ]  # fmt: skip
        rows.append(minus(f"| {name} | {' | '.join(cells)} |"))
    one = closed_form(geometry_of(1, 3, 1))[-1] - 16
    return [*rows, f"Our one filter has $c = {one}$,"]


@cache
def sentences():
    """Every piece of the page that shows a number of an example."""
    parts = [
        *example_sentences(), *matrix_sentences(), *count_sentences(), *missing_sentences(),
        *correction_sentences(), *index_sentences(),
    ]  # fmt: skip
    return [part for part in parts if part]


def test_every_number_of_the_examples_is_recomputed():
    missing = [text for text in sentences() if PAGE.count(text) != 1]
    assert not missing, "not on the page exactly once:\n" + "\n".join(missing)


def test_no_other_number_is_on_the_page():
    rest = re.sub(r"\]\(https?://[^)]*\)", "]", PAGE)
    for text in sorted(sentences(), key=len, reverse=True):
        rest = rest.replace(text, " ")
    decimals, large, cells_ = r"\d[.]\d", r"(?<![\w.])\d{2,}", r"\|\s*[-−]?\d"
    assert not re.findall(rf".{{30}}(?:{decimals}|{large}|\d %|{cells_}).{{10}}", rest)


# --- what the page says in words ----------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_closed_form_is_the_rank_of_the_table_s_layers(layer):
    geometry = geometry_of(*layer)
    rng = torch.Generator().manual_seed(0)
    w, k = (
        torch.randn(shape, generator=rng, dtype=DTYPE)
        for shape in (geometry.weight_shape, geometry.output_shape)
    )
    assert int(singular_rank(geometry, w, k).rank) == closed_form(geometry)[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_example_has_the_generic_rank(count):
    rows, _ = system_rows(count)
    model, _, _, k = passing(count)
    geometry = geometry_of(count, 3, 1)
    rank = closed_form(geometry)[-1]
    assert int(torch.linalg.matrix_rank(rows)) == rank
    assert int(singular_rank(geometry, model.conv.weight, k).rank) == rank
    assert rank == generic_rank(geometry).rank


def test_library_s_rows_are_autograd_s():
    rows, _ = system_rows(2)
    model, _, _, k = passing(2)
    system = LayerSystem(
        geometry_of(2, 3, 1), model.conv.weight.detach(), k[None], torch.ones(1, dtype=DTYPE)
    )
    weight, gradient = system.rows(X.view(1, *SHAPE))
    ours = torch.cat([weight.flatten(), gradient.flatten()])
    torch.testing.assert_close(ours, rows @ X.flatten())


def test_closed_form_agrees_for_every_network_and_fails_where_the_page_says():
    for geometry in copa_geometries():
        assert closed_form(geometry)[-1] == generic_rank(geometry).rank, geometry
    # Five filters of four weights at four positions: 24 repeats, not 25.
    five = geometry_of(5, 2, 2)
    assert closed_form(five)[-1] < generic_rank(five).rank == 16
    # CNN6-d's second layer: rows crowd.
    crowded = Geometry((12, 17, 17), 20, (3, 3), stride=(2, 2), padding=(1, 1))
    assert closed_form(crowded)[-1] > generic_rank(crowded).rank


def test_repeats_hold_for_each_pair_of_filters():
    model, shared, z, k = passing(2)
    filters, grads = model.conv.weight.detach()[:, 0], shared.tensors["conv.weight"][0, :, 0]
    left = torch.einsum("gij,fij->fg", k, z)
    torch.testing.assert_close(left, torch.einsum("fij,gij->fg", filters, grads))


def test_minimum_norm_is_the_picture_without_its_hidden_part():
    hidden = hidden_directions(1)
    without = X.flatten() - hidden @ (hidden.T @ X.flatten())
    torch.testing.assert_close(answer(1).flatten() - SHIFT, without, atol=1e-9, rtol=0)
    assert off(answer(2)) < 1e-12
    model, shared, z, k = passing(1)
    part = solve_split(
        geometry_of(1, 3, 1), model.conv.weight.detach(), z, k, shared.tensors["conv.weight"][0, 0],
        null_space=True,
    )  # fmt: skip
    torch.testing.assert_close(part.null_space @ part.null_space.T, hidden @ hidden.T)


def test_smoothest_picture_obeys_the_equations_and_has_less_variation_than_the_others():
    rows, _ = system_rows(1)
    smooth, plain = answer(1, prior="null space"), answer(1)
    wrong = rows @ (smooth - plain).flatten()
    assert float(wrong.abs().max()) < 1e-9
    assert ((smooth > -0.01) & (smooth < 1.01)).all()
    assert objective_terms(1, smooth)[1] < objective_terms(1, plain)[1]


def test_prior_alone_moves_the_exact_answer():
    """Along less contrast matching and equations rise with the square, variation falls at once."""
    grey = X.mean() + SHIFT
    private = objective_terms(2, PICTURE)
    for step in (1e-3, 1e-4):
        duller = objective_terms(2, PICTURE + step * (grey - PICTURE))
        change = [b - a for a, b in zip(private, duller, strict=True)]
        assert change[1] == pytest.approx(-step * private[1])
        assert 0 < change[0] + change[2] < 10 * step**2
    model, shared, _, _ = passing(2)
    kept = hybrid(
        model, shared, image_shape=SHAPE, corrections=[Correction(1, 1, 0.05, 5)], skip_exact=True
    )
    assert off(kept.images[0, 0, 0]) < 1e-12


def test_normalised_index_turns_the_order():
    one, two = (rank_analysis(build(name), (3, 32, 32)) for name in ("cnn3_c1", "cnn3_c2"))
    assert one.index < two.index
    assert one.normalised_index > two.normalised_index


# --- the drawings -------------------------------------------------------------------------------


def nodes(drawing, kind):
    return [node for node in ElementTree.parse(drawing).iter() if node.get("class") == kind]


def colour(node):
    fill = node.get("fill")
    return [int(fill[i : i + 2], 16) for i in (1, 3, 5)]


def test_drawn_rows_are_the_system_and_their_colours_its_signs():
    rows, height = system_rows(1)
    _, shared, z, k = passing(1)
    drawn = [*nodes(ROWS, "weight-row"), *nodes(ROWS, "gradient-row")]
    assert len(nodes(ROWS, "weight-row")) == 16 * height
    for node, value in zip(drawn, rows.flatten().tolist(), strict=True):
        assert float(node.get("data-value")) == pytest.approx(value, abs=1e-9)
        red, _, blue = colour(node)
        assert np.sign(blue - red) == np.sign(round(value, 9)), node.attrib
    left = [float(node.get("x")) for node in drawn[:16]]
    assert left == sorted(left)
    known = torch.cat([z.flatten(), shared.tensors["conv.weight"].flatten()]).tolist()
    assert [node.text for node in nodes(ROWS, "v")] == [minus(exact(v)) for v in known]
    for kind, values in (("picture", PICTURE), ("filter", FILTER), ("k", k)):
        texts = [node.text for node in nodes(ROWS, kind) if node.text]
        assert texts == [minus(exact(v)) for v in values.flatten()], kind
    words = " ".join(ElementTree.parse(ROWS).getroot().itertext())
    assert f"{len(rows)} rows, one of them said twice: {len(rows) - 1} equations" in words
    assert f"for {rows.shape[1]} pixels. {rows.shape[1] - len(rows) + 1} are missing." in words


def test_drawn_answers_are_those_of_the_attack():
    pictures = {
        "private": PICTURE, "one min": answer(1), "one corrected": answer(1, PUBLISHED[0].tv),
        "one smooth": answer(1, prior="null space"), "two min": answer(2),
        "two corrected": answer(2, PUBLISHED[0].tv),
    }  # fmt: skip
    for name, picture in pictures.items():
        cells = nodes(ANSWERS, name)
        shown = np.array([float(node.get("data-value")) for node in cells])
        np.testing.assert_allclose(shown, picture.flatten(), atol=0.004, err_msg=name)
        greys = np.array([colour(node) for node in cells]) / 255
        np.testing.assert_allclose(greys, np.tile(shown[:, None], 3).clip(0, 1), atol=0.003)
        if name != "private":
            (label,) = nodes(ANSWERS, f"off {name}")
            value = off(picture)
            text = "exact" if value < 1e-9 else f"off by {value:.{2 if value > 0.005 else 3}f}"
            assert label.text == text
