"""The small transformer against PyTorch's own layers, and its derivatives against differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from leaklib.attacks import AdamSettings, Matching, dlg, invert_gradients, nearest_tokens
from leaklib.data import PrivateInputs, load_sentences
from leaklib.gradients import share_gradient
from leaklib.models import embedding_table, transformer
from leaklib.text_training import evaluate_on_tokens, train_on_tokens

TASKS = ["classify", "next token"]


def small(task="classify", norm="post", **settings):
    settings = {"tokens": 5, "dim": 8, "outputs": 11, "hidden": 12, "layers": 2} | settings
    return transformer(task=task, norm=norm, seed=3, **settings).double()


def embeddings(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same_in_torch(model, norm, causal):
    """The blocks of a model as PyTorch's own encoder layers."""
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
        ).double()
        a = block.attention
        layer.self_attn.in_proj_weight.data = torch.cat(
            [a.query.weight, a.key.weight, a.value.weight]
        )
        layer.self_attn.in_proj_bias.data = torch.cat([a.query.bias, a.key.bias, a.value.bias])
        layer.self_attn.out_proj.load_state_dict(a.out.state_dict())
        layer.linear1.load_state_dict(block.network[0].state_dict())
        layer.linear2.load_state_dict(block.network[2].state_dict())
        layer.norm1.load_state_dict(block.attention_norm.state_dict())
        layer.norm2.load_state_dict(block.network_norm.state_dict())
        layers.append(layer)
    mask = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1) if causal else None

    def forward(x):
        for layer in layers:
            x = layer(x, src_mask=mask)
        return x

    return forward


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_it_is_the_transformer_of_pytorch(task, norm):
    model, x = small(task, norm), embeddings(3, 5, 8)
    with torch.no_grad():
        for p in model.parameters():  # LayerNorm with weights of its own
            p.add_(0.1 * embeddings(*p.shape, seed=p.numel()))
        hidden = same_in_torch(model, norm, task == "next token")(x + model.positions)
        hidden = model.norm(hidden)
        expected = model.head(hidden.mean(1) if task == "classify" else hidden)
        found = model(x)
    if task == "next token":
        found = found.transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_next_tokens_see_no_later_token():
    model, x = small("next token"), embeddings(1, 5, 8)
    changed = x.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(model(x)[..., :3], model(changed)[..., :3], rtol=0, atol=0)
    assert not torch.allclose(model(x)[..., 3], model(changed)[..., 3])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_second_derivatives_batch_and_agree_with_differences(task, norm):
    model, x, u = small(task, norm), embeddings(2, 1, 5, 8), embeddings(2, 1, 5, 8, seed=1)
    labels = torch.tensor([[1], [2]])
    if task == "next token":
        labels = torch.arange(10).reshape(2, 1, 5)
    params = dict(model.named_parameters())

    def gradient(x, labels):
        loss = lambda p: F.cross_entropy(functional_call(model, p, (x,)), labels)  # noqa: E731
        return grad(loss)(params)

    def along(x, u, labels):
        return jvp(lambda x: gradient(x, labels), (x,), (u,))[1]

    exact = vmap(along)(x, u, labels)
    step = 1e-5
    for i in range(2):
        above = gradient(x[i] + step * u[i], labels[i])
        below = gradient(x[i] - step * u[i], labels[i])
        for name in params:
            difference = (above[name] - below[name]) / (2 * step)
            torch.testing.assert_close(exact[name][i], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("task", TASKS)
def test_pre_norm_is_blind_to_a_constant_in_a_token(task):
    x = embeddings(1, 5, 8)
    shifted = x + embeddings(1, 5, 1, seed=2)
    torch.testing.assert_close(small(task, "pre")(x), small(task, "pre")(shifted))
    assert not torch.allclose(small(task, "post")(x), small(task, "post")(shifted), atol=1e-3)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again = transformer(tokens=4, outputs=3), transformer(tokens=4, outputs=3)
    other = transformer(tokens=4, outputs=3, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not first.training
    quiet = transformer(tokens=4, outputs=3, position_std=0.1)
    torch.testing.assert_close(quiet.positions, 0.1 * first.positions)
    assert transformer(tokens=4, outputs=3, init="uniform").head.weight.abs().max() > 0.4


@pytest.mark.parametrize(
    "wrong",
    [{"task": "translate"}, {"norm": "mid"}, {"heads": 3}, {"layers": 0}, {"init": "none"},
     {"activation": "step"}],
)  # fmt: skip
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match="expected|unknown"):
        transformer(tokens=4, outputs=3, **wrong)


@pytest.mark.parametrize("task", TASKS)
def test_training_learns_and_repeats(task):
    extra = task == "next token"
    seen = load_sentences(split="train", length=6 + extra, windows="all", count=400, vocabulary=200)
    tokens = seen.tokens[:, :-1] if extra else seen.tokens
    labels = seen.tokens[:, 1:] if extra else seen.labels
    table = embedding_table(200, 16)
    outcomes = []
    for _ in range(2):
        model = transformer(tokens=6, dim=16, outputs=200 if extra else 8, task=task)
        trained, history = train_on_tokens(
            model, table, tokens, labels, epochs=4, generator=torch.Generator().manual_seed(0)
        )
        outcomes.append((trained, evaluate_on_tokens(model, trained, tokens, labels)))
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert history["loss"].iloc[-1] < 0.8 * history["loss"].iloc[0]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    assert outcomes[0][1][0] > (0.1 if extra else 0.4)
    assert torch.equal(table, embedding_table(200, 16))
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_is_what_it_says():
    model, table = small(), embeddings(9, 8)
    tokens, labels = torch.arange(10).reshape(2, 5) % 9, torch.tensor([1, 2])
    logits = model(table[tokens]).log_softmax(1)
    accuracy, loss = evaluate_on_tokens(model, table, tokens, labels)
    assert loss == pytest.approx(-(logits[0, 1] + logits[1, 2]).item() / 2)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"epochs": -1}, ValueError),
        ({"lr": 0.0}, ValueError),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError),
        ({"tokens": torch.zeros(2, 5)}, ValueError),
    ],
)
def test_training_refuses(wrong, error):
    settings = {
        "tokens": torch.zeros(2, 5, dtype=torch.int64), "labels": torch.tensor([0, 1]),
        "epochs": 6, "generator": torch.Generator().manual_seed(0),
    } | wrong  # fmt: skip
    with pytest.raises(error):
        train_on_tokens(small(), embeddings(9, 8), **settings)


