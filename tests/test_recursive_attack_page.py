"""Every number of the page on the recursive attack, from its stated network by another route.

The page goes back layer by layer. Here autograd gives the gradients and both halves of each system,
bracketing gives the margins, and singular values give the ranks that the page counts. The sentences
and table rows of the page are written again from these; a number that is changed on either side is
not found on the page.
"""

import re
from functools import cache
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from scipy.special import lambertw

from leaklib import models
from leaklib.rank import rank_analysis

BOOK = Path(__file__).resolve().parents[1] / "book"
PAGE = " ".join((BOOK / "recursive_attack.md").read_text(encoding="utf-8").split())
RECURSION, TWINS = BOOK / "_static" / "recursion.svg", BOOK / "_static" / "twins.svg"
NUMBER = r"-?\d+(?:\.\d+)?"


# --- what the page states -----------------------------------------------------------------------


def stated_strip():
    """Picture, label and the three rows of weights."""
    body = re.search(r":label: rgap-strip (.*?)```", PAGE).group(1)
    rows = re.findall(r"\\begin\{bmatrix\} (.*?) \\end\{bmatrix\}", body)
    picture, *weights = ([float(v) for v in row.split("&")] for row in rows)
    return np.array(picture), float(re.search(r"y = (-?\d+)", body).group(1)), weights


PIXELS, LABEL, WEIGHTS = stated_strip()
SLOPE = float(re.search(rf"multiplies the rest by ({NUMBER})\.", PAGE).group(1))

