"""What the last layer tells: against autograd, against a dense scan, and what it must refuse."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_victims
from torch import nn

from leaklib.attacks import last_layer, softmax_norm
from leaklib.attacks.last_layer import read_last_layer
from leaklib.attacks.softmax_norm import softmax_norms
from leaklib.chain import ElementwiseStage
from leaklib.chain.inverses import affine_map, invert_activation
from leaklib.gradients import share_gradient
from leaklib.margin_losses import EXPONENTIAL, HINGE, LOGISTIC, largest_tau
from leaklib.models import build

DTYPE = torch.float64
MARGIN = {"logistic": LOGISTIC, "exponential": EXPONENTIAL, "hinge": HINGE}
BEHIND = {"none": None, "leaky": nn.LeakyReLU(0.2), "relu": nn.ReLU(), "tanh": nn.Tanh()}


def stage(module, outputs):
    return module and ElementwiseStage("act", invert_activation(module), (outputs,))


def autograd(weight, bias, x, labels, loss, module=None):
    """Gradients of one input a victim, one after the other: (victims, *parameter shape)."""
    grads = []
    for row, label in zip(x, labels, strict=True):
        params = [p.clone().requires_grad_() for p in (weight, bias) if p is not None]
        z = F.linear(row[None], *params)
        output = z if module is None else module(z)
        grads.append(torch.autograd.grad(loss(output, label[None]), params))
    stacked = [torch.stack(parts) for parts in zip(*grads, strict=True)]
    return stacked[0], stacked[1] if bias is not None else None


def case(outputs, *, bias=False, loss=F.cross_entropy, behind="none", victims=12, inputs=7, seed=0,
         scale=1.0):  # fmt: skip
    """A random layer with inputs of both signs, labels and gradients."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw, dtype=DTYPE) * scale
    b = torch.randn(outputs, generator=draw, dtype=DTYPE) if bias else None
    x = torch.randn(victims, inputs, generator=draw, dtype=DTYPE)
    labels = torch.randint(max(2, outputs), (victims,), generator=draw)
    if loss is HINGE:  # beyond the margin there is no gradient; keep what has one
        z = F.linear(x, weight, b)[:, 0]
        z = z if BEHIND[behind] is None else BEHIND[behind](z)
        keep = (2 * labels - 1) * z < 1
        x, labels = x[keep], labels[keep]
    return weight, b, x, labels, *autograd(weight, b, x, labels, loss, BEHIND[behind])


def read(weight, bias, grads, loss, behind="none", labels=None):
    activation = stage(BEHIND[behind], len(weight))
    loss = "softmax" if loss is F.cross_entropy else loss
    return read_last_layer(weight, bias, *grads, loss=loss, labels=labels, activation=activation)


def check_rows_explain_the_gradient(found, weight, bias, grads, loss, behind="none", rtol=1e-9):
    """Every hypothesis has the shared gradient, and its parts fit each other."""
    module = BEHIND[behind]
    again = autograd(weight, bias, found.layer_input, found.label, loss, module)
    for ours, shared in zip(again, grads, strict=True):
        if shared is not None:
            torch.testing.assert_close(ours, shared[found.victim], rtol=rtol, atol=rtol)
    outer = found.preactivation_grad[:, :, None] * found.layer_input[:, None]
    torch.testing.assert_close(outer, grads[0][found.victim], rtol=rtol, atol=rtol)
    z = F.linear(found.layer_input, weight, bias)
    torch.testing.assert_close(found.preactivation, z, rtol=rtol, atol=rtol)
    if len(weight) == 1:
        output = z if module is None else module(z)
        torch.testing.assert_close(found.margin, (2 * found.label - 1) * output[:, 0])
    assert found.victim.tolist() == sorted(found.victim.tolist())


def truth_is_among(found, x, labels, rtol=1e-8):
    for victim, (row, label) in enumerate(zip(x, labels, strict=True)):
        mine = found.select((found.victim == victim) & (found.label == label))
        error = (mine.layer_input - row).norm(dim=1) / row.norm()
        assert len(error), f"victim {victim}: its label is gone"
        assert float(error.min()) < rtol, f"victim {victim}: {error}"


def test_doctests():
    assert doctest.testmod(last_layer).failed == 0
    assert doctest.testmod(softmax_norm).failed == 0


# --- one logit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", ["none", "leaky"])
@pytest.mark.parametrize("name", MARGIN)
def test_one_logit_without_bias_leaves_roots_and_labels_open(name, behind):
    loss = MARGIN[name]
    weight, _, x, labels, *grads = case(1, loss=loss, behind=behind, scale=0.5, victims=30)
    found = read(weight, None, grads, loss, behind)
    truth_is_among(found, x, labels)
    check_rows_explain_the_gradient(found, weight, None, grads, loss, behind)
    assert float(found.residual.max()) < 1e-10
    output = x @ weight.T if behind == "none" else BEHIND[behind](x @ weight.T)
    margin = (2 * labels - 1) * output[:, 0]
    assert int((margin > 0).sum()) > 3
    assert int((margin < 0).sum()) > 3
    for victim, mu in enumerate(margin.tolist()):
        roots = 2 if mu > 0 and name != "hinge" else 1
        assert int((found.victim == victim).sum()) == 2 * roots
    known = read(weight, None, grads, loss, behind, labels)
    assert torch.equal(known.label, labels[known.victim])
    assert len(known.victim) == len(found.victim) // 2
    truth_is_among(known, x, labels)


def test_twins_of_a_chosen_margin():
    weight, x = torch.tensor([[3.0, 4.0]], dtype=DTYPE), torch.tensor([[3.0, 4.0]], dtype=DTYPE)
    labels = torch.tensor([1])
    grads = autograd(weight, None, x / 25, labels, LOGISTIC)  # the logit is 1
    found = read(weight, None, grads, LOGISTIC, labels=labels)
    assert found.margin.tolist() == pytest.approx([1.0, 1.596918], abs=1e-6)
    torch.testing.assert_close(found.layer_input[0], x[0] / 25)
    torch.testing.assert_close(found.layer_input[1], found.margin[1] * x[0] / 25)


def test_behind_a_relu_negative_outputs_do_not_exist():
    weight, _, x, labels, *grads = case(1, loss=LOGISTIC, behind="none", victims=20)
    alive = (x @ weight.T)[:, 0] > 0
    grads = [grads[0][alive], None]
    found = read(weight, None, grads, LOGISTIC, "relu")
    truth_is_among(found, x[alive], labels[alive])
    assert bool((found.preactivation > 0).all())
    margin = ((2 * labels - 1) * (x @ weight.T)[:, 0])[alive]
    # the sign of τ tells the label, both roots of a positive margin stay
    assert torch.equal(found.label, labels[alive][found.victim])
    assert len(found.victim) == len(margin) + int((margin > 0).sum())
    with pytest.raises(ValueError, match=r"got label . for victim 0.*labels=None"):
        read(weight, None, grads, LOGISTIC, "relu", 1 - labels[alive])


@pytest.mark.parametrize("behind", ["none", "leaky", "tanh"])
@pytest.mark.parametrize("name", MARGIN)
def test_one_logit_with_bias_tells_everything(name, behind):
    loss = MARGIN[name]
    weight, bias, x, labels, *grads = case(1, bias=True, loss=loss, behind=behind)
    found = read(weight, bias, grads, loss, behind)
    assert found.victim.tolist() == list(range(len(x)))
    assert torch.equal(found.label, labels)
    torch.testing.assert_close(found.layer_input, x)
    assert float(found.residual.max()) < 1e-12
    check_rows_explain_the_gradient(found, weight, bias, grads, loss, behind)
    again = read(weight, bias, grads, loss, behind, labels[:, None])
    assert torch.equal(again.layer_input, found.layer_input)


def test_with_bias_an_input_of_zeros_is_an_answer():
    weight, bias, x, labels, *_ = case(1, bias=True, loss=LOGISTIC)
    grads = autograd(weight, bias, 0 * x, labels, LOGISTIC)
    found = read(weight, bias, grads, LOGISTIC)
    assert torch.equal(found.label, labels)
    assert torch.equal(found.layer_input, 0 * x)
    assert float(found.residual.max()) < 1e-14
    # half of the gradient that this input has
    halved = read(weight, bias, [grad / 2 for grad in grads], LOGISTIC)
    torch.testing.assert_close(halved.residual, torch.ones(len(x), dtype=DTYPE))


def test_a_flipped_activation_flips_the_label():
    """Behind the layer stands −2z + 1: the sign of k alone would tell the wrong label."""
    weight, bias, x, labels, *_ = case(1, bias=True, loss=LOGISTIC)
    gain, shift = torch.tensor([-2.0], dtype=DTYPE), torch.tensor([1.0], dtype=DTYPE)
    grads = autograd(weight, bias, x, labels, LOGISTIC, lambda z: gain * z + shift)
    activation = ElementwiseStage("norm", affine_map("norm", gain, shift), (1,))
    settings = {"loss": LOGISTIC, "activation": activation}
    found = read_last_layer(weight, bias, *grads, **settings)
    assert torch.equal(found.label, labels)
    torch.testing.assert_close(found.layer_input, x)


