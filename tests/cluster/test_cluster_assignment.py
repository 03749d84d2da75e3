"""Balanced assignment: bounds of the clusters and optimality, against the Hungarian method and linear programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import eye, kron, vstack

from megaxelm.cluster import assignment, prices, transport
from megaxelm.cluster.assignment import balanced_assignment, bounds
from megaxelm.cluster.prices import Problem, balance
from megaxelm.errors import ClusterError


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


def relaxed(costs: np.ndarray, weights: np.ndarray, low: float, high: float) -> float:
    """The least cost where rows may be split between clusters that weigh from low to high."""
    count, k = costs.shape
    load = kron(weights[None], eye(k))
    return linprog(
        (costs * weights[:, None]).ravel(),
        A_ub=vstack([load, -load]),
        b_ub=np.r_[np.full(k, high), np.full(k, -low)],
        A_eq=kron(eye(count), np.ones((1, k))),
        b_eq=np.ones(count),
    ).fun


def some_costs(rng: np.random.Generator, count: int, k: int, kind: str) -> NDArray[np.float64]:
    costs = rng.random((count, k))
    if kind == "ties":
        return np.round(costs, 1)
    if kind == "skewed":
        costs[:, 0] *= 0.01
    if kind == "repeated":
        return np.repeat(costs[: 1 + count // 10], 10, axis=0)[:count]
    return costs


KINDS = st.sampled_from(["smooth", "ties", "skewed", "repeated"])


@pytest.fixture
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs take the way of large ones: prices of a sample, a few rows picked, the rest settled."""
    monkeypatch.setattr(assignment, "_FEW_ROWS", 5)
    monkeypatch.setattr(assignment, "_SAMPLE_ROWS", 10)
    monkeypatch.setattr(assignment, "_SAMPLE_ROWS_A_CLUSTER", 2)
    monkeypatch.setattr(prices, "_BLOCK_COSTS", 40)


@settings(deadline=None, max_examples=150)
@given(count=st.integers(1, 40), k=st.integers(1, 7), seed=st.integers(0, 10**6), kind=KINDS, warm=st.booleans())
def test_assignment_is_balanced_and_optimal(count: int, k: int, seed: int, kind: str, warm: bool) -> None:
    rng = np.random.default_rng(seed)
    costs = some_costs(rng, count, k, kind)
    labels, prices = balanced_assignment(costs, rng.normal(size=k) if warm else None)
    sizes = np.bincount(labels, minlength=k)
    assert sizes.max() - sizes.min() <= 1
    paid = costs[np.arange(count), labels]
    assert paid.sum() == pytest.approx(cheapest(costs), abs=1e-9)
    # The prices prove it: at them nobody would rather be elsewhere.
    assert (paid + prices[labels] <= (costs + prices).min(axis=1) + 1e-9).all()


@pytest.mark.parametrize("kind", ["smooth", "ties", "skewed", "repeated"])
@pytest.mark.parametrize(("count", "k"), [(150, 6), (203, 5), (90, 2)])
def test_picking_few_rows_at_a_time_gives_the_optimum_of_all(few_rows_at_a_time: None, kind: str, count: int, k: int) -> None:
    for seed in range(4):
        costs = some_costs(np.random.default_rng(seed), count, k, kind)
        labels, _ = balanced_assignment(costs)
        assert np.ptp(np.bincount(labels, minlength=k)) <= 1
        assert costs[np.arange(count), labels].sum() == pytest.approx(cheapest(costs), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 50),
    k=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    kind=KINDS,
    tolerance=st.sampled_from([0.01, 0.1, 0.3, 0.9, 1.5, 20.0]),
)
def test_a_tolerance_is_kept_and_used_fully(count: int, k: int, seed: int, kind: str, tolerance: float) -> None:
    costs = some_costs(np.random.default_rng(seed), count, k, kind)
    limits = bounds(count, k, None, tolerance)
    labels, _ = balanced_assignment(costs, tolerance=tolerance)
    sizes = np.bincount(labels, minlength=k)
    assert limits.low <= sizes.min() and sizes.max() <= limits.high
    assert costs[np.arange(count), labels].sum() == pytest.approx(relaxed(costs, np.ones(count), limits.low, limits.high), abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 60),
    k=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    kind=KINDS,
    spread=st.sampled_from([0.1, 1.0, 2.5]),
    tolerance=st.sampled_from([0.0, 0.2, 2.0]),
)
def test_weights_are_balanced_within_the_heaviest_row(count: int, k: int, seed: int, kind: str, spread: float, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    costs, weights = some_costs(rng, count, k, kind), rng.lognormal(0, spread, size=count)
    labels, _ = balanced_assignment(costs, weights=weights, tolerance=tolerance)
    loads, equal = np.bincount(labels, weights, minlength=k), weights.sum() / k
    assert loads.max() < (1 + tolerance) * equal + weights.max() * (1 + 1e-9)
    assert loads.min() > max(0.0, 1 - tolerance) * equal - weights.max() * (1 + 1e-9)


def test_with_weights_the_cost_is_near_the_least(few_rows_at_a_time: None) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        costs, weights = rng.random((300, 5)), rng.lognormal(0, 1, size=300)
        labels, _ = balanced_assignment(costs, weights=weights, tolerance=0.05)
        limits = bounds(300, 5, weights, 0.05)
        paid, least = (weights * costs[np.arange(300), labels]).sum(), relaxed(costs, weights, limits.low, limits.high)
        by_chance = (weights[:, None] * costs).sum() / 5
        assert paid - least < 0.02 * (by_chance - least)


def test_an_endless_tolerance_is_the_cheapest_cluster_of_each_row() -> None:
    costs = np.random.default_rng(0).random((500, 6))
    for weights in (None, np.random.default_rng(1).random(500) + 0.1):
        assert np.array_equal(balanced_assignment(costs, weights=weights, tolerance=float("inf"))[0], costs.argmin(axis=1))


@pytest.mark.parametrize(
    ("count", "k", "tolerance", "low", "high"),
    [(10, 3, 0.0, 3, 4), (9, 3, 0.0, 3, 3), (10, 3, 0.05, 3, 4), (100, 4, 0.1, 23, 27), (100, 4, 1.0, 0, 50), (2, 5, 0.0, 0, 1)],
)
def test_bounds_are_whole_rows_and_never_narrower_than_floor_and_ceil(count: int, k: int, tolerance: float, low: int, high: int) -> None:
    limits = bounds(count, k, None, tolerance)
    assert (limits.low, limits.high) == (low, high)


@pytest.mark.parametrize("count", [9000, 20_001])
def test_rows_that_are_all_the_same_are_divided_at_once(count: int) -> None:
    sizes = np.bincount(balanced_assignment(np.ones((count, 7)))[0], minlength=7)
    assert np.ptp(sizes) <= 1
    weights = np.random.default_rng(0).random(count) + 0.5
    loads = np.bincount(balanced_assignment(np.ones((count, 7)), weights=weights)[0], weights, minlength=7)
    assert np.ptp(loads) <= 2 * weights.max()


def test_clusters_far_apart_are_balanced_too() -> None:
    """Between clusters that lie apart no row is near to a choice: those that must move are still found."""
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(4, 3)) * 100
    vectors = centres[rng.choice(4, size=12_000, p=[0.7, 0.2, 0.06, 0.04])] + rng.normal(size=(12_000, 3))
    costs = ((vectors[:, None] - centres) ** 2).sum(axis=2)
    labels, prices = balanced_assignment(costs)
    assert np.bincount(labels).tolist() == [3000] * 4
    paid = costs[np.arange(len(costs)), labels]
    assert (paid + prices[labels] <= (costs + prices).min(axis=1) + 1e-9 * costs.max()).all()


def test_good_prices_from_a_like_problem_change_no_optimum() -> None:
    costs = np.random.default_rng(3).random((6000, 5))
    labels, prices = balanced_assignment(costs)
    again, _ = balanced_assignment(costs, prices)
    assert np.array_equal(labels, again)


def test_tensors_give_tensors_and_lower_precision_is_optimal_up_to_its_rounding() -> None:
    costs = np.random.default_rng(4).random((5000, 4))
    exact = costs[np.arange(5000), balanced_assignment(costs)[0]].sum()
    labels, _ = balanced_assignment(torch.from_numpy(costs).float())
    assert labels.dtype == torch.int64
    assert costs[np.arange(5000), labels.numpy()].sum() == pytest.approx(exact, rel=1e-6)


def test_no_rows_need_no_clusters() -> None:
    assert balanced_assignment(np.zeros((0, 3)))[0].shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance of -0.1 .* choose 0 or more"),
        ({"tolerance": float("nan")}, "tolerance of nan"),
        ({"weights": np.ones(3)}, r"weights of shape \[3\] for 4 rows"),
        ({"weights": np.array([1.0, 2.0, 0.0, 1.0])}, "not a positive number"),
        ({"weights": np.array([1.0, 2.0, np.inf, 1.0])}, "not a positive number"),
    ],
)
def test_a_tolerance_or_weight_out_of_range_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        balanced_assignment(np.ones((4, 2)), **options)


def test_a_cost_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ClusterError, match="NaN or infinite"):
        balanced_assignment(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_the_cheapest_cluster_and_how_much_dearer_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "_BLOCK_COSTS", 40)
    rng = np.random.default_rng(5)
    costs, added = rng.random((6, 50)), rng.normal(size=6)
    labels, margin = prices.cheapest(torch.from_numpy(costs), added)
    offers = np.sort(costs + added[:, None], axis=0)
    assert np.array_equal(labels.numpy(), (costs + added[:, None]).argmin(axis=0))
    assert np.allclose(margin.numpy(), offers[1] - offers[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_prices_alone_leave_little_in_the_wrong_cluster(weighted: bool) -> None:
    rng = np.random.default_rng(6)
    costs = rng.random((8, 4000)) * rng.uniform(0.2, 1.0, size=8)[:, None]
    weights = rng.uniform(0.5, 1.5, size=4000) if weighted else None
    equal = (4000.0 if weights is None else float(weights.sum())) / 8
    problem = Problem(torch.from_numpy(costs), weights, np.zeros(8), 0.9 * equal, 1.1 * equal)
    found = balance(problem, np.zeros(8), enough=16.0)
    loads = problem.loads((costs + found[:, None]).argmin(axis=0))
    assert np.abs(loads - problem.wanted(found, loads)).sum() <= 16.0
    assert (found == 0).any() and (found > 0).any() and (found < 0).any()


def test_prices_are_found_where_the_present_ones_send_every_row_to_one_cluster() -> None:
    rng = np.random.default_rng(7)
    costs = rng.random((9, 3000)) + 5 * rng.random(9)[:, None]
    problem = Problem(torch.from_numpy(costs).float(), None, np.zeros(9), 333.0, 334.0)
    found = balance(problem, np.zeros(9), enough=9.0)
    assert np.abs(problem.loads((costs + found[:, None]).argmin(axis=0)) - 3000 / 9).sum() <= 20


@pytest.mark.parametrize("weighted", [False, True])
def test_the_slope_and_the_curvature_of_the_smooth_dual_are_its_derivatives(weighted: bool) -> None:
    rng = np.random.default_rng(8)
    costs, weights = torch.from_numpy(rng.random((4, 60))), rng.random(60) + 0.5 if weighted else None
    problem = Problem(costs, weights, rng.random(4) * 5, 10.0, 20.0)
    on_device = None if weights is None else torch.from_numpy(weights)
    at, hair = np.array([0.1, -0.2, 0.05, 0.3]), 1e-6
    here = prices._Smooth.at(problem, on_device, at, 0.1)
    for cluster, step in enumerate(hair * np.eye(4)):
        more, less = (prices._Smooth.at(problem, on_device, at + sign * step, 0.1) for sign in (1, -1))
        assert (more.value - less.value) / (2 * hair) == pytest.approx(here.excess[cluster], rel=1e-6)
        assert np.allclose((less.excess - more.excess) / (2 * hair), here.curvature[cluster], rtol=1e-6, atol=1e-6)


def test_picked_rows_are_the_nearest_to_leave_and_to_enter_each_cluster() -> None:
    """The last cluster lies apart: its rows are far from any choice, and still some are picked to leave it and to enter it."""
    rng = np.random.default_rng(9)
    costs = rng.random((4, 2000))
    costs[3, :1500] += 50
    costs[:3, 1500:] += 50
    problem = Problem(torch.from_numpy(costs), None, np.zeros(4), 500.0, 500.0)
    labels, margin = prices.cheapest(problem.costs, np.zeros(4))
    rows = assignment._near_to_a_choice(problem, np.zeros(4), labels, margin, 80).numpy()
    own = np.flatnonzero(labels.numpy() == 3)
    assert set(own[np.argsort(margin.numpy()[own])[:10]]) <= set(rows)
    dearer = costs[3] - costs.min(axis=0)
    assert set(np.argsort(np.where(labels.numpy() == 3, np.inf, dearer))[:10]) <= set(rows)
    assert 40 <= len(rows) <= 120 and (np.diff(rows) > 0).all()


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 7.0)])
def test_what_is_not_picked_is_settled_and_counts(weights: np.ndarray | None) -> None:
    problem = Problem(torch.zeros(2, 6), weights, np.array([10.0, 20.0]), 0.0, 99.0)
    some = problem.only(torch.tensor([1, 4]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert some.settled.tolist() == ([12.0, 22.0] if weights is None else [14.0, 30.0])
    assert some.costs.shape == (2, 2) and (some.weights is None or some.weights.tolist() == [2.0, 5.0])


def test_prices_that_move_farther_than_a_settled_row_is_from_a_choice_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are picked are wrong ones at first: those that are left must not be taken for settled."""
    picked = []

    def badly(problem: Problem, at: np.ndarray, labels: torch.Tensor, margin: torch.Tensor, number: int) -> torch.Tensor:
        picked.append(number)
        return margin.argsort(descending=True)[:number].sort().values if len(picked) == 1 else near(problem, at, labels, margin, number)

    near = assignment._near_to_a_choice
    monkeypatch.setattr(assignment, "_near_to_a_choice", badly)
    monkeypatch.setattr(assignment, "_FEW_ROWS", 100)
    costs = np.random.default_rng(10).random((400, 4))
    labels, _ = balanced_assignment(costs, np.array([0.0, 0.01, -0.01, 0.0]))
    assert np.bincount(labels).tolist() == [100] * 4 and len(picked) > 1
    assert costs[np.arange(400), labels].sum() == pytest.approx(cheapest(costs), abs=1e-9)


def test_rows_of_the_same_cost_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    move = transport._Flow._move
    monkeypatch.setattr(transport._Flow, "_move", lambda flow, end, before: (moves.append(end), move(flow, end, before)))
    labels, _ = balanced_assignment(np.ones((3000, 6)))
    assert np.bincount(labels).tolist() == [500] * 6 and len(moves) <= 10
