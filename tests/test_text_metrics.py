"""Token accuracy and ROUGE against definitions written another way."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leaklib.metrics import rouge_1, rouge_l, token_accuracy

SENTENCE = st.lists(st.integers(0, 3), max_size=7)


def longest_common(a, b):
    """Every subsequence of a, longest first: slow and obvious."""
    for size in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, size):
            rest = iter(b)
            if all(token in rest for token in chosen):
                return size
    return 0


@given(SENTENCE, SENTENCE)
def test_rouge_l_is_the_longest_common_subsequence(a, b):
    expected = 2 * longest_common(a, b) / (len(a) + len(b)) if a and b else 0
    assert rouge_l(a, b) == pytest.approx(expected)


@given(SENTENCE, SENTENCE)
def test_rouge_1_is_the_overlap_of_the_bags(a, b):
    overlap = sum(min(a.count(t), b.count(t)) for t in set(a))
    precision, recall = overlap / max(len(a), 1), overlap / max(len(b), 1)
    expected = 2 * precision * recall / (precision + recall) if overlap else 0
    assert rouge_1(a, b) == pytest.approx(expected)
    assert rouge_1(a, b) == pytest.approx(rouge_1(b, a))
    assert rouge_l(a, b) <= rouge_1(a, b) + 1e-12


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.randoms())
def test_order_counts_for_rouge_l_and_accuracy_only(a, random):
    b = random.sample(a, len(a))
    assert rouge_1(b, a) == 1
    assert Counter(b) == Counter(a)
    assert (token_accuracy(b, a) == 1) == (rouge_l(b, a) == 1) == (a == b)
    assert token_accuracy(b, a) <= rouge_l(b, a) + 1e-12


def test_tensors_count_by_value():
    a, b = torch.tensor([3, 1, 2, 3]), torch.tensor([3, 1, 3, 2])
    for score in (token_accuracy, rouge_1, rouge_l):
        assert score(a, b) == score(a.tolist(), b.tolist()) > 0


def test_published_example_of_rouge_l():
    # Lin 2004, section 3.1: S1 reference, S2 and S3 candidates, beta = 1
    reference = ["police", "killed", "the", "gunman"]
    assert rouge_l(["police", "kill", "the", "gunman"], reference) == 0.75
    assert rouge_l(["the", "gunman", "kill", "police"], reference) == 0.5


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 2])])
def test_accuracy_needs_equal_lengths(a, b):
    with pytest.raises(ValueError, match="one length >= 1"):
        token_accuracy(a, b)
