"""How much of a sentence came back: token accuracy and ROUGE, on lists of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from torch import Tensor

Tokens = Sequence[Hashable] | Tensor


def token_accuracy(recovered: Tokens, true: Tokens) -> float:
    """Share of positions that hold the right token.

    Args:
        recovered: tokens of one sentence, words or numbers.
        true: the private tokens, as many.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: lengths that differ, or no token.

    >>> token_accuracy("the cat sat".split(), "the dog sat".split()) == 2 / 3
    True
    """
    if len(recovered) != len(true) or not len(true):
        raise ValueError(
            f"expected two sentences of one length >= 1, got {len(recovered)} and {len(true)} "
            "tokens; compare sentences of different lengths by rouge_1 or rouge_l"
        )
    pairs = zip(_listed(recovered), _listed(true), strict=True)
    return sum(a == b for a, b in pairs) / len(true)


def rouge_1(recovered: Tokens, true: Tokens) -> float:
    """ROUGE-1 as F1: overlap of the two bags of words, order ignored.

    With o = Σ_w min(count in recovered, count in true), F1 = 2 o / (|recovered| + |true|).
    Source: Lin 2004, ROUGE-N with N = 1, precision and recall weighted alike.

    Args:
        recovered: tokens of one sentence.
        true: the private tokens; the lengths may differ.

    Returns:
        A number in [0, 1]; 0 when either is empty.

    >>> rouge_1("sat the cat".split(), "the cat sat down here".split())
    0.75
    """
    overlap = Counter(_listed(recovered)) & Counter(_listed(true))
    return _f1(overlap.total(), len(recovered), len(true))


def rouge_l(recovered: Tokens, true: Tokens) -> float:
    """ROUGE-L as F1: the longest common subsequence of tokens, gaps allowed.

    F1 = 2 LCS / (|recovered| + |true|). Source: Lin 2004, sentence level, β = 1.

    Args:
        recovered: tokens of one sentence.
        true: the private tokens; the lengths may differ.

    Returns:
        A number in [0, 1]; 0 when either is empty.

    >>> rouge_l("sat the cat".split(), "the cat sat down here".split())
    0.5
    """
    best = [0] * (len(true) + 1)  # LCS of what was read of `recovered` with each prefix of `true`
    words = _listed(true)
    for token in _listed(recovered):
        diagonal = 0
        for j, other in enumerate(words, start=1):
            above = best[j]
            best[j] = diagonal + 1 if token == other else max(above, best[j - 1])
            diagonal = above
    return _f1(best[-1], len(recovered), len(true))


def _listed(tokens: Tokens) -> list[Hashable]:
    """Tokens that compare by value: the entries of a tensor hash by identity."""
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)


def _f1(overlap: int, recovered: int, true: int) -> float:
    return 2 * overlap / (recovered + true) if recovered and true else 0.0
