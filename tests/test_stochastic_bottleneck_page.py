"""Every number of the page on stochastic bottlenecks, from its stated network by autograd.

The page goes forwards and back by hand; here it is plain torch. The noisy outer products are drawn
and decomposed again. The page's sentences and table rows are written again from these, so a number
that is changed on either side is not found.
"""

import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGE = " ".join((BOOK / "stochastic_bottleneck.md").read_text(encoding="utf-8").split())
OTHER = " ".join((BOOK / "layer_by_layer.md").read_text(encoding="utf-8").split())
DRAWING = BOOK / "_static" / "bottleneck.svg"
DTYPE = torch.float64
LAYERS = ("layer 1", "encoder", "decoder", "last layer")


# --- the network that the page states -----------------------------------------------------------


def matrices(text, label):
    body = re.search(rf":label: {label} (.*?)```", text).group(1)
    return [
        torch.tensor(
            [[float(v) for v in row.split("&")] for row in matrix.split(r"\\")], dtype=DTYPE
        )
        for matrix in re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", body)
    ]


PIXELS, W1, B1, WE, WD = matrices(PAGE, "bottleneck-network")
X = PIXELS[0]
DRAWS = (1.0, -1.0)


def parameters():
    """Weight and bias of each layer; the last one is the identity, unstated biases are 0."""
    values = [
        (W1, B1[0]), (WE, torch.zeros(2)), (WD, torch.zeros(2)), (torch.eye(2), torch.zeros(2)),
    ]  # fmt: skip
    return [tuple(v.to(DTYPE).clone().requires_grad_() for v in pair) for pair in values]


def passing(noise, picture=X, kl_weight=0.0):
    """Every number of a pass, and the gradients (weight, bias) of each layer."""
    layers = parameters()
    (w1, b1), (we, be), (wd, bd), (wu, bu) = layers
    h = torch.relu(w1 @ picture + b1)
    mean, raw = (we @ h + be).unbind()
    width = F.softplus(raw)
    sample = mean + noise * width
    decoded = wd @ sample[None] + bd
    logits = wu @ decoded + bu
    loss = F.cross_entropy(logits[None], torch.tensor([0]))
    kl = -0.5 * (1 + 2 * torch.log(width) - mean**2 - width**2) / np.log(2)
    grads = torch.autograd.grad(loss + kl_weight * kl, [p for pair in layers for p in pair])
    seen = {
        "h": h, "mu": mean, "r": raw, "sigma": width, "t": sample, "decoded": decoded,
        "q": logits.softmax(0)[1],
    }  # fmt: skip
    inputs = dict(zip(LAYERS, (picture, h, sample[None], decoded), strict=True))
    grads = dict(zip(LAYERS, zip(grads[::2], grads[1::2], strict=True), strict=True))
    detached = {name: value.detach() for name, value in seen.items()}
    return detached, {name: value.detach() for name, value in inputs.items()}, grads


def flat(grads, layers=LAYERS, biases=True):
    parts = [part for name in layers for part in grads[name][: 2 if biases else 1]]
    return torch.cat([part.flatten() for part in parts])


def cosine(a, b, **which):
    return float(F.cosine_similarity(flat(a, **which), flat(b, **which), dim=0))


def cost(picture, layers=LAYERS):
    """What the attacker's draw −1 makes of a picture, where the client's was 1."""
    private, tried = passing(DRAWS[0])[2], passing(DRAWS[1], picture)[2]
    return 1 - cosine(private, tried, layers=layers)


# --- the noisy outer product --------------------------------------------------------------------


PICTURE = matrices(OTHER, "layer-picture")[0].flatten().numpy()
ENTRY, NOISE, TRIALS, ROWS = 0.1, 0.02, 200, (1, 4, 16, 64, 256)


