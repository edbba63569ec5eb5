"""A small transformer on input embeddings: the private input is continuous, as for pictures.

The table that turns words into embeddings is outside: it is public, frozen, and its gradient is not
shared. (If it were, its non-zero rows would name the words.) Attention is written out in einsum,
which derives twice and batches; nothing is random in any mode.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from leaklib.models.initialisation import activation_by_name, check_initialisation, initialise_
from leaklib.seeding import global_seed

Norm = Literal["post", "pre"]


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q Kᵀ / √(dim/heads)) V, then a linear map.

    Args:
        dim: features of a token; a multiple of `heads`.
        heads: attention heads.
        causal: position t attends to positions 0..t only.
        bias: whether the four linear maps have one.
    """

    def __init__(self, dim: int, heads: int, *, causal: bool, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, tokens, dim)` to the same shape."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if self.causal:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device)
            scores = scores.masked_fill(ones.triu(1), -math.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.out(mixed.flatten(-2))


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input.

    "post": x ← LN(x + f(x)), the original transformer's and BERT's order. "pre": x ← x + f(LN(x)),
    GPT-2's order. `bias` is that of the linear maps, `eps` that of the norms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        act: nn.Module,
        norm: Norm,
        causal: bool,
        *,
        bias: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.attention = Attention(dim, heads, causal=causal, bias=bias)
        self.attention_norm = nn.LayerNorm(dim, eps=eps)
        self.network = nn.Sequential(
            nn.Linear(dim, hidden, bias=bias), act, nn.Linear(hidden, dim, bias=bias)
        )
        self.network_norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, tokens, dim)` to the same shape."""
        if self.pre:
            x = x + self.attention(self.attention_norm(x))
            return x + self.network(self.network_norm(x))
        x = self.attention_norm(x + self.attention(x))
        return self.network_norm(x + self.network(x))


class Transformer(nn.Module):
    """Embeddings `(batch, tokens, dim)` to logits; see `transformer`."""

    def __init__(
        self,
        tokens: int,
        dim: int,
        outputs: int,
        *,
        task: str,
        layers: int,
        heads: int,
        hidden: int,
        activation: str,
        norm: Norm,
        position_std: float,
    ) -> None:
        super().__init__()
        causal = task == "next token"
        act = activation_by_name(activation)
        self.pooled = not causal
        self.positions = nn.Parameter(position_std * torch.randn(tokens, dim))
        self.blocks = nn.Sequential(
            *(Block(dim, heads, hidden, act(), norm, causal) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.head = nn.Linear(dim, outputs)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits `(batch, classes)`, or `(batch, vocabulary, tokens)` for the next tokens."""
        x = self.norm(self.blocks(embeddings + self.positions))
        if self.pooled:
            return self.head(x.mean(1))
        return self.head(x).transpose(1, 2)  # classes second, as cross_entropy wants them


def transformer(
    *,
    tokens: int,
    dim: int = 32,
    outputs: int,
    task: Literal["classify", "next token"] = "classify",
    layers: int = 1,
    heads: int = 2,
    hidden: int | None = None,
    activation: str = "gelu",
    norm: Norm = "post",
    position_std: float = 1.0,
    init: str = "default",
    seed: int = 0,
) -> Transformer:
    """Build a transformer on embeddings in eval mode, float32, on the CPU.

    Embeddings x_t plus learned positions pass `layers` blocks. "classify" pools the mean over
    tokens into one vector of logits; "next token" is causal and gives logits at every position, to
    be compared with the following token. Both fit `cross_entropy` with labels `(batch,)` or
    `(batch, tokens)`; its mean is then over sentences, or over sentences and positions.

    With norm="pre" every path from an embedding to the output passes a LayerNorm first, or is added
    to others that do so at the end: adding one constant to all features of a token changes
    nothing. The gradient then cannot tell that constant, one unknown a token. "post" has no
    such blind spot, since its first attention sees the embeddings themselves.

    Args:
        tokens: length of a sentence.
        dim: features of an embedding.
        outputs: classes, or words of the vocabulary.
        task: "classify" or "next token".
        layers: blocks.
        heads: attention heads; divides `dim`.
        hidden: width inside a block's network; None is 4 dim.
        activation: as in `build`.
        norm: "post" or "pre".
        position_std: standard deviation of the first positions. BERT and GPT-2 draw positions and
            embeddings with the same one; smaller, the gradient hardly tells the order of words.
        init: of the linear layers, as in `build`; LayerNorm starts at the identity.
        seed: of the weights.

    Returns:
        Logits from embeddings `(batch, tokens, dim)`.

    Raises:
        ValueError: unknown names, or sizes that do not fit.

    >>> model = transformer(tokens=5, dim=8, outputs=3)
    >>> model(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 3])
    >>> transformer(tokens=5, dim=8, outputs=30, task="next token")(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 30, 5])
    """
    check_initialisation(init)
    if task not in ("classify", "next token") or norm not in ("post", "pre"):
        raise ValueError(
            "expected task 'classify' or 'next token' and norm 'post' or 'pre', got "
            f"{task!r} and {norm!r}"
        )
    if min(tokens, dim, outputs, layers, heads) < 1 or dim % heads:
        raise ValueError(
            "expected tokens, dim, outputs, layers, heads >= 1 and heads dividing dim, got "
            f"tokens={tokens}, dim={dim}, outputs={outputs}, layers={layers}, heads={heads}"
        )
    with global_seed(seed):
        model = Transformer(
            tokens, dim, outputs, task=task, layers=layers, heads=heads,
            hidden=hidden or 4 * dim, activation=activation, norm=norm, position_std=position_std,
        )  # fmt: skip
        if init != "default":
            initialise_(model, init, generator=torch.default_generator)
    return model.eval()


def embedding_table(words: int, dim: int, *, seed: int = 0) -> Tensor:
    """A public table `(words, dim)` of embeddings, N(0, 1) in every feature: PyTorch's start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(words, dim, generator=generator)
