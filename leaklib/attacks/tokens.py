"""From recovered embeddings back to words: the attacker knows the public embedding table."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def nearest_tokens(
    embeddings: Tensor, table: Tensor, *, similarity: Literal["euclidean", "cosine"] = "euclidean"
) -> Tensor:
    """Token whose embedding is nearest: argmin_w ‖x_t − e_w‖, or argmax_w cos(x_t, e_w).

    Cost: one product with the table. Cosine forgives a wrong length, which some attacks leave.

    Args:
        embeddings: (..., dim), recovered embeddings; a position with NaN or infinity gets -1.
        table: (words, dim), the public embeddings.
        similarity: "euclidean" or "cosine".

    Returns:
        Token numbers (...), int64.

    Raises:
        ValueError: dimensions that differ, an empty table, or an unknown similarity.

    >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> nearest_tokens(torch.tensor([[0.7, 0.2], [0.0, 1.4]]), table).tolist()
    [1, 0]
    >>> nearest_tokens(torch.tensor([[0.7, 0.2], [0.0, 1.4]]), table, similarity="cosine").tolist()
    [1, 2]
    """
    if table.ndim != 2 or not len(table) or embeddings.shape[-1] != table.shape[1]:
        raise ValueError(
            "expected embeddings (..., dim) and a table (words, dim) of the same dim, got "
            f"{tuple(embeddings.shape)} and {tuple(table.shape)}"
        )
    if similarity not in ("euclidean", "cosine"):
        raise ValueError(f"expected similarity 'euclidean' or 'cosine', got {similarity!r}")
    rows = embeddings.double().reshape(-1, table.shape[1])
    words = table.to(rows)
    finite = rows.isfinite().all(-1)
    products = rows.nan_to_num(0.0, 0.0, 0.0) @ words.T
    if similarity == "cosine":
        # the length of a row does not change its best word; a zero word points nowhere
        lengths = words.norm(dim=1)
        scores = torch.where(lengths > 0, products / lengths.clamp_min(1e-300), -torch.inf)
    else:
        scores = 2 * products - words.square().sum(1)  # −‖x − e‖² without ‖x‖²
    tokens = scores.argmax(-1).masked_fill(~finite, -1)
    return tokens.view(embeddings.shape[:-1])
