"""Assignment against all permutations, labels against multisets, the table against both."""

import doctest
import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from leaklib.metrics import (
    label_accuracy,
    match_batch,
    mse,
    score,
    scores,
    success_rate,
    success_table,
)


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_doctests():
    assert doctest.testmod(scores).failed == 0


def test_success_table_equals_one_rate_a_group():
    rows = pd.DataFrame(
        {"set": list("aabbb"), "attack": list("xyxxy"), "psnr_db": [25, 20, 19, 21, float("nan")]}
    )
    table = success_table(rows, by=["set", "attack"]).set_index(["set", "attack"])
    assert list(table.index) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    for group, values in {("a", "y"): [20.0], ("b", "x"): [19, 21], ("b", "y"): [0.0]}.items():
        rate = success_rate(values, threshold=20.0)
        assert table.loc[group].tolist() == [rate.n, rate.estimate, rate.low, rate.high]


LABELS = st.lists(st.integers(-1, 3), min_size=4, max_size=4)


@settings(deadline=None, derandomize=True)
@given(recovered=st.lists(LABELS, min_size=1, max_size=3), data=st.data())
def test_label_accuracy_equals_multiset_intersection(recovered, data):
    true = data.draw(st.lists(LABELS, min_size=len(recovered), max_size=len(recovered)))
    value = label_accuracy(torch.tensor(recovered), torch.tensor(true))
    expected = [(Counter(r) & Counter(t)).total() / 4 for r, t in zip(recovered, true, strict=True)]
    assert value.tolist() == expected


@pytest.mark.parametrize(
    ("recovered", "true", "message"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(3).long(), "one shape"),
        (torch.zeros(2, 0).long(), torch.zeros(2, 0).long(), "batch >= 1"),
        (torch.zeros(3), torch.zeros(3).long(), "integer labels, got torch.float32"),
        (torch.zeros(3).long(), torch.zeros(3).bool(), "integer labels, got torch.bool"),
    ],
)
def test_label_accuracy_refuses(recovered, true, message):
    with pytest.raises(ValueError, match=message):
        label_accuracy(recovered, true)


