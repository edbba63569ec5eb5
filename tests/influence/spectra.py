"""Symmetric matrices with a known spectrum, and what counts the products with them."""

import numpy as np
import torch

F64 = torch.float64


def symmetric(eigenvalues, seed=0):
    """K (victims, d, d) with the eigenvalues (victims, d), and the eigenvectors in columns."""
    eigenvalues = torch.as_tensor(np.atleast_2d(eigenvalues), dtype=F64)
    victims, d = eigenvalues.shape
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(victims, d, d, generator=generator, dtype=F64))[0]
    K = (Q * eigenvalues[:, None]) @ Q.mT
    return 0.5 * (K + K.mT), Q


def lenet_spectrum(d=784):
    """Eigenvalues like those of LeNet on MNIST: λ_max 2.7, trace about 65, condition 3e4."""
    sigma = np.interp(np.arange(d), [0, 25, 261, 522, 783], np.log([1.65, 0.6, 0.2, 0.09, 0.0095]))
    return np.exp(2 * sigma)


class Counted:
    """K as an operator that counts what goes through it."""

    def __init__(self, K):
        self.K, self.vectors, self.calls, self.busy = K, 0, 0, None

    def __call__(self, u):
        if self.busy is None:
            self.busy = torch.zeros(len(u), dtype=torch.int64)
        self.calls += 1
        self.vectors += u.shape[0] * u.shape[1]
        self.busy += (u != 0).any(-1).sum(1)
        return u @ self.K


def randn(*shape, seed=1, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
