"""What the operator refuses, each with its message."""

import copy

import pytest
import torch
import torch.nn.functional as F
from influence.cases import DTYPE, case
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from leaklib.influence.checks import RankWarning
from leaklib.influence.operator import influence_operator

FORMS = ["graph", "functional"]


def refuse(message, *arguments, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        influence_operator(*arguments, **settings)


def test_inputs():
    model, inputs, labels = case("mlp").arguments
    bytes_ = (inputs * 255).to(torch.uint8)
    refuse("expected floating inputs, got torch.uint8", model, bytes_, labels, error=TypeError)
    for value in (float("nan"), float("inf")):
        bad = inputs.clone()
        bad[1, 0, 0, 1, 2] = value
        refuse("NaN or infinity in victim 1", model, bad, labels)
    refuse("for one input a victim use", model, inputs[0, 0, 0], labels)
    refuse("expected non-empty inputs", model, inputs[:0], labels[:0])
    refuse("both in float64, got torch.float64 and torch.float32", model, inputs.float(), labels)
    half = copy.deepcopy(model).half()
    refuse("pass dtype=torch.float64", half, inputs.half(), labels)
    refuse("on one device, got cpu, meta and cpu", model, inputs.to("meta"), labels)
    refuse("on one device, got cpu, cpu and meta", model, inputs, labels.to("meta"))
    assert influence_operator(half, inputs.float(), labels, dtype=DTYPE).dtype == DTYPE


def test_labels():
    model, inputs, labels = case("mlp").arguments
    refuse("one label an input", model, inputs, labels[:1])
    refuse("one label an input", model, inputs, labels[0])
    refuse("one label an input", model, inputs, labels[..., None])
    refuse("pass labels.long", model, inputs, labels.int(), error=TypeError)
    refuse("from 0 to 3, got .4. in victim 0", model, inputs, torch.full_like(labels, 4))
    refuse("count classes from 0", model, inputs, labels - 9)
    soft = torch.full((2, 1, 4), 0.25, dtype=DTYPE)
    assert influence_operator(model, inputs, soft).labels.shape == (2, 1, 4)
    refuse(r"expected soft labels \(victims, \*outputs\)", model, inputs, soft[..., :3])
    refuse("others in victim 0; pass probabilities, not logits", model, inputs, 2 * soft)
    negative = soft.clone()
    negative[1, 0] = torch.tensor([1.5, -0.5, 0, 0])
    refuse("others in victim 1; pass probabilities", model, inputs, negative)
    # float32 probabilities beside a float64 network are cast, not refused
    assert influence_operator(model, inputs, soft.float()).labels.dtype == DTYPE


def test_settings():
    arguments = case("mlp").arguments
    refuse("expected form in", *arguments, form="dense")
    refuse("expected reduction 'mean' or 'sum', got 'none'", *arguments, reduction="none")
    refuse("expected dtype None or one of", *arguments, dtype=torch.bfloat16)
    refuse("expected chunk >= 1", *arguments, chunk=0)
    refuse("prefix, got 'fc'; known: 1.weight, 1.bias", *arguments, layers=["fc"])
    refuse("expected at least one layer, got none", *arguments, layers=[])


def test_models():
    _, inputs, labels = case("mlp").arguments
    refuse("expected a model with parameters", nn.Flatten(), inputs, labels)
    frozen = copy.deepcopy(case("mlp").model).requires_grad_(False)
    refuse("requires_grad=True, got none; unfreeze one", frozen, inputs, labels)
    broken = copy.deepcopy(case("mlp").model)
    broken[1].weight.data[0, 0] = float("nan")
    refuse("expected a finite loss, got nan", broken, inputs, labels)


def test_losses():
    arguments = case("mlp").arguments

    def unreduced(outputs, labels, *, reduction):
        return F.cross_entropy(outputs, labels, reduction="none")[None]

    refuse("expected a scalar loss under reduction='mean'", *arguments, loss=unreduced)
    flat = nn.Sequential(*case("mlp").model, nn.Flatten(0)).eval()
    refuse(r"expected outputs \(batch, classes\) with batch 1", flat, *arguments[1:])


class Switch(nn.Module):
    """Dropout that no module class tells of."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, training=self.training)


def test_train_mode():
    inputs, labels = torch.randn(1, 2, 8, dtype=DTYPE), torch.zeros(1, 2).long()

    def network(*layers):
        return nn.Sequential(nn.Linear(8, 8), *layers).to(DTYPE).train()

    refuse("got dropout '1' in train mode", network(nn.Dropout()), inputs, labels)
    refuse("'1' on those of the batch: .* 1559", network(nn.BatchNorm1d(8)), inputs, labels)
    no_statistics = network(nn.BatchNorm1d(8, track_running_stats=False)).eval()
    refuse("track_running_stats=True", no_statistics, inputs, labels)
    switch, state = network(Switch()), torch.get_rng_state()
    refuse("different outputs, as from dropout", switch, inputs, labels)
    assert torch.equal(torch.get_rng_state(), state)
    # where train mode means nothing, it is no error
    assert not influence_operator(network(nn.Tanh()), inputs, labels).model.training
    for layer in (nn.Dropout(), nn.BatchNorm1d(8), Switch()):
        assert influence_operator(network(layer).eval(), inputs, labels).unknowns == 16


def test_rank_warning():
    model, inputs = nn.Linear(5, 2, bias=False).to(DTYPE), torch.randn(1, 3, 5, dtype=DTYPE)
    labels = torch.zeros(1, 3).long()
    with pytest.warns(RankWarning, match="p = 10 < d = 15: at least 5 directions") as caught:
        influence_operator(model, inputs, labels)
    assert caught[0].filename == __file__
    with pytest.warns(RankWarning, match="share more layers"):
        influence_operator(*case("mlp").arguments, layers=["3.bias"])


@pytest.mark.parametrize("form", FORMS)
def test_vectors(form):
    operator = influence_operator(*case("mlp").arguments, form=form)
    u = torch.randn(2, 3, 9, dtype=DTYPE)
    for bad in (u[0], u[:1], u[..., :8], u[:, :0], u.unflatten(-1, (3, 3))):
        for product in (operator.jtu, operator.gram_product):
            with pytest.raises(ValueError, match=r"\(2, vectors, 9\).*unsqueeze"):
                product(bad)
    v = {n: torch.randn(2, 3, *s, dtype=DTYPE) for n, s in operator.parameter_shapes.items()}
    partly = {n: t for n, t in v.items() if n != "1.bias"}
    with pytest.raises(ValueError, match=r"\['1.bias'\] missing and \[\] beyond"):
        operator.jv(partly)
    with pytest.raises(ValueError, match=r"\[\] missing and \['fc'\] beyond; build the operator"):
        operator.jv(v | {"fc": u})
    for bad in (v["1.bias"][:1], v["1.bias"][..., :2], v["1.bias"][0, 0], v["1.bias"][:, :0]):
        with pytest.raises(ValueError, match="expected '1.bias' as .*other victims"):
            operator.jv(v | {"1.bias": bad})
    with pytest.raises(ValueError, match=r"as many vectors in every tensor, got \[1, 3\]"):
        operator.jv(v | {"1.bias": v["1.bias"][:, :1]})
    with pytest.raises(ValueError, match="expected some of 2 victims"):
        operator.select([])


@pytest.mark.parametrize("form", FORMS)
def test_vectors_are_widened_but_never_narrowed(form):
    operator = influence_operator(*case("mlp").arguments, form=form, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dtype=torch.float64"):
        operator.jtu(torch.randn(2, 1, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="got torch.int64"):
        operator.jtu(torch.ones(2, 1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="on meta"):
        operator.jtu(torch.ones(2, 1, 9, device="meta"))


class Fused(nn.Module):
    """Attention that insists on the fused kernel."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.mix(x)[:, None].chunk(3, dim=-1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1)


@pytest.mark.parametrize("form", FORMS)
def test_fused_attention_tells_the_way_out(form):
    inputs = torch.randn(1, 1, 3, 4, dtype=DTYPE)
    operator = influence_operator(Fused().to(DTYPE), inputs, torch.zeros(1, 1).long(), form=form)
    with pytest.raises(RuntimeError, match=r"differentiated twice, .*sdpa_kernel\(SDPBackend.MATH"):
        operator.gram_product(torch.randn(1, 1, 12, dtype=DTYPE))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_module(batch_first):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first).to(DTYPE).eval()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3).to(DTYPE))
    inputs = torch.randn(2, 1, 3, 4, dtype=DTYPE)
    u = torch.randn(2, 2, 12, dtype=DTYPE)
    products = [
        influence_operator(model, inputs, torch.ones(2, 1).long(), form=form).gram_product(u)
        for form in FORMS
    ]
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_loss_that_vmap_refuses_tells_the_way_out():
    def counted(outputs, labels, *, reduction):
        return ((outputs - F.one_hot(labels, 4)) ** 2).sum() * (2 if labels.max().item() > 9 else 1)

    arguments, u = case("mlp").arguments, torch.randn(2, 1, 9, dtype=DTYPE)
    operator = influence_operator(*arguments, loss=counted)
    with pytest.raises(RuntimeError, match="form='graph'"):
        operator.gram_product(u)
    graph = influence_operator(*arguments, loss=counted, form="graph")
    assert graph.gram_product(u).shape == (2, 1, 9)