@settings(deadline=None, derandomize=True)
@given(batch=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_assignment_is_the_best_of_all_permutations(batch, seed):
    x, y = images(2, batch, 1, 2, 2, seed=seed), images(2, batch, 1, 2, 2, seed=seed + 1)
    permutation = match_batch(x, y)
    for v in range(2):
        best = min(
            float(mse(x[v, list(order)], y[v]).sum())
            for order in itertools.permutations(range(batch))
        )
        assert sorted(permutation[v].tolist()) == list(range(batch))
        assert float(mse(x[v, permutation[v]], y[v]).sum()) == pytest.approx(best, rel=1e-9)


def test_assignment_undoes_a_shuffle_victim_by_victim():
    y = images(6, 8, 3, 8, 8)
    shuffles = images(6, 8, seed=1).argsort(dim=1)
    x = y[torch.arange(6)[:, None], shuffles]
    permutation = match_batch(x, y)
    assert permutation.dtype == torch.int64
    assert torch.equal(shuffles.gather(1, permutation), torch.arange(8).expand(6, 8))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_diverged_reconstruction_leaves_the_others_their_partners(poison):
    y = images(2, 4, 1, 8, 8)
    x = y.flip(1).clone()
    x[0, 1, 0, 0, 0] = poison  # was the partner of original 2
    assert match_batch(x, y).tolist() == [[3, 2, 1, 0], [3, 2, 1, 0]]


def test_assignment_refuses_a_missing_axis_and_takes_no_victim():
    with pytest.raises(ValueError, match="got shape \\(2, 1, 8, 8\\); add the missing axes"):
        match_batch(images(2, 1, 8, 8), images(2, 1, 8, 8))
    assert match_batch(images(0, 3, 1, 8, 8), images(0, 3, 1, 8, 8)).shape == (0, 3)


def test_score_is_tidy_and_equals_the_definitions():
    y = images(3, 2, 3, 12, 10, seed=1)
    x = (y + 0.1 * (images(3, 2, 3, 12, 10, seed=2) - 0.5)).flip(1)
    labels = torch.tensor([[5, 4], [5, 4], [4, 5]])
    table = score(x, y, labels=labels, true_labels=torch.tensor([[4, 5]] * 3))
    assert list(table.columns) == [
        "victim",
        "image",
        "reconstruction",
        "mse",
        "psnr_db",
        "ssim",
        "clamped",
        "label_correct",
    ]
    assert table.victim.tolist() == [0, 0, 1, 1, 2, 2]
    assert table.image.tolist() == [0, 1] * 3
    assert table.reconstruction.tolist() == [1, 0] * 3
    assert table.label_correct.tolist() == [True] * 4 + [False] * 2
    for row in table.itertuples():
        a = x[row.victim, row.reconstruction].clamp(0, 1).numpy()
        b = y[row.victim, row.image].numpy()
        error = np.mean((a - b) ** 2)
        assert row.mse == pytest.approx(error, rel=1e-12)
        assert row.psnr_db == pytest.approx(-10 * np.log10(error), rel=1e-12)
        assert row.ssim == pytest.approx(
            structural_similarity(a, b, channel_axis=0, data_range=1), abs=1e-10
        )
        assert row.clamped == bool((x[row.victim, row.reconstruction] != torch.tensor(a)).any())
    assert table.clamped.dtype == bool


def test_score_clamps_and_says_so_for_the_right_image():
    y = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])[None].double()
    x = torch.stack([y[0, 1] + 0.5, y[0, 0]])[None]  # swapped, the bright one too bright
    table = score(x, y)
    assert table.mse.tolist() == [0.0, 0.0]
    assert table.clamped.tolist() == [False, True]
    assert "label_correct" not in table


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_score_of_a_diverged_victim_is_nan_and_no_other_is(poison):
    x, y = images(3, 1, 1, 8, 8, seed=1), images(3, 1, 1, 8, 8, seed=2)
    clean = score(x, y)
    x[1, 0, 0, 2, 2] = poison
    table = score(x, y)
    assert table.loc[1, ["mse", "psnr_db", "ssim"]].isna().all()
    assert not table.clamped[1]
    pd.testing.assert_frame_equal(table.drop(1), clean.drop(1))


def test_score_reads_attack_output_as_it_comes():
    x = images(2, 1, 1, 8, 8).float().requires_grad_()
    assert score(x, images(2, 1, 1, 8, 8).float()).shape == (2, 7)


def test_score_refuses():
    x = images(2, 1, 1, 8, 8)
    labels = torch.zeros(2, 1).long()
    with pytest.raises(ValueError, match="pass both or neither"):
        score(x, x, labels=labels)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 1\), got \(1, 2\)"):
        score(x, x, labels=labels.T, true_labels=labels.T)
    with pytest.raises(ValueError, match="integer labels"):
        score(x, x, labels=labels.float(), true_labels=labels)
    with pytest.raises(ValueError, match="originals in"):
        score(x, x + 1)
    with pytest.raises(ValueError, match="at least 7 x 7"):
        score(x[..., :4, :4], x[..., :4, :4])


def test_score_offers_lpips(monkeypatch):
    seen = {}

    def fake(x, y, *, net):
        seen["net"] = net
        return (x - y).abs().mean(dim=(-3, -2, -1))

    monkeypatch.setattr(scores, "lpips", fake)
    x, y = images(2, 1, 1, 8, 8, seed=1), images(2, 1, 1, 8, 8, seed=2)
    table = score(x, y, lpips_net="vgg")
    assert seen == {"net": "vgg"}
    assert table.lpips.tolist() == (x - y).abs().mean(dim=(2, 3, 4)).flatten().tolist()