# Filters, kernel, stride and padding of the released code's convolutions.
CNN6 = [(12, 4, 2, 2), (36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]
CNN6D = [CNN6[0], (20, *CNN6[1][1:]), *CNN6[2:]]
SIDE, COLOURS = 32, 3


# --- the strip, from its network alone ----------------------------------------------------------


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def slide(signal, taps, stride=1):
    return F.conv1d(signal.reshape(1, 1, -1), taps.reshape(1, 1, -1), stride=stride).flatten()


def passing(pixels, label=LABEL, slope=SLOPE, stride=None):
    """Every number of a pass forwards and back; with `stride`, of filter 1 and the dense layer."""
    taps = [tensor(w).requires_grad_() for w in (WEIGHTS if stride is None else WEIGHTS[::2])]
    signal, seen = tensor(pixels), {}
    for i, filter_taps in enumerate(taps[:-1], start=1):
        seen[f"x{i}"], seen[f"z{i}"] = signal, slide(signal, filter_taps, stride or 1)
        signal = F.leaky_relu(seen[f"z{i}"], slope)
    seen[f"x{len(taps)}"], seen["u"] = signal, taps[-1] @ signal
    seen["mu"] = label * seen["u"]
    loss = torch.log1p(torch.exp(-seen["mu"]))
    layers = [f"z{i}" for i in range(1, len(taps))]
    ks = torch.autograd.grad(loss, [*(seen[name] for name in layers), seen["u"]], retain_graph=True)
    grads = torch.autograd.grad(loss, taps)
    for i, (k, grad) in enumerate(zip(ks, grads, strict=True), start=1):
        seen[f"k{i}"], seen[f"g{i}"] = k, grad
    return {name: value.detach().numpy() for name, value in seen.items()}


def halves(taps, k, unknowns, stride=1):
    """Weight rows and gradient rows: derivatives of the layer and of its gradient in the input."""
    taps, k, at = tensor(taps), tensor(k), torch.zeros(unknowns, dtype=torch.float64)

    def gradient(signal):
        weights = taps.clone().requires_grad_()
        pulled = k @ slide(signal, weights, stride)
        return torch.autograd.grad(pulled, weights, create_graph=True)[0]

    jacobian = torch.autograd.functional.jacobian
    return jacobian(lambda x: slide(x, taps, stride), at).numpy(), jacobian(gradient, at).numpy()


def steepness(signal):
    return np.where(signal >= 0, 1.0, SLOPE)


def left_side(margin):
    """What the page calls τ, of a margin."""
    return margin / (1 + np.exp(margin))


@cache
def top():
    """Margin of the largest τ."""
    return float(minimize_scalar(lambda m: -left_side(m), bounds=(0, 5), options={"xatol": 1e-9}).x)


def margins(tau):
    if tau < 0:
        return [brentq(lambda m: left_side(m) - tau, -50, 0, xtol=1e-14)]
    return [brentq(lambda m: left_side(m) - tau, *ends, xtol=1e-14) for ends in
            ((0, top()), (top(), 60))]  # fmt: skip


def go_back(grads, label=LABEL, margin=None):
    """The recursion: gradients (g1, g2, g3) to the inputs (x1, x2, x3)."""
    if margin is None:
        (margin,) = margins(-grads[2] @ WEIGHTS[2])
    k_last = -label / (1 + np.exp(margin))
    found, k = [grads[2] / k_last], np.array(WEIGHTS[2]) * k_last
    for taps, grad in ((WEIGHTS[1], grads[1]), (WEIGHTS[0], grads[0])):
        k = k * steepness(found[0])
        weight, gradient = halves(taps, k, len(found[0]) + 1)
        known = np.concatenate([found[0] / steepness(found[0]), grad / k_last])
        rows = np.vstack([weight, gradient / k_last])
        k = weight.T @ k
        found.insert(0, np.linalg.lstsq(rows, known, rcond=None)[0])
    return found


def sent(seen):
    return [seen["g1"], seen["g2"], seen["g3"]]


def rmse(values):
    return float(np.sqrt(np.mean(np.square(values))))


# --- ranks of convolutions, by singular values --------------------------------------------------


def lay_out(layers):
    """(channels, side, filters, kernel, stride, padding, side of the output) of each layer."""
    channels, side, rows = COLOURS, SIDE, []
    for filters, kernel, stride, padding in layers:
        out = (side + 2 * padding - kernel) // stride + 1
        rows.append((channels, side, filters, kernel, stride, padding, out))
        channels, side = filters, out
    return rows


def sizes(channels, side, filters, kernel, stride, padding, out):
    """Unknowns, weight rows, gradient rows."""
    return channels * side**2, filters * out**2, filters * channels * kernel**2


def what_taps_see(side, kernel, stride, padding):
    """(pixel, tap, position): 1 where a tap meets a pixel."""
    units = torch.eye(side**2, dtype=torch.float64).reshape(-1, 1, side, side)
    return F.unfold(units, kernel, padding=padding, stride=stride)


@cache
def measured_ranks(layer, seed=0):
    """Rank of one channel's gradient rows, and of both halves, for random weights and k."""
    channels, side, filters, kernel, stride, padding, out = layer
    rng = torch.Generator().manual_seed(seed)
    seen = what_taps_see(side, kernel, stride, padding)
    k, w = (
        torch.randn(size, generator=rng, dtype=torch.float64)
        for size in ((filters, out**2), (filters, channels, kernel**2))
    )
    block = torch.einsum("ptm,fm->ftp", seen, k).flatten(0, 1)
    values, vectors = np.linalg.svd(block.numpy())[1:]
    rank = int((values > 1e-10 * values[0]).sum())
    if rank == side**2:
        return rank, channels * rank
    unseen = torch.einsum("np,ptm->ntm", tensor(vectors[rank:]), seen)
    rest = torch.einsum("fct,ntm->fmcn", w, unseen).flatten(2, 3).flatten(0, 1)
    return rank, channels * rank + int(np.linalg.matrix_rank(rest.numpy()))


def kinds(side, kernel, stride, padding, out):
    """(taps, pixels) of each kind of pixel."""
    lines = []
    for residue in range(stride):
        taps = [t for t in range(kernel) if t % stride == residue]
        met = {o * stride + t - padding for o in range(out) for t in taps}
        lines.append((len(taps), len(met & set(range(side)))))
    return [(ta * tb, pa * pb) for (ta, pa), (tb, pb) in product(lines, lines)]


def counted_ranks(layer):
    """The page's formula."""
    channels, side, filters, *rest = layer
    out, pixels = rest[-1], side**2
    rank = sum(min(filters * taps, met) for taps, met in kinds(side, *rest))
    more = filters * max(0, out**2 - filters)
    return rank, channels * rank + min(channels * (pixels - rank), more)


def index_of(deficits):
    depth = len(deficits)
    return sum((depth - i) / depth * deficit for i, deficit in enumerate(deficits))


# --- the page, written again --------------------------------------------------------------------


def exact(value):
    """A number that the page gives exactly."""
    text = f"{round(float(value), 9) + 0.0:.4g}"  # + 0.0: no minus zero
    assert float(text) == pytest.approx(value, abs=1e-9), f"{value} is not {text}"
    return text


def minus(text):
    return text.replace("-", "−")


def listed(values, digits=None):
    """As in a table."""
    texts = (exact(v) if digits is None else f"{v:.{digits}f}" for v in np.atleast_1d(values))
    return minus(", ".join(texts))


def vector(values, digits=None):
    return f"({listed(values, digits).replace('−', '-')})"


def matrix(values):
    return rf"\begin{{bmatrix}} {' & '.join(exact(v) for v in values)} \end{{bmatrix}}"


def system(weight, gradient, known):
    """Both halves, one above the other, with the right sides last."""
    table = np.column_stack([np.vstack([weight, gradient]), known])
    rows = [" & ".join(exact(v) for v in row) for row in table]
    above, below = r" \\ ".join(rows[: len(weight)]), r" \\ ".join(rows[len(weight) :])
    return (
        rf"\left[\begin{{array}}{{{'r' * weight.shape[1]}|r}} {above} \\ \hline {below} "
        r"\end{array}\right] ```"
    )


def line_of(weight, known, free):
    """Solutions of the weight rows as offset + slope · (one unknown)."""
    others = [i for i in range(weight.shape[1]) if i != free]
    offset, slope = np.zeros(weight.shape[1]), np.zeros(weight.shape[1])
    offset[others] = np.linalg.solve(weight[:, others], known)
    slope[others] = np.linalg.solve(weight[:, others], -weight[:, free])
    slope[free] = 1
    return offset, slope


def plus(value):
    return f"{'+' if value >= 0 else '-'} {exact(abs(value))}"


def strip_sentences():
    """The strip forwards and back."""
    seen = passing(PIXELS)
    k3 = float(seen["k3"])
    short = {name: seen[name] / k3 for name in ("g1", "g2", "g3", "k1", "k2")}
    tau = -float(seen["g3"] @ WEIGHTS[2])
    (mu,) = margins(tau)
    w1, w2, w3 = WEIGHTS
    weight2, gradient2 = halves(w2, short["k2"], 3)
    weight1, gradient1 = halves(w1, short["k1"], 4)
    offset2, slope2 = line_of(weight2, seen["z2"], 2)
    offset1, slope1 = line_of(weight1, seen["z1"], 1)
    assert list(slope1) == [1, 1, 1, 1]
    turned = weight2.T @ short["k2"]
    gains = [steepness(seen[f"z{i}"]) for i in (1, 2)]
    printed = go_back([np.round(grad, 4) for grad in sent(seen)])[0] - PIXELS
    row3, row4 = gradient2
    back = {i: go_back(sent(seen))[i - 1] for i in (1, 2, 3)}
    for i, found in back.items():
        np.testing.assert_allclose(found, seen[f"x{i}"], atol=1e-12)
    euler = {round(float(np.dot(short[f"g{i}"], WEIGHTS[i - 1])), 9) for i in (1, 2, 3)}
    assert len(euler) == 1
    return [
        f"The label $y$ is ${exact(LABEL)}$ or $+{exact(-LABEL)}$, the margin is",
        rf"x_1 &= {matrix(PIXELS)}, \quad y = {exact(LABEL)} \\ w_1 &= {matrix(w1)}, \quad "
        rf"w_2 = {matrix(w2)} \\ w_3 &= {matrix(w3)} \end{{aligned}} ```",
        f"multiplies the rest by {exact(SLOPE)}.",
        *(
            f"| ${name[0]}_{name[1]}${', private' * (name == 'x1')} | {listed(seen[name])} |"
            for name in ("x1", "z1", "x2", "z2", "x3")
        ),
        f"| logit $u$ | {listed(seen['u'])} |",
        rf"The margin is $\mu = {exact(mu)}$: the network is wrong",
        f"$k_3 = 1/(1 + e^{{{exact(mu)}}}) = {k3:.4f}$.",
        *(
            f"| $g_{i}$ | {listed(seen[f'g{i}'], 4)} | {listed(short[f'g{i}'])} |"
            for i in (3, 2, 1)
        ),
        rf"${seen['g3'][0]:.4f} \cdot {exact(w3[0])} + {-seen['g3'][1]:.4f} \cdot "
        rf"{exact(-w3[1])} = {-tau:.4f}$. Only $\mu = {exact(mu)}$ solves",
        rf"Here $-\tau e^{{\tau}} = {-tau * np.exp(tau):.4f}$ and "
        rf"$\mathcal{{W}}({-tau * np.exp(tau):.4f}) = {tau - mu:.4f}$, so $\mu = {tau:.4f} - "
        rf"{tau - mu:.4f} = {exact(mu)}$. And $k_3 = y L'(\mu) = {k3:.4f}$.",
        f"$x_3 = g_3/k_3 = {vector(back[3])}$.",
        f"A negative entry is divided by {exact(SLOPE)}, so $z_2 = {vector(seen['z2'])}$.",
        rf"$\varphi'(z_2) = {vector(gains[1])}$ needs only the signs.",
        rf"The weights ${vector(w3)}$, times these, give $k_2 = k_3 \cdot {vector(short['k2'])}$.",
        system(weight2, gradient2, np.concatenate([seen["z2"], short["g2"]])),
        f"$b = {exact(slope2[1])}c {plus(offset2[1])}$ and $a = {exact(-weight2[0, 1])}b "
        f"{plus(seen['z2'][0])} = {exact(slope2[0])}c {plus(offset2[0])}$.",
        f"${exact(row3 @ slope2)}c {plus(row3 @ offset2)} = {exact(short['g2'][0])}$, so "
        f"$c = {exact((short['g2'][0] - row3 @ offset2) / (row3 @ slope2))}$. "
        f"Then $x_2 = {vector(back[2])}$.",
        rf"${exact(row4[1])} \cdot ({exact(back[2][1])}) {plus(row4[2])} \cdot "
        rf"{exact(back[2][2])} = {exact(row4 @ back[2])}$.",
        rf"Again, $z_1 = {vector(seen['z1'])}$ and $\varphi'(z_1) = {vector(gains[0])}$.",
        rf"$W_2^{{\mathsf T}}k_2 = k_3 \cdot {vector(turned)}$. So $k_1 = k_3 \cdot "
        f"{vector(short['k1'])}$, and the system",
        system(weight1, gradient1, np.concatenate([seen["z1"], short["g1"]])),
        *(f"${name} = b {plus(offset1[i])}$" for i, name in ((0, "a"), (2, "c"), (3, "d"))),
        f"${exact(gradient1[0] @ slope1)}b {plus(gradient1[0] @ offset1)} = "
        f"{exact(short['g1'][0])}$, so $b = {exact(back[1][1])}$. The picture is "
        f"${vector(back[1])}$.",
        f"the worst pixel is off by {np.abs(printed).max():.4f}.",
        rf"$\langle g_i, w_i\rangle = {exact(euler.pop())}k_3$ in all three layers.",
    ]  # fmt: skip


def twin_sentences():
    other = passing(PIXELS, label=-LABEL)
    tau = -float(other["g3"] @ WEIGHTS[2])
    near, far = margins(tau)
    mine, twin = float(other["mu"]), near if far == pytest.approx(other["mu"]) else far
    (first,) = margins(-float(passing(PIXELS)["g3"] @ WEIGHTS[2]))
    wrong = go_back(sent(passing(PIXELS)), label=-LABEL, margin=first)[0]
    small = 0.001
    return [
        rf"Let the label be $+{exact(-LABEL)}$ now. The network is right, $\mu = {exact(mine)}$, "
        rf"and $k_3 = {other['k3']:.4f}$.",
        rf"with $\tau = {tau:.4f}$, has two solutions",
        f"rises to its top at {top():.2f} and falls. A level of {tau:.3f} meets it at {twin:.3f} "
        f"and at {exact(mine)}.",
        rf"gives $\mu = {exact(mine)}$ and $\tilde\mu = {twin:.4f}$.",
        rf"= {twin / mine:.4f}\,x_1 \\ &= {vector(twin / mine * PIXELS, 3)} \end{{aligned}} ```",
        rf"for $\tau$ up to {left_side(top()):.4f}. There both are $\mu = {top():.4f}$.",
        rf"For $\mu = {small}$ it is {margins(left_side(small))[1] / small:.0f} times as bright.",
        f"the first gradient gives the strip ${vector(wrong, 2)}$.",
    ]


K_SMALL = 0.001


def solve_one(k, times, wrong):
    """Error of one unknown with a weight row that is wrong and a gradient row that is right."""
    rows = np.array([[1.0], [times * k]])
    return float(np.linalg.lstsq(rows, np.array([wrong, 0.0]), rcond=None)[0][0])


def noisy_error(noise):
    grads = sent(passing(PIXELS))
    return rmse(go_back([grads[0], grads[1], grads[2] + [0, noise]])[0] - PIXELS)


def balance_and_noise_sentences():
    seen = passing(PIXELS)
    bad = seen["x2"][1] - 0.02
    wrong = seen["z1"][1] - bad / SLOPE
    scales, noises = (1, 1000, 10000), (0.001, 0.01, 0.1, 0.15, 0.16)
    first, second = PIXELS, np.array([0.2, 0.6, 0.1, 1.0])
    reacts = np.array([0.6, 0.2])
    mean = reacts @ np.stack([first, second]) / 2
    read = mean / reacts.mean()
    shares = np.linalg.lstsq(np.stack([first, second]).T, read, rcond=None)[0]
    before, after = (
        go_back([seen["g1"], seen["g2"], seen["g3"] + [0, noise]])[1] for noise in noises[-2:]
    )
    assert list(np.sign(before) == np.sign(seen["x2"])) == [True] * 3
    assert (np.sign(after) != np.sign(seen["x2"])).sum() == 1
    return [
        f"Let the entry ${exact(seen['x2'][1])}$ of $x_2$ come back as ${exact(bad)}$ by mistake.",
        f"multiplies it by {exact(1 / SLOPE)}: $z_1$ has ${exact(bad / SLOPE)}$ for "
        f"${exact(seen['z1'][1])}$.",
        f"may be multiplied by {exact(1 / SLOPE)} again",
        f"The weight row is wrong by {exact(wrong)}. The gradient row is right but small, "
        f"$k = {K_SMALL}$,",
        f"| gradient row multiplied by | {' | '.join(map(str, scales))} |",
        "| error of the unknown | "
        + " | ".join(f"{solve_one(K_SMALL, times, wrong):.4f}" for times in scales) + " |",
        f"strip ${vector(first)}$ with $k = {exact(reacts[0])}$ and to ${vector(second)}$ with "
        f"${exact(reacts[1])}$. Its mean gradient is ${vector(mean)}$. Divided by the mean $k = "
        f"{exact(reacts.mean())}$ it is ${vector(read)}$, which is ${exact(shares[0])}$ of the "
        f"first strip plus ${exact(shares[1])}$ of the second.",
        f"to the second entry of $g_3$, which is ${seen['g3'][1]:.4f}$,",
        f"| noise | {' | '.join(map(str, noises))} |",
        "| error | " + " | ".join(f"{noisy_error(noise):.4f}" for noise in noises) + " |",
        f"Between {noises[-2]} and {noises[-1]} an entry of $x_2$ changes its sign. One entry of "
        f"$k_1$ is then wrong by a factor of {exact(1 / SLOPE)},",
    ]  # fmt: skip


def strip_rank_rows():
    """Rows of the strips' table, and the deficits."""
    seen, strided = passing(PIXELS), passing(PIXELS, stride=2)
    cases = [
        ("filter 1", halves(WEIGHTS[0], seen["k1"] / seen["k3"], 4)),
        ("filter 2", halves(WEIGHTS[1], seen["k2"] / seen["k3"], 3)),
        ("filter 1, stride 2", halves(WEIGHTS[0], strided["k1"] / strided["k2"], 4, stride=2)),
    ]
    rows, deficits = [], []
    for name, (weight, gradient) in cases:
        n = weight.shape[1]
        rank = int(np.linalg.matrix_rank(np.vstack([weight, gradient])))
        total = len(weight) + len(gradient)
        assert rank == total - 1
        assert max(np.linalg.matrix_rank(weight), np.linalg.matrix_rank(gradient)) < n
        deficits.append(rank - n)
        rows.append(
            f"| {name} | {n} | {len(weight)} | {len(gradient)} | {total} | {rank} "
            f"| {minus(str(rank - n))} |"
        )
    return rows, deficits


LAYER_NAMES = {1: "", 2: ", stride 2"}
ENOUGH = ["weights alone", "both together", *["gradients alone"] * 4]
HIDDEN = np.array([0.1, 0.1, 0.2, 0.2])  # from filter 1 with stride 2


def rank_sentences():
    rows, _ = strip_rank_rows()
    unknowns, weight_rows = 4, 4
    seen2, fewer2 = lay_out(CNN6)[1], lay_out(CNN6D)[1]
    pixels, places, channels = seen2[1] ** 2, seen2[-1] ** 2, seen2[0]
    filters, few = seen2[2], fewer2[2]
    by_kind = kinds(*(seen2[1], *seen2[3:]))
    blocks = {f: [(f * taps, min(f * taps, met)) for taps, met in by_kind] for f in (filters, few)}
    sums = {f: np.sum(blocks[f], axis=0) for f in blocks}
    n, weights, gradients = sizes(*fewer2)
    (_, rank), (_, full) = measured_ranks(fewer2), measured_ranks(seen2)
    deficit, total = rank - n, weights + gradients
    assert full == n
    # The other layers have full rank: see test_one_half_alone_is_enough_where_the_table_says_so.
    deficits = [0, deficit, 0, 0, 0, 0]
    crowded = sums[few][0] - sums[few][1]
    spare = sizes(*lay_out(CNN6D)[0])
    open_ = {f: channels * (pixels - sums[f][1]) for f in blocks}
    add = {f: f * (places - f) for f in blocks}
    assert open_[filters] <= add[filters]
    shifted = PIXELS + HIDDEN
    return [
        *rows,
        f"The last row of the table counts {weight_rows} equations for {unknowns} unknowns",
        f"Let the dense layer ${vector(WEIGHTS[2])}$ follow. Then ${vector(PIXELS)}$ and "
        f"${vector(shifted)}$ have the same gradient.",
        f"colour pictures of {SIDE}×{SIDE} pixels, with six convolutions",
        *(
            f"| {i}: {layer[2]} filters {layer[3]}×{layer[3]}{LAYER_NAMES[layer[4]]} | "
            + " | ".join(map(str, sizes(*layer))) + f" | {enough} |"
            for i, (layer, enough) in enumerate(zip(lay_out(CNN6), ENOUGH, strict=True), start=1)
        ),
        f"No layer is short, so $c = {exact(index_of([0] * 6))}$.",
        f"layer 2 has {few} filters. Count its gradient block, with {channels} channels of "
        f"$P = {pixels}$ pixels and $m = {places}$ positions",
        f"| kind of pixel | pixels | {filters} filters: rows, rank | {few} filters: rows, rank |",
        " ".join(
            f"| {taps} tap{'s' * (taps > 1)} | {met} | {blocks[filters][i][0]}, "
            f"{blocks[filters][i][1]} | {blocks[few][i][0]}, {blocks[few][i][1]} |"
            for i, (taps, met) in enumerate(by_kind)
        ),
        f"| sum | {pixels} | {sums[filters][0]}, {sums[filters][1]} | {sums[few][0]}, "
        f"{sums[few][1]} |",
        rf"- {filters} filters leave ${channels} \cdot ({pixels} - {sums[filters][1]}) = "
        rf"{open_[filters]}$ open. The weight rows add up to ${filters} \cdot ({places} - "
        rf"{filters}) = {add[filters]}$. Enough.",
        rf"- {few} filters leave ${channels} \cdot ({pixels} - {sums[few][1]}) = {open_[few]}$ "
        rf"open. The weight rows add ${few} \cdot ({places} - {few}) = {add[few]}$. "
        rf"So $\rho_2 = {add[few] - open_[few]}$, and $c = -\tfrac56 \cdot {-deficit} = "
        rf"{index_of(deficits):.2f}$.",
        f"CNN6-d's layer 2 has ${weights} + {gradients} = {total}$ equations for {n} unknowns: "
        f"{total - n} to spare, it seems.",
        rf"But ${channels} \cdot {crowded} = {channels * crowded}$ gradient rows crowd",
        rf"${few} \cdot {few} = {few**2}$ equations are said twice. ${total} - "
        rf"{channels * crowded} - {few**2} = {rank}$ are left.",
        f"In CNN6-d, layer 1 has ${spare[1]} - {spare[0]} = {spare[1] - spare[0]}$. That covers "
        f"the {-deficit}.",
        f"for the {-deficit} numbers that are open",
    ]  # fmt: skip


def virtual_sentences():
    pixel, taps = 0.4, np.array([2.0, -1.0])
    z = pixel * taps
    x = z * steepness(z)
    left = np.array([1.0, 2.0])
    return [
        f"the first entry plus twice the second is {exact(left @ z)}. ",
        f"Take one pixel of {exact(pixel)} and two filters of one weight, ${exact(taps[0])}$ and "
        f"${exact(taps[1])}$. Then $z_1 = {vector(z)}$, whatever",
        f"Let layer 2 show only $x_2 = ({exact(x[0])}, ?)$.",
        f"But $z_1$ must be ${vector(z)}$, so $x_2 = {vector(x)}$.",
    ]


def size_sentences():
    names = ("cnn4_c1", "cnn4_c2")
    reports = [rank_analysis(models.build(name), (COLOURS, SIDE, SIDE)) for name in names]
    indices = [minus(f"{report.index:.0f}") for report in reports]
    shares = [-100 * report.deficits[1] / report.unknowns[1] for report in reports]
    return [
        f"networks {names[0]} and {names[1]} get {indices[0]} and {indices[1]} by counting here, "
        f"though their second layers lack nearly the same share, {shares[0]:.0f} % and "
        f"{shares[1]:.0f} %."
    ]


@cache
def sentences():
    """Every piece of the page that shows a number of an example."""
    return [
        *strip_sentences(),
        *twin_sentences(),
        *balance_and_noise_sentences(),
        *rank_sentences(),
        *virtual_sentences(),
        *size_sentences(),
    ]


def test_every_number_of_the_examples_is_recomputed():
    missing = [text for text in sentences() if PAGE.count(text) != 1]
    assert not missing, "not on the page exactly once:\n" + "\n".join(missing)


def test_no_other_number_is_on_the_page():
    rest = PAGE
    for text in sorted(sentences(), key=len, reverse=True):
        rest = rest.replace(text, " ")
    decimals, large, cells_ = r"\d[.]\d", r"(?<![\w.])\d{2,}", r"\|\s*[-−]?\d"
    assert not re.findall(rf".{{30}}(?:{decimals}|{large}|\d %|{cells_}).{{10}}", rest)


# --- what the page says in words: the strip -----------------------------------------------------


def test_recursion_finds_the_picture_and_every_k_of_autograd():
    rng = np.random.default_rng(0)
    for label in (-1.0, 1.0):
        for pixels in rng.uniform(size=(20, 4)):
            seen = passing(pixels, label)
            errors = [
                np.abs(go_back(sent(seen), label, margin)[0] - pixels).max()
                for margin in margins(-float(seen["g3"] @ WEIGHTS[2]))
            ]
            assert min(errors) < 1e-7, f"{pixels} with label {label}: {errors}"


def test_closed_form_of_the_margin_is_the_bracketed_one():
    for tau in (-3.0, -0.4, 0.01, 0.1, 0.2784):
        branches = (0,) if tau < 0 else (0, -1)
        closed = [(tau - lambertw(-tau * np.exp(tau), branch)).real for branch in branches]
        np.testing.assert_allclose(closed, margins(tau), rtol=1e-9)
        assert set(np.sign(closed)) == {np.sign(tau)}


def test_dense_layer_with_several_outputs_is_divided_by_all_rows():
    rng = np.random.default_rng(0)
    k, x = rng.normal(size=3), rng.normal(size=5)
    np.testing.assert_allclose(np.outer(k, x).T @ k / (k @ k), x)


def test_six_numbers_sent_hold_four_facts():
    def moved(step):
        return np.concatenate(sent(passing(PIXELS + step)))

    slopes = [(moved(step) - moved(-step)) / 2e-6 for step in 1e-6 * np.eye(4)]
    assert np.linalg.matrix_rank(np.array(slopes), tol=1e-6) == 4
    for seen in (passing(PIXELS), passing(PIXELS[[1, 0, 3, 2]], label=1.0)):
        products = [grad @ taps for grad, taps in zip(sent(seen), WEIGHTS, strict=True)]
        np.testing.assert_allclose(products, seen["u"] * seen["k3"])


def test_twins_and_the_other_label_have_the_gradients_that_were_sent():
    right, wrong = passing(PIXELS, label=1.0), passing(PIXELS, label=-1.0)
    near, far = margins(-float(right["g3"] @ WEIGHTS[2]))
    for mine, theirs in zip(sent(right), sent(passing(near / far * PIXELS, 1.0)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    other = go_back(sent(wrong), label=1.0, margin=float(wrong["mu"]))[0]
    for mine, theirs in zip(sent(wrong), sent(passing(other, 1.0)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    assert (other > 1).any()


def test_wrong_label_contradicts_itself_where_there_are_equations_to_spare():
    rng = torch.Generator().manual_seed(0)
    x, w, head = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (5, 6, 12))
    w, head = w.reshape(3, 1, 2).requires_grad_(), head.requires_grad_()
    logit = head @ F.leaky_relu(F.conv1d(x.reshape(1, 1, -1), w), SLOPE).flatten()
    grad, grad_head = torch.autograd.grad(torch.log1p(torch.exp(logit)), [w, head])  # label -1
    relative = {}
    for sign in (1, -1):
        k = sign * float(torch.sigmoid(logit.detach()))
        after = grad_head / k
        gain = tensor(steepness(after))
        ks = (head.detach() * k * gain).reshape(3, 4)
        filters = zip(w.detach()[:, 0], ks, strict=True)
        weight, gradient = zip(*(halves(*both, 5) for both in filters), strict=True)
        rows = np.vstack([*weight, *gradient])
        known = np.concatenate([(after / gain).numpy(), grad.flatten().numpy()])
        found = np.linalg.lstsq(rows, known, rcond=None)[0]
        relative[sign] = np.linalg.norm(rows @ found - known) / np.linalg.norm(known)
    assert relative[1] < 1e-12 < 1e-2 < relative[-1], relative


def test_gradient_rows_need_only_the_signs():
    seen = passing(PIXELS)
    inputs = go_back(sent(seen))
    bent = np.array(WEIGHTS[2]) * seen["k3"] * steepness(inputs[2] * [1.3, 0.7])
    np.testing.assert_allclose(bent, seen["k2"])
    doubled = halves(WEIGHTS[0], 2 * seen["k1"], 4)[1]
    np.testing.assert_allclose(doubled, 2 * halves(WEIGHTS[0], seen["k1"], 4)[1])


def test_strip_with_stride_two_hides_a_direction_from_every_layer():
    one, two = passing(PIXELS, stride=2), passing(PIXELS + HIDDEN, stride=2)
    for name in one:
        if name != "x1":
            np.testing.assert_allclose(one[name], two[name], atol=1e-12, err_msg=name)
    assert ((PIXELS + HIDDEN <= 1) & (PIXELS + HIDDEN >= 0)).all()


def test_strip_with_relu_is_short_by_one_in_both_filters():
    seen = passing(PIXELS, slope=0.0)
    for i, taps in enumerate(WEIGHTS[:2], start=1):
        unknowns = len(seen[f"x{i}"])
        weight, gradient = halves(taps, seen[f"k{i}"] / seen["k3"], unknowns)
        rows = np.vstack([weight[seen[f"z{i}"] > 0], gradient])
        assert np.linalg.matrix_rank(rows) == unknowns - 1, f"filter {i}"


def test_error_grows_with_the_noise_and_then_jumps():
    small = [noisy_error(noise) / noise for noise in (0.0001, 0.001, 0.01, 0.1, 0.15)]
    assert max(small) < 1.05 * min(small)
    assert noisy_error(0.16) > 3 * noisy_error(0.15)


def test_identity_path_hands_over_the_input_of_its_block():
    rng = np.random.default_rng(0)
    w1, w2, x, k = *rng.normal(size=(2, 4, 4)), *rng.normal(size=(2, 4))
    a = w1 @ x * steepness(w1 @ x)
    s, grad = w2 @ a + x, np.outer(k, a)
    found = grad.T @ k / (k @ k)
    np.testing.assert_allclose(s - w2 @ found, x)


# --- what the page says in words: ranks ---------------------------------------------------------


def test_deficits_of_the_strips():
    deficits = strip_rank_rows()[1]
    assert deficits == [0, 0, -1]
    assert index_of(deficits[:2]) == 0
    assert index_of([-1, 0]) < index_of([0, -1]) < 0


SMALL = [
    (channels, side, filters, kernel, stride, padding, (side + 2 * padding - kernel) // stride + 1)
    for channels, side, filters, kernel, stride, padding in [
        (1, 5, 1, 2, 1, 0), (1, 6, 2, 3, 2, 1), (2, 6, 1, 3, 1, 0), (3, 6, 2, 3, 2, 1),
        (3, 7, 4, 3, 2, 1), (2, 5, 9, 3, 1, 1), (3, 8, 5, 4, 2, 2), (2, 6, 3, 2, 3, 0),
    ]
]  # fmt: skip


@pytest.mark.parametrize("layer", SMALL, ids=str)
def test_counted_rank_is_that_of_the_whole_matrix(layer):
    channels, side, filters, kernel, stride, padding, out = layer
    rng = torch.Generator().manual_seed(1)
    w, k = (
        torch.randn(size, generator=rng, dtype=torch.float64)
        for size in ((filters, channels, kernel, kernel), (1, filters, out, out))
    )
    at = torch.zeros(1, channels, side, side, dtype=torch.float64)

    def both(image):
        taps = w.clone().requires_grad_()
        z = F.conv2d(image, taps, stride=stride, padding=padding)
        grad = torch.autograd.grad((k * z).sum(), taps, create_graph=True)[0]
        return torch.cat([z.flatten(), grad.flatten()])

    rows = torch.autograd.functional.jacobian(both, at).flatten(1)
    assert int(torch.linalg.matrix_rank(rows)) == counted_ranks(layer)[1]
    assert measured_ranks(layer) == counted_ranks(layer)


@pytest.mark.parametrize(("network", "deficit"), [(CNN6, 0), (CNN6D, -280)], ids=["CNN6", "CNN6-d"])
def test_counted_rank_of_the_papers_networks_is_the_measured_one(network, deficit):
    layers = lay_out(network)
    wanted = [0, deficit, 0, 0, 0, 0]
    counted = [counted_ranks(layer)[1] - sizes(*layer)[0] for layer in layers]
    assert counted == wanted
    for layer in layers[1:]:
        assert measured_ranks(layer) == counted_ranks(layer)


def test_one_half_alone_is_enough_where_the_table_says_so():
    for layer, enough in zip(lay_out(CNN6), ENOUGH, strict=True):
        unknowns, weights, _ = sizes(*layer)
        gradients = layer[0] * counted_ranks(layer)[0]
        assert (gradients == unknowns) == (enough == "gradients alone"), layer
        if enough == "both together":
            assert max(weights, gradients) < unknowns
    # Layer 1: kernel 4, stride 2, padding 2. Blocks of 2×2 pixels make it a full convolution with
    # 2×2 taps, which multiplies polynomials by a square matrix. That is injective unless its
    # determinant is the zero polynomial; one value decides.
    channels, side, filters, kernel, stride, padding, out = lay_out(CNN6)[0]
    assert (kernel, stride, padding, out) == (4, 2, 2, side // 2 + 1)
    assert filters == channels * stride**2
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(filters, channels, kernel, kernel, generator=rng, dtype=torch.float64)
    blocks = w.reshape(filters, channels, 2, 2, 2, 2)  # (…, block row, row, block column, column)
    powers = tensor([1.0, 0.7])
    value = torch.einsum("fcaibj,a,b->fcij", blocks, powers, powers).reshape(filters, -1)
    assert torch.linalg.svdvals(value)[-1] > 1e-3
    # The same on a small picture, by singular values.
    seen = what_taps_see(8, kernel, stride, padding)
    rows = torch.einsum("fct,ptm->fmcp", w.flatten(2), seen).flatten(2).flatten(0, 1)
    assert int(torch.linalg.matrix_rank(rows)) == channels * 8 * 8


# --- the drawings -------------------------------------------------------------------------------


def texts(drawing, kind):
    tree = ElementTree.parse(drawing)
    return [node.text for node in tree.iter() if node.get("class") == kind]


def test_drawn_numbers_are_those_of_the_pass():
    seen = passing(PIXELS)
    for side in ("client", "server"):
        for name in ("x1", "z1", "x2", "z2", "x3", "u"):
            assert ", ".join(texts(RECURSION, f"{side} {name}")) == listed(seen[name]), name
    for name in ("g1", "g2", "g3"):
        assert ", ".join(texts(RECURSION, f"sent {name}")) == listed(seen[name], 4)
    words = " ".join(ElementTree.parse(RECURSION).getroot().itertext())
    for kind, taps in zip(("filter", "filter", "dense"), WEIGHTS, strict=True):
        assert f"{kind} {listed(taps)}" in words


def test_drawn_twins_and_their_curve():
    seen = passing(PIXELS, label=1.0)
    tau = -float(seen["g3"] @ WEIGHTS[2])
    roots = margins(tau)
    assert texts(TWINS, "sent") == [f"sent: {tau:.3f}"]
    assert ", ".join(texts(TWINS, "private")) == listed(PIXELS)
    assert ", ".join(texts(TWINS, "twin")) == listed(roots[0] / roots[1] * PIXELS, 2)
    drawn = [text for text in texts(TWINS, "root") if text]
    assert drawn == [f"{roots[0]:.3f}", exact(roots[1])]
    assert f"meets it at {' and at '.join(drawn)}." in TWINS.read_text(encoding="utf-8")
    shapes = {}
    for node in ElementTree.parse(TWINS).iter():
        shapes.setdefault(node.get("class"), []).append(node.attrib)
    points = np.array([point.split(",") for point in shapes["curve"][0]["points"].split()], float)
    start, unit = points[0], np.array([125.0, -640.0])
    np.testing.assert_allclose(
        (points - start) / unit @ [0, 1], left_side((points - start) / unit @ [1, 0]), atol=2e-5
    )
    dots = [(float(a["cx"]), float(a["cy"])) for a in shapes["root"] if "cx" in a]
    wanted = [start + unit * [root, tau] for root in roots]
    np.testing.assert_allclose(dots, wanted, atol=0.01)
    level = float(re.search(rf"M{NUMBER} ({NUMBER})", shapes["level"][0]["d"]).group(1))
    assert level == pytest.approx(start[1] + unit[1] * tau, abs=0.01)