def test_training_stops_where_the_loss_is_lost():
    broken = embeddings(9, 8) * torch.inf
    tokens, labels = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(FloatingPointError, match="lower lr"):
        train_on_tokens(
            small(), broken, tokens, labels, epochs=1, generator=torch.Generator().manual_seed(0)
        )


def language_model():
    """A model, its table, two private sentences and their next words."""
    table = embedding_table(20, 8, seed=1).double()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    private = PrivateInputs(table[tokens[:, :-1]].unsqueeze(1), tokens[:, 1:].unsqueeze(1))
    return small("next token", outputs=20, layers=1), table, tokens, private


def test_a_sentence_comes_back_from_a_language_model():
    model, table, tokens, private = language_model()
    found = dlg(
        model, share_gradient(model, private), image_shape=(5, 8), labels=private.labels,
        max_evaluations=600, gradient_tolerance=1e-9, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    torch.testing.assert_close(found.images, private.inputs, rtol=0, atol=1e-3)
    assert torch.equal(nearest_tokens(found.images, table)[:, 0], tokens[:, :-1])


def test_unknown_next_tokens_are_a_variable_of_the_attack():
    model, _, _, private = language_model()
    logits = 50 * F.one_hot(private.labels, 20).double().movedim(-1, 2)
    shared = share_gradient(model, private)
    settings = {"image_shape": (5, 8), "label_shape": (5,), "max_evaluations": 1}
    truth = {"images": private.inputs, "label_logits": logits}
    found = dlg(model, shared, start=truth, generator=torch.Generator(), **settings)
    assert found.objective.max() < 1e-20
    assert torch.equal(found.labels, private.labels)
    wrong = truth | {"label_logits": logits.roll(1, dims=2)}
    found = dlg(model, shared, start=wrong, generator=torch.Generator(), **settings)
    assert found.objective.min() > 1e-3
    assert torch.equal(found.labels, (private.labels + 1) % 20)


def test_what_is_for_pixels_is_refused_for_embeddings():
    model, _, _, private = language_model()
    known = {"image_shape": (5, 8), "labels": private.labels, "generator": torch.Generator()}
    shared, free = share_gradient(model, private), AdamSettings(steps=1, box=None)
    with pytest.raises(ValueError, match="tv_weight=0"):
        invert_gradients(model, shared, optimiser=free, **known)
    with pytest.raises(ValueError, match="box=None"):
        invert_gradients(model, shared, matching=Matching("cosine"), **known)
    invert_gradients(model, shared, matching=Matching("cosine"), optimiser=free, **known)


def test_private_inputs_are_checked():
    x, y = torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, dtype=torch.int64)
    assert PrivateInputs(x - 7, y).input_shape == (5, 8)
    with pytest.raises(TypeError, match="embed tokens"):
        PrivateInputs(x.long(), y)
    with pytest.raises(ValueError, match="NaN or infinity in victim 1"):
        PrivateInputs(torch.stack([x[0], x[1] / 0]), y)
    with pytest.raises(ValueError, match="expected labels"):
        PrivateInputs(x, y[:, 0])
    with pytest.raises(ValueError, match="unsqueeze"):
        PrivateInputs(x[0, 0], y)