@cache
def errors():
    """Root mean squares of one row, of the best direction and of the formula."""
    rng = np.random.default_rng(0)
    table = []
    for rows in ROWS:
        one, best = [], []
        for _ in range(TRIALS):
            k = ENTRY * rng.choice([-1, 1], size=rows)
            noisy = np.outer(k, np.append(PICTURE, 1)) + NOISE * rng.normal(size=(rows, 17))
            direction = np.linalg.svd(noisy)[2][0]
            row = noisy[np.abs(noisy[:, -1]).argmax()]
            best.append(np.mean((direction[:-1] / direction[-1] - PICTURE) ** 2))
            one.append(np.mean((row[:-1] / row[-1] - PICTURE) ** 2))
        formula = NOISE / (ENTRY * rows**0.5) * (1 + np.mean(PICTURE**2)) ** 0.5
        table.append((np.mean(one) ** 0.5, np.mean(best) ** 0.5, formula))
    return np.array(table).T


# --- the page, written again --------------------------------------------------------------------


def number(value, digits=4):
    """Exact if it is short, else with four digits."""
    value = float(value)
    text = f"{round(value, 9) + 0.0:.4g}"
    return text if abs(float(text) - value) < 1e-9 else f"{value:.{digits}f}"


def listed(values):
    return ", ".join(number(v) for v in np.ravel(values))


def minus(text):
    return text.replace("-", "−")


def forward_sentences():
    seen = [passing(noise)[0] for noise in DRAWS]
    lines = [
        ("$h$", ["h"]), (r"$\mu$, $r$", ["mu", "r"]), (r"$\sigma$", ["sigma"]), ("$t$", ["t"]),
        (r"$\hat h$, the logits", ["decoded"]), ("$q$, the wrong class", ["q"]),
    ]  # fmt: skip
    table = [
        f"| {name} | "
        + " | ".join(minus(", ".join(listed(part[key]) for key in keys)) for part in seen)
        + " |"
        for name, keys in lines
    ]
    block = re.search(r":label: bottleneck-network .*?```", PAGE).group()
    return [*table, block, rf"**Forwards**, with $\epsilon = {number(DRAWS[0])}$"]


def backward_sentences():
    table, bent, half = [], [], torch.sigmoid(passing(1.0)[0]["r"])
    for noise in DRAWS:
        seen, _, grads = passing(noise)
        to_sample = -2 * seen["q"]
        assert float(grads["encoder"][1][0]) == pytest.approx(float(to_sample))
        assert float(grads["encoder"][1][1]) == pytest.approx(float(half * noise * to_sample))
        bent.append(f"k_t\\,({listed(grads['layer 1'][1] / to_sample)})")
    for layer in LAYERS:
        for noise in DRAWS:
            _, inputs, grads = passing(noise)
            cells = (layer, number(noise), listed(grads[layer][1]), listed(inputs[layer]))
            table.append(f"| {minus(' | '.join(cells))} |")
    through_mean, through_width = WE
    return [
        *table,
        rf"k_r = \epsilon\,\sigma'(r)\,k_t = {number(half)}\,\epsilon\,k_t$",
        rf"\bigl[ ({listed(through_mean)}) + {number(half)}\,\epsilon\,({listed(through_width)}) "
        r"\bigr]",
        rf"{bent[0]} & \epsilon = 1 \\ {bent[1]} & \epsilon = -1 .",
    ]  # fmt: skip


def search_sentences():
    first, second = passing(DRAWS[0])[2], passing(DRAWS[1])[2]
    rows = [
        (layer, cosine(first, second, layers=[layer], biases=False)) for layer in LAYERS
    ] + [("all weights and biases", cosine(first, second))]  # fmt: skip
    wrong, cheapest = torch.tensor([1.0, 0.38], dtype=DTYPE), cheapest_picture()
    with_encoder = cosine(first, second, layers=LAYERS[:2])
    return [
        *(minus(f"| {name} | {value:.2f} |") for name, value in rows),
        f"the right answer costs {cost(X):.2f}, and a wrong picture costs less: for "
        f"$({listed(wrong)})$ it is {cost(wrong):.2f}.",
        f"the private picture costs {cost(X, LAYERS[:1]):.2f}. The cheapest one is "
        f"$({listed(cheapest)})$:",
        f"Here that makes a cosine of {with_encoder:.2f}.",
    ]  # fmt: skip