@pytest.mark.parametrize("name", ["logistic", "exponential"])
def test_a_gradient_that_no_margin_explains_gets_the_double_root(name):
    loss = MARGIN[name]
    weight = torch.tensor([[1.0, 0.0]], dtype=DTYPE)
    grad = torch.tensor([[[-1.2 * largest_tau(loss), 0.1]]], dtype=DTYPE)
    found = read(weight, None, (grad, None), loss)
    assert found.label.tolist() == [0, 1]
    summit = 1.278465 if name == "logistic" else 1.0
    assert found.margin.tolist() == pytest.approx([summit] * 2, abs=1e-6)
    assert bool((found.residual > 0.01).all())


# --- several logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", ["none", "leaky", "tanh"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_softmax_with_biases_tells_everything(classes, behind):
    weight, bias, x, labels, *grads = case(classes, bias=True, behind=behind)
    found = read(weight, bias, grads, F.cross_entropy, behind)
    assert torch.equal(found.label, labels)
    torch.testing.assert_close(found.layer_input, x)
    assert float(found.residual.max()) < 1e-12
    assert bool(found.margin.isnan().all())
    check_rows_explain_the_gradient(found, weight, bias, grads, F.cross_entropy, behind)


@pytest.mark.parametrize("behind", ["none", "leaky"])
@pytest.mark.parametrize("scale", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("classes", [3, 10])
def test_softmax_without_biases_leaves_one_answer(classes, scale, behind):
    weight, _, x, labels, *grads = case(classes, scale=scale, victims=40, behind=behind)
    found = read(weight, None, grads, F.cross_entropy, behind)
    truth_is_among(found, x, labels)
    check_rows_explain_the_gradient(found, weight, None, grads, F.cross_entropy, behind)
    assert found.victim.tolist() == list(range(40))
    known = read(weight, None, grads, F.cross_entropy, behind, labels)
    torch.testing.assert_close(known.layer_input, found.layer_input)


def test_two_classes_without_biases_are_one_logit():
    weight, _, x, labels, *grads = case(2, victims=30)
    found = read(weight, None, grads, F.cross_entropy)
    truth_is_among(found, x, labels)
    check_rows_explain_the_gradient(found, weight, None, grads, F.cross_entropy)
    difference = weight[1:] - weight[:1]
    logistic = autograd(difference, None, x, labels, LOGISTIC)
    single = read(difference, None, logistic, LOGISTIC)
    assert torch.equal(found.victim, single.victim)
    assert torch.equal(found.label, single.label)
    # the same hypotheses, roots perhaps in another order
    order = [
        rows.select((rows.victim * 2 + rows.label + rows.layer_input.norm(dim=1) / 1e4).argsort())
        for rows in (found, single)
    ]
    torch.testing.assert_close(order[0].layer_input, order[1].layer_input)
    known = read(weight, None, grads, F.cross_entropy, labels=labels)
    truth_is_among(known, x, labels)
    assert torch.equal(known.label, labels[known.victim])


def test_a_confident_prediction_keeps_its_digits():
    """1 − p of the label was rounded to few digits; the other rows still know it."""
    weight, _, x, *_ = case(4, scale=2.0, victims=60)
    labels = (x @ weight.T).argmax(1)
    missing = 1 - (x @ weight.T).softmax(1).amax(1)
    # larger ones come close to a double root, which no gradient in float32 resolves
    x, labels, missing = x[missing < 0.1], labels[missing < 0.1], missing[missing < 0.1]
    assert float(missing.min()) < 1e-5
    weight = weight.float()
    grads = autograd(weight, None, x.float(), labels, F.cross_entropy)
    found = read(weight, None, grads, F.cross_entropy, labels=labels)
    truth_is_among(found, x, labels, rtol=1e-5)


def scan(total, low, high, points=500_000):
    """β and β S/(1 + S) on a fine grid; `total` gives log S."""
    beta = torch.logspace(math.log10(low), math.log10(high), points, dtype=DTYPE)
    return beta, beta * torch.sigmoid(total(beta))


def norm_roots_by_scan(total, length):
    """Roots of β S/(1 + S) = g, refined by the secant of the cell."""
    beta, value = scan(total, length * (1 - 1e-6), length * 1e6)
    u, v = value[:-1] - length, value[1:] - length
    cells = (u > 0) != (v > 0)
    return (beta[:-1] - u * (beta[1:] - beta[:-1]) / (v - u))[cells]


def test_norms_equal_those_of_a_dense_scan():
    draw = torch.Generator().manual_seed(1)
    differences = torch.randn(60, 4, generator=draw, dtype=DTYPE)
    differences *= torch.logspace(-2, 1, 60, dtype=DTYPE)[:, None]
    differences[::3] = -differences[::3].abs()  # the label is predicted: no root, or two
    length = torch.rand(60, generator=draw, dtype=DTYPE) + 0.05
    rows, norms = softmax_norms(differences, length)
    counts = []
    for row in range(60):

        def total(beta, row=row):
            return torch.logsumexp(beta[:, None] * differences[row], dim=1)

        expected = norm_roots_by_scan(total, float(length[row]))
        counts.append(len(expected))
        if not len(expected):  # the length that comes closest
            beta, value = scan(total, 1e-3, 1e4)
            expected = beta[value.argmax()][None]
        rtol = 1e-8 if counts[-1] else 1e-3
        torch.testing.assert_close(norms[rows == row], expected, rtol=rtol, atol=0)
    assert {0, 1, 2} <= set(counts)


@pytest.mark.parametrize(("last", "count"), [(0.004, 3), (-0.01, 4)])
def test_several_roots_are_all_found(last, count):
    """1,500 classes far behind and one near the label: a summit, a valley, and more behind it."""
    differences = torch.full((1, 1501), -1.0, dtype=DTYPE)
    differences[0, 0] = last

    def total(beta):
        return torch.logaddexp(math.log(1500) - beta, last * beta)

    _, value = scan(total, 0.1, 30)
    valley = (value[1:-1] < value[:-2]) & (value[1:-1] < value[2:])
    summit = (value[1:-1] > value[:-2]) & (value[1:-1] > value[2:])
    level = float((value[1:-1][valley][0] + value[1:-1][summit][0]) / 2)
    expected = norm_roots_by_scan(total, level)
    assert len(expected) == count
    rows, norms = softmax_norms(differences, torch.tensor([level], dtype=DTYPE))
    assert rows.tolist() == [0] * count
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0)


def test_blocks_of_rows_change_nothing(monkeypatch):
    draw = torch.Generator().manual_seed(2)
    differences = torch.randn(7, 3, generator=draw, dtype=DTYPE)
    length = torch.rand(7, generator=draw, dtype=DTYPE)
    whole = softmax_norms(differences, length)
    monkeypatch.setattr(softmax_norm, "_BLOCK", 3)
    for ours, expected in zip(softmax_norms(differences, length), whole, strict=True):
        assert torch.equal(ours, expected)


# --- all of them ----------------------------------------------------------------------------------

CASES = [
    (1, False, LOGISTIC),
    (1, True, HINGE),
    (2, False, F.cross_entropy),
    (5, False, F.cross_entropy),
    (5, True, F.cross_entropy),
]


@pytest.mark.parametrize(("outputs", "bias", "loss"), CASES)
def test_batched_is_looped(outputs, bias, loss):
    weight, b, _, _, *grads = case(outputs, bias=bias, loss=loss)
    together = read(weight, b, grads, loss)
    for victim in range(len(grads[0])):
        alone = read(weight, b, [g if g is None else g[[victim]] for g in grads], loss)
        mine = together.select(together.victim == victim)
        assert torch.equal(alone.label, mine.label)
        for name in ("margin", "preactivation", "preactivation_grad", "layer_input"):
            ours, single = getattr(mine, name), getattr(alone, name)
            torch.testing.assert_close(ours, single, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("outputs", "bias", "loss"), CASES)
def test_float32_gradients_keep_their_accuracy(outputs, bias, loss):
    weight, b, x, labels, *_ = case(outputs, bias=bias, loss=loss)
    weight, b = weight.float(), None if b is None else b.float()
    grads = autograd(weight, b, x.float(), labels, loss)
    found = read(weight, b, grads, loss)
    assert found.layer_input.dtype == DTYPE
    assert float(found.residual.max()) < 1e-5
    truth_is_among(found, x, labels, rtol=1e-4)
    known = read(weight, b, grads, loss, labels=labels)
    assert torch.equal(known.label, labels[known.victim])


@pytest.mark.parametrize(
    ("name", "settings", "loss"),
    [
        ("fcn3", {"hidden": (9, 6)}, LOGISTIC),
        ("cnn6", {}, EXPONENTIAL),
        ("fcn3", {"hidden": (9, 6), "classes": 4, "last_activation": False}, F.cross_entropy),
    ],
)
def test_networks_of_the_paper(name, settings, loss):
    model = build(name, input_shape=(1, 8, 8), seed=1, **settings).to(DTYPE)
    classes = max(2, model.fc.out_features)
    victims = random_victims(victims=8, classes=classes)
    shared = share_gradient(model, victims, loss=loss)
    inputs = []
    hook = model.fc.register_forward_hook(lambda _module, args, _out: inputs.append(args[0]))
    with torch.no_grad():
        model(victims.images[:, 0])
    hook.remove()
    behind = "leaky" if name == "fcn3" and settings.get("last_activation", True) else "none"
    found = read(model.fc.weight, None, (shared.tensors["fc.weight"], None), loss, behind)
    truth_is_among(found, inputs[0], victims.labels[:, 0])


