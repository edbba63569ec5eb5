"""W and K of a convolution written out entry by entry, and their ranks by two independent means."""

import numpy as np

PRIME = 2**31 - 1


def dense_rows(geometry, weight, grad):
    """(W, K) as integer or real matrices: Python loops over outputs and taps, nothing shared."""
    channels, height, width = geometry.input_shape
    filters, per_group = geometry.filters, channels // geometry.groups
    (rows, columns), (high, wide) = geometry.output_size, geometry.kernel
    (down, right), (top, left) = geometry.stride, geometry.padding
    (apart, across) = geometry.dilation
    w = np.zeros((filters, rows, columns, channels, height, width), weight.dtype)
    k = np.zeros((filters, per_group, high, wide, channels, height, width), grad.dtype)
    for f in range(filters):
        first = f // (filters // geometry.groups) * per_group
        for o in range(rows):
            for q in range(columns):
                for t in range(high):
                    for u in range(wide):
                        i, j = o * down + t * apart - top, q * right + u * across - left
                        if not (0 <= i < height and 0 <= j < width):
                            continue
                        for c in range(per_group):
                            w[f, o, q, first + c, i, j] += weight[f, c, t, u]
                            k[f, c, t, u, first + c, i, j] += grad[f, o, q]
    return w.reshape(-1, geometry.unknowns), k.reshape(-1, geometry.unknowns)


def exact_rank(matrix):
    """Rank by elimination modulo a prime: no tolerance."""
    a, rank = matrix.astype(np.int64) % PRIME, 0
    for column in range(a.shape[1]):
        below = np.nonzero(a[rank:, column])[0]
        if not len(below):
            continue
        pivot = rank + below[0]
        a[[rank, pivot]] = a[[pivot, rank]]
        a[rank] = a[rank] * pow(int(a[rank, column]), PRIME - 2, PRIME) % PRIME
        others = rank + 1 + np.nonzero(a[rank + 1 :, column])[0]
        a[others] = (a[others] - a[others, column][:, None] * a[rank]) % PRIME
        rank += 1
        if rank == len(a):
            break
    return rank


def random_integers(geometry, seed):
    """Weight and gradient with entries between 1 and the prime."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(1, PRIME, geometry.weight_shape),
        rng.integers(1, PRIME, geometry.output_shape),
    )


def exact_ranks(geometry, seed=0):
    """Ranks of W, K and [W; K] for random integers: the generic ones, but for odds of 1e-6."""
    w, k = dense_rows(geometry, *random_integers(geometry, seed))
    return exact_rank(w), exact_rank(k), exact_rank(np.concatenate([w, k]))


def singular_ranks(geometry, seed=0):
    """The same by singular values, rows of W and K of one length."""
    rng = np.random.default_rng(seed)
    w, k = dense_rows(
        geometry, rng.normal(size=geometry.weight_shape), rng.normal(size=geometry.output_shape)
    )
    lengths = [np.linalg.norm(rows) / np.sqrt(len(rows)) for rows in (w, k)]
    both = np.concatenate([w / lengths[0], k / lengths[1]])
    return tuple(int(np.linalg.matrix_rank(rows, tol=1e-9)) for rows in (w, k, both))