@cache
def cheapest_picture():
    """Of all pictures in hundredths, by layer 1 alone: [k; 1] and [x; 1] without autograd."""
    steps = torch.linspace(0, 1, 101, dtype=DTYPE)
    at = torch.cartesian_prod(steps, steps)
    z = at @ W1.T + B1
    raw = torch.relu(z) @ WE[1]
    # Along k_t, whose length and sign a cosine does not see but for −1: q > 0 keeps it negative.
    k = -(WE[0] + DRAWS[1] * torch.sigmoid(raw)[:, None] * WE[1]) * (z > 0)
    private = passing(DRAWS[0])[2]["layer 1"][1]
    one = torch.ones(1, dtype=DTYPE)
    inputs = torch.cat([at, one.expand(len(at), 1)], 1)
    match = F.cosine_similarity(k, private[None]) * F.cosine_similarity(
        inputs, torch.cat([X, one])[None]
    )
    return at[match.argmax()]


def division_sentences():
    lines = []
    for noise in DRAWS:
        weight, bias = passing(noise)[2]["layer 1"]
        shown = r",\ ".join(f"{v:.4f}" for v in weight[0])
        lines.append(
            rf"\epsilon = {number(noise)}: &\quad \frac{{({shown})}}{{{bias[0]:.4f}}} = "
            rf"({number(X[0])},\ {number(X[1])})"
        )
    weight, bias = passing(DRAWS[0])[2]["encoder"]
    h = weight[0] / bias[0]
    picture = torch.linalg.solve(W1, h - B1[0])
    torch.testing.assert_close(picture, X)
    return [
        rf"{lines[0]} \\ {lines[1]} .",
        rf"\frac{{({weight[0, 0]:.4f},\ {weight[0, 1]:.4f})}}{{{bias[0]:.4f}}} = "
        rf"({number(h[0])},\ {number(h[1])}) = h .",
        f"$W_1^{{-1}}(h - b_1) = ({listed(picture)})$ is the picture",
    ]


def outer_sentences():
    names = ("one row, the one with the largest bias entry", "best direction", "by the formula")
    units, colours, side = 1024, 3, 32
    factor = (units * (colours * side**2 + 1)) ** 0.25
    return [
        f"the picture of {len(PICTURE)} pixels",
        rf"$k_1$ with entries $\pm {number(ENTRY)}$, and noise of {number(NOISE)}. The root mean "
        f"square error per pixel, over {TRIALS} draws:",
        f"| rows | {' | '.join(map(str, ROWS))} |",
        *(
            f"| {name} | {' | '.join(f'{v:.2f}' for v in values)} |"
            for name, values in zip(names, errors(), strict=True)
        ),
        f"For {units} units and {colours * side**2} pixels that is a factor of {factor:.0f}:",
    ]  # fmt: skip


@cache
def sentences():
    """Every piece of the page that shows a number of an example."""
    return [
        *forward_sentences(), *backward_sentences(), *search_sentences(), *division_sentences(),
        *outer_sentences(),
    ]  # fmt: skip


def test_every_number_of_the_examples_is_recomputed():
    missing = [text for text in sentences() if PAGE.count(text) != 1]
    assert not missing, "not on the page exactly once:\n" + "\n".join(missing)


def test_no_other_number_is_on_the_page():
    rest = PAGE
    for text in sorted(sentences(), key=len, reverse=True):
        rest = rest.replace(text, " ")
    decimals, large, cells = r"\d[.]\d", r"(?<![\w.])\d{2,}", r"\|\s*[-−]?\d"
    assert not re.findall(rf".{{30}}(?:{decimals}|{large}|\d %|{cells}).{{10}}", rest)


# --- what the page says in words ----------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_every_gradient_is_k_times_the_input_and_only_early_inputs_are_fixed(kl_weight):
    ratios = {layer: [] for layer in LAYERS}
    for noise in np.random.default_rng(0).normal(size=5):
        _, inputs, grads = passing(float(noise), kl_weight=kl_weight)
        for layer in LAYERS:
            weight, bias = grads[layer]
            torch.testing.assert_close(weight, torch.outer(bias, inputs[layer]))
            ratios[layer].append(weight[0] / bias[0])
    spread = {layer: float(torch.stack(values).std(0).max()) for layer, values in ratios.items()}
    assert max(spread["layer 1"], spread["encoder"]) < 1e-12, spread
    assert min(spread["decoder"], spread["last layer"]) > 0.1, spread
    torch.testing.assert_close(ratios["layer 1"][0], X)


