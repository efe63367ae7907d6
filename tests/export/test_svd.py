"""Truncated SVDs against numpy's whole one."""

import numpy as np
import pytest

from jlora.export import svd
from jlora.export.svd import Pair, of_matrix, of_product


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def best(matrix, rank):
    u, s, vh = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float(np.linalg.norm(s[rank:]))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (5, 5)])
def test_a_small_matrix_gets_the_best_approximation_of_the_rank(shape):
    matrix = normal(*shape)
    pair = of_matrix(matrix, 7)
    expected, _ = best(matrix, min(7, *shape))
    assert pair.rank == min(7, *shape)
    np.testing.assert_allclose(pair.b @ pair.a, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(pair.a), np.linalg.norm(pair.b), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 5, 9, 30])
def test_a_product_is_cut_without_being_made(rank):
    whole = Pair(a=normal(9, 50, seed=1), b=normal(30, 9, seed=2))
    pair = of_product(whole, rank)
    expected, _ = best(whole.b @ whole.a, rank)
    np.testing.assert_allclose(pair.b @ pair.a, expected, atol=1e-4)


@pytest.mark.parametrize("decay", ["flat", "slow", "low_rank"])
def test_the_randomised_way_loses_next_to_nothing_whatever_the_spectrum(monkeypatch, decay):
    monkeypatch.setattr(svd, "EXACT", 0)
    matrix = normal(400, 300)
    if decay == "slow":
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        matrix = (u * (1 / np.sqrt(1 + np.arange(len(s))))) @ vh
    if decay == "low_rank":
        matrix = normal(400, 12, seed=3) @ normal(12, 300, seed=4) + 1e-3 * matrix
    pair = of_matrix(matrix.astype(np.float32), 12)
    _, least = best(matrix, 12)
    error = float(np.linalg.norm(matrix - pair.b @ pair.a))
    assert least * (1 - 1e-5) <= error <= least * (1 + 1e-3)
