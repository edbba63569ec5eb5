"""Training a small transformer and its embedding table together, plainly."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding


def train_on_tokens(
    model: nn.Module,
    table: Tensor,
    tokens: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 3e-3,
    generator: torch.Generator,
) -> tuple[Tensor, pd.DataFrame]:
    """Minimise the mean cross-entropy over shuffled batches by Adam; network and table both move.

    Args:
        model: logits from embeddings (sentences, tokens, dim); changed in place.
        table: (words, dim), embeddings to start from; left as it is.
        tokens: (sentences, tokens) int64.
        labels: (sentences,) classes, or (sentences, tokens) next tokens; int64.
        epochs: passes over the sentences, >= 0; none gives the table back as it is.
        batch_size: sentences a step.
        lr: learning rate of Adam, with PyTorch's other defaults.
        generator: source of the order; advanced.

    Returns:
        The trained table, and a history with `epoch` from 1, `loss` (nats, mean over the labels)
        and `accuracy` in [0, 1] as seen while training.

    Raises:
        ValueError: settings out of range, or tokens and labels that do not fit.
        FloatingPointError: the loss is no longer finite.
    """
    if epochs < 0 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(
            "expected epochs >= 0, batch_size >= 1 and finite lr > 0, got "
            f"epochs={epochs}, batch_size={batch_size}, lr={lr}"
        )
    _check(tokens, labels)
    weights = table.detach().clone().requires_grad_()
    steps = torch.optim.Adam([*model.parameters(), weights], lr=lr)
    history = []
    with torch.enable_grad():
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(tokens), generator=generator, device=generator.device)
            total, hits = 0.0, 0
            for rows in order.to(tokens.device).split(batch_size):
                logits = model(embedding(tokens[rows], weights))
                loss = cross_entropy(logits, labels[rows])
                steps.zero_grad()
                loss.backward()
                steps.step()
                total += loss.item() * len(rows)
                hits += int((logits.argmax(1) == labels[rows]).sum())
            if not math.isfinite(total):
                raise FloatingPointError(f"loss {total} in epoch {epoch}: lower lr={lr}")
            row = {"epoch": epoch, "loss": total / len(tokens), "accuracy": hits / labels.numel()}
            history.append(row)
    steps.zero_grad()
    return weights.detach(), pd.DataFrame(history, columns=["epoch", "loss", "accuracy"])


@torch.no_grad()
def evaluate_on_tokens(
    model: nn.Module, table: Tensor, tokens: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy in nats; its exponential is the perplexity.

    Args:
        model: logits from embeddings (sentences, tokens, dim).
        table: (words, dim), embeddings.
        tokens: (sentences, tokens) int64.
        labels: (sentences,) or (sentences, tokens) int64.

    Returns:
        (accuracy, loss).

    Raises:
        ValueError: tokens and labels that do not fit.
    """
    _check(tokens, labels)
    logits = model(embedding(tokens, table))
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return accuracy, cross_entropy(logits, labels).item()


def _check(tokens: Tensor, labels: Tensor) -> None:
    fits = labels.shape in (tokens.shape, tokens.shape[:1])
    if tokens.ndim != 2 or not len(tokens) or not fits:
        raise ValueError(
            "expected tokens (sentences, tokens), at least one, and labels (sentences,) or "
            f"(sentences, tokens), got {tuple(tokens.shape)} and {tuple(labels.shape)}"
        )
    if tokens.dtype != torch.int64 or labels.dtype != torch.int64:
        raise ValueError(f"expected int64 numbers, got {tokens.dtype} and {labels.dtype}")