def test_kl_term_adds_the_same_to_k_at_every_draw():
    for layer in ("layer 1", "encoder"):
        added = [
            passing(noise, kl_weight=0.3)[2][layer][1] - passing(noise)[2][layer][1]
            for noise in (1.0, -1.0, 0.4)
        ]
        torch.testing.assert_close(added[0], added[1])
        torch.testing.assert_close(added[0], added[2])
        assert float(added[0].abs().max()) > 0.01


def test_direction_of_the_first_k_depends_on_the_noise():
    one, two = (passing(noise)[2]["layer 1"][1] for noise in DRAWS)
    assert abs(float(F.cosine_similarity(one, two, dim=0))) < 0.99


def test_cheapest_picture_by_hand_is_no_dearer_by_autograd_than_its_neighbours():
    best = cheapest_picture()
    for step in (0.01, -0.01):
        for pixel in range(2):
            near = best.clone()
            near[pixel] += step
            assert cost(best, LAYERS[:1]) < cost(near, LAYERS[:1])
    wrong = torch.tensor([1.0, 0.38], dtype=DTYPE)
    assert cost(best, LAYERS[:1]) < cost(X, LAYERS[:1])
    assert torch.dist(best, X) < torch.dist(wrong, X)


def test_error_falls_with_the_root_of_the_rows_and_one_row_does_not_gain():
    one, best, formula = errors()
    np.testing.assert_allclose(best, formula, rtol=0.06)
    np.testing.assert_allclose(formula[1:] / formula[:-1], 0.5)
    assert one.min() > 0.8 * one[0]


def test_direction_is_lost_beyond_the_fourth_root():
    rng = np.random.default_rng(1)
    rows, columns = 300, 400
    k, x = rng.normal(size=rows), rng.uniform(size=columns)
    typical = np.sqrt(np.mean(np.outer(k, x) ** 2))
    found = []
    for share in (0.5, 2.0):
        noise = share * typical * (rows * columns) ** 0.25
        noisy = np.outer(k, x) + noise * rng.normal(size=(rows, columns))
        direction = np.linalg.svd(noisy)[2][0]
        found.append(abs(direction @ x) / np.linalg.norm(x))
    assert found[0] > 0.8 > 0.3 > found[1], found


def test_pruning_leaves_kept_pixels_exact():
    rng = np.random.default_rng(2)
    k = rng.normal(size=20)
    full = np.outer(k, np.append(PICTURE, 1))
    pruned = np.where(np.abs(full) >= np.quantile(np.abs(full), 0.7), full, 0)
    row = pruned[np.abs(pruned[:, -1]).argmax()]
    kept = row[:-1] != 0
    assert kept.any()
    np.testing.assert_allclose(row[:-1][kept] / row[-1], PICTURE[kept])


# --- the drawing --------------------------------------------------------------------------------


def test_drawing_says_what_is_random_dropped_and_perturbed():
    classes = [node.get("class") for node in ElementTree.parse(DRAWING).iter()]
    words = {node.get("class"): node.text for node in ElementTree.parse(DRAWING).iter()}
    one, two = (passing(noise)[1:] for noise in DRAWS)
    for layer in LAYERS:
        name = {"layer 1": "layer-1", "last layer": "head"}.get(layer, layer)
        same = torch.allclose(one[0][layer], two[0][layer])
        assert f"{name} input {'fixed' if same else 'random'}" in classes
        assert not torch.allclose(one[1][layer][1], two[1][layer][1])
        assert f"{name} k random" in classes
        before = layer == "layer 1"
        assert words[f"{name} dropped"] == ("no" if before else "yes")
        assert words[f"{name} perturbed"] == ("yes" if before else "no")


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("draw", DRAWS)
def test_the_draw_is_no_secret(draw, kl_weight):
    """Encoder's division gives h, decoder's t; μ and σ of h give the noise."""
    seen, _, grads = passing(draw, kl_weight=kl_weight)
    found = {}
    for name in ("encoder", "decoder"):
        weight, bias = grads[name]
        found[name] = weight.T @ bias / bias.square().sum()
    torch.testing.assert_close(found["encoder"], seen["h"])
    noise = (found["decoder"] - seen["mu"]) / seen["sigma"]
    torch.testing.assert_close(noise, torch.full_like(noise, float(draw)))
