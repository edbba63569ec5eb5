"""Reading embeddings back as words."""

import pytest
import torch

from leaklib.attacks import nearest_tokens
from leaklib.data import load_sentences


def table(words=30, dim=6, seed=0):
    return torch.randn(words, dim, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_nearest_is_the_nearest_of_a_loop(similarity):
    embeddings = table(20, seed=1).reshape(2, 5, 2, 6)
    found = nearest_tokens(embeddings, table(), similarity=similarity)
    assert found.shape == (2, 5, 2)
    for x, token in zip(embeddings.reshape(-1, 6), found.flatten(), strict=True):
        if similarity == "euclidean":
            scores = torch.stack([-(x - e).norm() for e in table()])
        else:
            scores = torch.stack([torch.cosine_similarity(x, e, dim=0) for e in table()])
        assert token == scores.argmax()


def test_embedded_tokens_come_back():
    tokens = torch.arange(30).reshape(3, 10)
    noisy = table()[tokens] + 1e-3 * table(30, seed=2).reshape(3, 10, 6)
    assert torch.equal(nearest_tokens(noisy, table()), tokens)
    assert torch.equal(nearest_tokens(5 * noisy, table(), similarity="cosine"), tokens)
    assert torch.equal(nearest_tokens(noisy.float(), table().float()), tokens)


def test_diverged_positions_are_no_word():
    embeddings = table()[torch.tensor([3, 4, 5])].clone()
    embeddings[0, 1], embeddings[2, 0] = torch.nan, torch.inf
    found = nearest_tokens(embeddings, table())
    assert found.tolist() == [-1, 4, -1]
    assert nearest_tokens(embeddings[1], table()).item() == 4
    assert load_sentences(count=1).words(found)[::2] == ["<lost>", "<lost>"]


def test_a_zero_word_is_near_by_distance_and_has_no_direction():
    words = torch.tensor([[0.0, 0.0], [-3.0, 0.0]])
    x = torch.tensor([[0.1, 0.0]])
    assert nearest_tokens(x, words).tolist() == [0]
    assert nearest_tokens(x, words, similarity="cosine").tolist() == [1]


def test_bad_arguments():
    with pytest.raises(ValueError, match="same dim"):
        nearest_tokens(torch.zeros(3, 5), table())
    with pytest.raises(ValueError, match="euclidean"):
        nearest_tokens(torch.zeros(3, 6), table(), similarity="dot")
