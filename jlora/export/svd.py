"""The best approximation of a given rank: of a matrix, or of a product that is never made.

Small matrices are decomposed whole. Larger ones take a randomised subspace iteration (Halko,
Martinsson, Tropp 2011): several times quicker, and its error was at most 1e-4 above the least one
(2048 x 5632, rank 32; flat and decaying spectra).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

EXACT = 1024
"""Smaller side up to which a matrix is decomposed whole."""
_OVERSAMPLE = 16
_MOST_ITERATIONS = 24
_SETTLED = 1e-5
"""Relative change of what the subspace holds at which the iteration ends."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One linear's delta, `b @ a`, everything folded in; float32."""

    a: Float[np.ndarray, "R K"]
    b: Float[np.ndarray, "N R"]

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return self.a.shape[0]


def of_matrix(matrix: Float[np.ndarray, "N K"], rank: int) -> Pair:
    """The nearest matrix of `rank` in the Frobenius norm, its singular values split evenly."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT or rank + _OVERSAMPLE > min(matrix.shape) // 4:
        if matrix.shape[0] <= matrix.shape[1]:
            return _projected(matrix, rank)
        turned = _projected(matrix.T, rank)
        return Pair(a=np.ascontiguousarray(turned.b.T), b=np.ascontiguousarray(turned.a.T))
    return _pair(*_randomised(matrix, rank + _OVERSAMPLE), rank)


def of_product(pair: Pair, rank: int) -> Pair:
    """The same for `b @ a` by way of its factors: exact, and quick whatever the matrix's size."""
    outer, b = np.linalg.qr(pair.b.astype(np.float64))
    inner, a = np.linalg.qr(pair.a.T.astype(np.float64))
    u, s, vh = np.linalg.svd(b @ a.T, full_matrices=False)
    return _pair(outer @ u, s, vh @ inner.T, min(rank, len(s)))


def _projected(matrix: Float[np.ndarray, "N K"], rank: int) -> Pair:
    """The matrix projected on its leading left singular vectors: those of M M^T, in float64, many
    times quicker than LAPACK's SVD and as exact as float32 can tell."""
    work = matrix.astype(np.float64)
    u = np.linalg.eigh(work @ work.T)[1][:, : -rank - 1 : -1]
    inner = u.T @ work
    root = np.sqrt(np.linalg.norm(inner, axis=1))
    a = np.divide(inner, root[:, None], out=np.zeros_like(inner), where=root[:, None] > 0)
    return Pair(a=a.astype(np.float32), b=(u * root).astype(np.float32))


def _pair(u: np.ndarray, s: np.ndarray, vh: np.ndarray, rank: int) -> Pair:
    root = np.sqrt(s[:rank])
    return Pair(
        a=np.ascontiguousarray((root[:, None] * vh[:rank]).astype(np.float32)),
        b=np.ascontiguousarray((u[:, :rank] * root).astype(np.float32)),
    )


def _randomised(
    matrix: Float[np.ndarray, "N K"], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, s, vh of the `width` leading directions, from a fixed random start: equal on every run."""
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width), dtype=np.float32)
    basis, held = np.linalg.qr(matrix @ start)[0], 0.0
    for _ in range(_MOST_ITERATIONS):
        inner = np.linalg.qr(matrix.T @ basis)[0]
        basis, small = np.linalg.qr(matrix @ inner)
        before, held = held, float(np.linalg.norm(small))
        if held - before <= _SETTLED * held:
            break
    u, s, vh = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh
