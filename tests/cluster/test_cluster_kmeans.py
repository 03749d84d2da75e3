"""Balanced k-means: sizes, exactness of the assignment, objective against peers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from megaxelm.cluster.kmeans import balanced_assignment, balanced_kmeans, squared_distances
from megaxelm.errors import ClusterError


def objective(vectors: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(((vectors[labels == j] - vectors[labels == j].mean(axis=0)) ** 2).sum()) for j in np.unique(labels))


def cheapest(costs: np.ndarray) -> float:
    """The optimum by the Hungarian method: k (floor + 1) slots, of which dummies may take the last of each cluster only."""
    count, k = costs.shape
    floor = count // k
    square = np.zeros((k * (floor + 1), k * (floor + 1)))
    square[:count] = np.repeat(costs, floor + 1, axis=1)
    square[count:] = 1e9
    square[count:, floor :: floor + 1] = 0
    rows, columns = linear_sum_assignment(square)
    return float(square[rows, columns].sum())


@settings(deadline=None, max_examples=150)
@given(
    count=st.integers(1, 40),
    k=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["smooth", "ties", "skewed"]),
    warm=st.booleans(),
)
def test_assignment_is_balanced_and_optimal(count: int, k: int, seed: int, kind: str, warm: bool) -> None:
    k = min(k, count)
    rng = np.random.default_rng(seed)
    costs = rng.random((count, k))
    if kind == "ties":
        costs = np.round(costs, 1)
    elif kind == "skewed":
        costs[:, 0] *= 0.01
    labels, prices = balanced_assignment(costs, rng.normal(size=k) if warm else None)
    sizes = np.bincount(labels, minlength=k)
    assert sizes.max() - sizes.min() <= 1
    paid = costs[np.arange(count), labels]
    assert paid.sum() == pytest.approx(cheapest(costs), abs=1e-9)
    # The prices prove it: at them nobody would rather be elsewhere.
    assert (paid + prices[labels] <= (costs + prices).min(axis=1) + 1e-9).all()


def blobs(seed: int, k: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(k, 10)) * 4
    truth = np.repeat(np.arange(k), each)
    return middles[truth] + rng.normal(size=(k * each, 10)), truth


def test_equal_blobs_are_found_as_by_plain_kmeans() -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    vectors, truth = blobs(0, 6, 50)
    centres, labels = balanced_kmeans(vectors, 6, 0, 20)
    assert adjusted_rand_score(truth, labels) == 1
    assert objective(vectors, labels) == pytest.approx(KMeans(6, n_init=10, random_state=0).fit(vectors).inertia_, rel=1e-6)
    assert np.allclose(centres, [vectors[labels == j].mean(axis=0) for j in range(6)], atol=1e-5)


def test_unequal_blobs_still_give_equal_clusters_near_plain_kmeans_and_far_from_random() -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(1)
    vectors = np.concatenate([blobs(2, 4, 30)[0], blobs(3, 1, 81)[0]])
    _, labels = balanced_kmeans(vectors, 5, 0, 20)
    assert sorted(np.bincount(labels)) == [40, 40, 40, 40, 41]
    free = KMeans(5, n_init=10, random_state=0).fit(vectors).inertia_
    random = objective(vectors, rng.permutation(np.arange(len(vectors)) % 5))
    assert free <= objective(vectors, labels) < 0.6 * random


def test_the_same_input_gives_the_same_clusters() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8))
    first, second = balanced_kmeans(vectors, 7, 3, 20), balanced_kmeans(vectors, 7, 3, 20)
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all()


def test_more_rounds_do_not_make_it_worse() -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 6))
    assert objective(vectors, balanced_kmeans(vectors, 8, 0, 20)[1]) <= objective(vectors, balanced_kmeans(vectors, 8, 0, 1)[1])


@pytest.mark.parametrize(("count", "k"), [(5, 5), (7, 3), (9, 1)])
def test_equal_vectors_and_small_numbers_are_divided_too(count: int, k: int) -> None:
    centres, labels = balanced_kmeans(np.ones((count, 3)), k, 0, 5)
    sizes = np.bincount(labels, minlength=k)
    assert sizes.max() - sizes.min() <= 1 and centres.tolist() == [[1.0] * 3] * k


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_number_of_documents_is_an_error(k: int) -> None:
    with pytest.raises(ClusterError, match=rf"clusters\.k = {k}: there are 3 documents"):
        balanced_kmeans(np.eye(3), k, 0, 5)


def test_a_vector_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ClusterError, match="NaN"):
        balanced_kmeans(np.array([[0.0], [np.nan]]), 1, 0, 5)


def test_squared_distances_match_fp64() -> None:
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(20, 100)).astype(np.float32), rng.normal(size=(3, 100)).astype(np.float32)
    exact = ((x[:, None].astype(np.float64) - c[None].astype(np.float64)) ** 2).sum(axis=-1)
    assert np.abs(squared_distances(x, c) - exact).max() < 1e-11 * exact.max()
