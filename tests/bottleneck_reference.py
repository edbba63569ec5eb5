"""The perceptron with a bottleneck by hand, its divergence by torch.distributions."""

import math

import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence


def naive_loss(model, images, labels, noise, *, beta, reduction="mean"):
    """CE + β KL in bits by hand and by torch.distributions."""
    features = model.hidden1(images.flatten(1)).relu()
    pair = model.fc
    out = pair.bottleneck.encoder(features)
    width = out.shape[1] // 2
    mean, deviation = out[:, :width], F.softplus(out[:, width:])
    code = mean + noise * deviation
    logits = pair.layer(pair.bottleneck.decoder(code))
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    bits = kl_divergence(Normal(mean, deviation), prior).sum(1) / math.log(2)
    loss = F.cross_entropy(logits, labels, reduction=reduction)
    return loss + beta * (bits.mean() if reduction == "mean" else bits.sum())
