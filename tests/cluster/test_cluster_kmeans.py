"""Balanced k-means: centres, starts, weights, devices and types of input; the assignment has its own file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from megaxelm.cluster import kmeans
from megaxelm.cluster.kmeans import balanced_kmeans, refine, squared_distances
from megaxelm.errors import ClusterError


def objective(vectors: np.ndarray, labels: np.ndarray) -> float:
    return sum(float(((vectors[labels == j] - vectors[labels == j].mean(axis=0)) ** 2).sum()) for j in np.unique(labels))


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


def test_tensors_give_tensors_and_the_same_clusters_as_numpy_in_fp32_and_fp64() -> None:
    vectors = np.random.default_rng(5).normal(size=(200, 6)).astype(np.float32)
    centres, labels = balanced_kmeans(vectors, 4, 0, 10)
    for dtype in (torch.float32, torch.float64):
        found = balanced_kmeans(torch.from_numpy(vectors).to(dtype), 4, 0, 10)
        assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
        assert np.array_equal(found[1].numpy(), labels) and np.allclose(found[0].numpy(), centres, atol=1e-6)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 1e4), (1e-6, 0.0), (1e12, 0.0)])
def test_where_the_vectors_lie_and_in_what_unit_makes_no_difference(factor: float, shift: float) -> None:
    vectors = blobs(4, 5, 30)[0]
    expected = balanced_kmeans(vectors, 5, 0, 10)[1]
    assert np.array_equal(balanced_kmeans(vectors * factor + shift, 5, 0, 10)[1], expected)


def test_the_order_of_the_vectors_does_not_change_what_given_starts_lead_to() -> None:
    vectors = np.random.default_rng(6).normal(size=(301, 5))
    order = np.random.default_rng(7).permutation(len(vectors))
    labels = np.asarray(refine(vectors, vectors[:6], 15)[1])
    permuted = np.asarray(refine(vectors[order], vectors[:6], 15)[1])
    assert np.array_equal(permuted, labels[order])


def test_one_iteration_from_given_centres_is_the_cheapest_balanced_division_and_its_means() -> None:
    vectors = np.random.default_rng(8).normal(size=(40, 3))
    start = vectors[:4]
    centres, labels = refine(vectors, start, 1)
    labels = np.asarray(labels)
    slots = np.repeat(squared_distances(vectors, start), 10, axis=1)
    rows, columns = linear_sum_assignment(slots)
    assert np.array_equal(labels, columns // 10)
    assert np.allclose(np.asarray(centres), [vectors[labels == j].mean(axis=0) for j in range(4)], atol=1e-6)


def test_where_nothing_changes_any_more_the_centres_are_means_and_each_division_is_the_cheapest() -> None:
    """Centres that went beyond their means on the way end at them."""
    for seed in range(30):
        vectors = np.random.default_rng(seed).normal(size=(80, 3))
        centres, labels = refine(vectors, vectors[:4], 200)
        means = np.stack([vectors[np.asarray(labels) == j].mean(axis=0) for j in range(4)])
        assert np.allclose(np.asarray(centres), means, atol=1e-5)
        assert np.array_equal(np.asarray(refine(vectors, means, 1)[1]), np.asarray(labels))


def test_starts_lie_in_groups_that_are_small_but_far() -> None:
    rng = np.random.default_rng(21)
    middles = rng.normal(size=(6, 5)) * 100
    truth = np.concatenate([np.zeros(3000, dtype=int), np.repeat(np.arange(1, 6), 4)])
    points = kmeans._Points.of(torch.from_numpy(middles[truth] + rng.normal(size=(len(truth), 5))), None)
    for seed in range(5):
        centres = kmeans._first_centres(points, 6, np.random.default_rng(seed)).double() * points.spread + points.middle
        assert sorted(squared_distances(centres.numpy(), middles).argmin(axis=1)) == list(range(6))


def test_an_empty_cluster_does_not_take_the_only_vector_of_another() -> None:
    points = kmeans._Points.of(torch.tensor([[0.0], [0.1], [0.3], [9.0]]), None)
    costs = points.rows.square().sum(dim=1).expand(3, 4) * torch.tensor([[0.0], [1.0], [0.0]])
    labels = torch.tensor([0, 0, 0, 1])
    kmeans._fill_empty(points, torch.zeros(3, 1), costs, labels)
    assert torch.bincount(labels, minlength=3).tolist() == [2, 1, 1] and labels[3] == 1


def test_few_iterations_get_farther_than_plain_ones() -> None:
    vectors = np.random.default_rng(18).normal(size=(3000, 4))
    centres = vectors[:6]
    for _ in range(8):
        found, labels = refine(vectors, centres, 1)
        centres = np.asarray(found)
    assert objective(vectors, np.asarray(refine(vectors, vectors[:6], 8)[1])) < objective(vectors, np.asarray(labels))


def test_every_division_on_the_way_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    divisions: list[tuple[np.ndarray, np.ndarray]] = []

    def kept(costs: torch.Tensor, *options: Any) -> tuple[torch.Tensor, np.ndarray]:
        labels, prices = assign(costs, *options)
        divisions.append((costs.numpy().copy(), labels.numpy().copy()))
        return labels, prices

    assign = kmeans.assign
    monkeypatch.setattr(kmeans, "assign", kept)
    refine(np.random.default_rng(19).normal(size=(60, 3)), np.random.default_rng(20).normal(size=(4, 3)), 5)
    for costs, labels in divisions:
        slots = np.repeat(costs.T.astype(np.float64), 15, axis=1)
        rows, columns = linear_sum_assignment(slots)
        assert np.bincount(labels).tolist() == [15] * 4
        assert costs[labels, rows].sum() == pytest.approx(slots[rows, columns].sum(), rel=1e-5)
    assert len(divisions) > 1


def test_weights_balance_what_the_clusters_weigh_and_move_their_centres() -> None:
    rng = np.random.default_rng(9)
    vectors, weights = rng.normal(size=(500, 4)), rng.lognormal(4, 1, size=500)
    centres, labels = balanced_kmeans(vectors, 5, 0, 15, weights=weights)
    loads = np.bincount(labels, weights)
    assert np.abs(loads - weights.sum() / 5).max() < weights.max()
    assert np.allclose(centres, [np.average(vectors[labels == j], axis=0, weights=weights[labels == j]) for j in range(5)], atol=1e-5)
    unweighted = np.bincount(balanced_kmeans(vectors, 5, 0, 15)[1], weights)
    assert np.ptp(loads) < np.ptp(unweighted) / 5


def test_equal_weights_are_as_none() -> None:
    vectors = np.random.default_rng(10).normal(size=(240, 4))
    labels = balanced_kmeans(vectors, 4, 0, 15, weights=np.full(240, 7.0))[1]
    assert np.bincount(labels).tolist() == [60] * 4
    assert objective(vectors, labels) == pytest.approx(objective(vectors, balanced_kmeans(vectors, 4, 0, 15)[1]), rel=0.02)


def test_a_wider_tolerance_gives_a_lower_objective_and_keeps_its_bounds() -> None:
    vectors = np.concatenate([blobs(2, 4, 30)[0], blobs(3, 1, 80)[0]])
    reached = []
    for tolerance in (0.0, 0.25, 100.0):
        labels = balanced_kmeans(vectors, 4, 0, 20, tolerance=tolerance)[1]
        sizes = np.bincount(labels, minlength=4)
        assert sizes.min() >= max(1, (1 - tolerance) * 50) and sizes.max() <= (1 + tolerance) * 50
        reached.append(objective(vectors, labels))
    assert reached[0] > reached[1] > reached[2]


def test_no_cluster_is_empty_even_where_any_size_is_allowed() -> None:
    vectors = np.concatenate([np.zeros((50, 2)), np.eye(2)])
    assert np.bincount(balanced_kmeans(vectors, 5, 0, 10, tolerance=50.0)[1], minlength=5).min() >= 1


def test_more_starts_are_no_worse_and_the_best_is_kept() -> None:
    vectors = np.random.default_rng(11).normal(size=(300, 3))
    reached = [objective(vectors, balanced_kmeans(vectors, 12, 0, 3, starts=starts)[1]) for starts in (1, 4, 12)]
    assert reached[0] >= reached[1] >= reached[2] and reached[0] > reached[2]


def test_starts_by_kmeans_plus_plus_find_blobs_that_random_starts_miss() -> None:
    vectors, truth = blobs(12, 12, 20)
    labels = balanced_kmeans(vectors, 12, 0, 20, starts=1)[1]
    assert all(len(set(labels[truth == blob])) == 1 for blob in range(12))


def test_many_vectors_start_from_a_sample_and_end_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = blobs(13, 3, 400)[0]
    monkeypatch.setattr(kmeans, "_START_ROWS", 10)
    labels = balanced_kmeans(vectors, 3, 0, 20)[1]
    assert np.bincount(labels).tolist() == [400] * 3
    assert objective(vectors, labels) == pytest.approx(objective(vectors, blobs(13, 3, 400)[1]), rel=1e-9)


def test_blocks_of_any_size_give_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(14).normal(size=(230, 5))
    expected = balanced_kmeans(vectors, 4, 0, 15)
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 7)
    found = balanced_kmeans(vectors, 4, 0, 15)
    assert np.array_equal(found[1], expected[1]) and np.allclose(found[0], expected[0], atol=1e-6)


def test_no_starts_are_an_error() -> None:
    with pytest.raises(ClusterError, match="0 starts; choose 1 or more"):
        balanced_kmeans(np.eye(3), 2, 0, 5, starts=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_clusters_as_good_as_the_cpu() -> None:
    vectors = blobs(15, 8, 1000)[0]
    _, labels = balanced_kmeans(torch.from_numpy(vectors).cuda(), 8, 0, 20)
    assert labels.is_cuda and torch.bincount(labels).tolist() == [1000] * 8
    assert objective(vectors, labels.cpu().numpy()) == pytest.approx(objective(vectors, balanced_kmeans(vectors, 8, 0, 20)[1]), rel=1e-3)