class TestBadInput:
    @pytest.mark.parametrize(("outputs", "bias", "loss"), CASES)
    def test_gradient_of_zeros_names_the_victim(self, outputs, bias, loss):
        weight, b, _, _, *grads = case(outputs, bias=bias, loss=loss)
        grads[0][3] = 0
        if bias:
            grads[1][3] = 0
        with pytest.raises(ValueError, match="zeros only for victim 3.*hinge.*leave this victim"):
            read(weight, b, grads, loss)
        grads[0][3] = math.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            read(weight, b, grads, loss)

    def test_hinge_beyond_its_margin(self):
        weight, x = torch.ones(1, 2, dtype=DTYPE), torch.ones(1, 2, dtype=DTYPE)
        grads = autograd(weight, None, x, torch.tensor([1]), HINGE)
        with pytest.raises(ValueError, match="victim 0: its margin is 1 or more"):
            read(weight, None, grads, HINGE)

    @pytest.mark.parametrize("noise", [0.0, 1e-4])
    @pytest.mark.parametrize(
        ("outputs", "bias", "loss"),
        [(1, True, LOGISTIC), (5, False, F.cross_entropy), (5, True, F.cross_entropy)],
    )
    def test_a_label_that_contradicts_the_gradient(self, outputs, bias, loss, noise):
        weight, b, _, labels, *grads = case(outputs, bias=bias, loss=loss, scale=0.3)
        draw = torch.Generator().manual_seed(0)
        grads = [
            g if g is None else g + noise * torch.randn(g.shape, generator=draw, dtype=DTYPE)
            for g in grads
        ]
        assert torch.equal(read(weight, b, grads, loss, labels=labels).label, labels)
        wrong = labels.clone()
        wrong[4] = (wrong[4] + 1) % max(2, outputs)
        with pytest.raises(ValueError, match=rf"label {int(wrong[4])} for victim 4.*labels=None"):
            read(weight, b, grads, loss, labels=wrong)

    def test_activation_that_is_not_homogeneous(self):
        weight, _, _, _, *grads = case(1, loss=LOGISTIC)
        with pytest.raises(ValueError, match=r"linear on each side of zero.*got tanh"):
            read(weight, None, grads, LOGISTIC, "tanh")
        weight, _, _, _, *grads = case(3)
        with pytest.raises(ValueError, match="got tanh; use a bias"):
            read(weight, None, grads, F.cross_entropy, "tanh")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bias": None}, "no bias and a gradient; share both"),
            ({"bias_grad": None}, "a bias and no gradient"),
            ({"bias_grad": torch.ones(12, 4)}, r"\(12, 5\), got \(12, 4\)"),
            ({"weight_grad": torch.ones(12, 5, 6)}, r"\(12, 5, 7\), got \(12, 5, 6\)"),
            ({"loss": LOGISTIC}, r"5 output\(s\), got 'logistic'"),
            ({"loss": "hinge"}, "MarginLoss or \"softmax\" as the loss, got 'hinge'"),
            ({"labels": torch.zeros(5).long()}, r"labels \(12,\) or \(12, 1\), got \(5,\)"),
            ({"labels": torch.zeros(12)}, "integer labels 0 to 4"),
            ({"labels": torch.full((12,), 5)}, r"integer labels 0 to 4, got \[5"),
        ],
    )
    def test_what_does_not_fit(self, change, message):
        weight, bias, _, _, weight_grad, bias_grad = case(5, bias=True)
        settings = {"weight": weight, "bias": bias, "weight_grad": weight_grad,
                    "bias_grad": bias_grad, "loss": "softmax"} | change  # fmt: skip
        tensors = [settings.pop(n) for n in ("weight", "bias", "weight_grad", "bias_grad")]
        with pytest.raises(ValueError, match=message):
            read_last_layer(*tensors, **settings)

    def test_one_logit_needs_its_loss(self):
        weight, _, _, _, *grads = case(1, loss=LOGISTIC)
        with pytest.raises(ValueError, match="1 output.*'softmax'.*MarginLoss for one logit"):
            read_last_layer(weight, None, *grads, loss="softmax")
