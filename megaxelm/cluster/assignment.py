"""Rows into clusters of bounded weight at the least cost, for any number of rows.

At the right prices, one a cluster, nearly every row simply takes the cheapest cluster (its cost there plus the price), and all but a
few rows are far from a choice. So: prices from a sample where none are known, one pass over all rows, then the division of those rows
that are near to a choice, in which the others are settled; and so on with fewer and fewer rows, until they are few enough for the
transportation problem (`megaxelm.cluster.transport`). If the prices that come out differ from those at the start by less than the
settled rows are from a choice, those would stay: the division is exact, whatever rows were picked. Otherwise more are picked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaxelm.cluster.prices import Floats, Problem, balance, cheapest
from megaxelm.cluster.transport import solve
from megaxelm.errors import ClusterError

EXACT_COSTS = 1 << 24
"""Costs, n x k, up to which the optimum is proved. Of more, half of the rows may at last be settled without a proof."""

_FEW_ROWS = 4096
"""So many are solved at once; also the least that are picked of more."""

_PICKED = 8  # one of so many rows is picked at first
_MORE = 4  # and so many times as many when the others would not stay
_SAMPLE_ROWS = 8192
_SAMPLE_ROWS_A_CLUSTER = 512
_MOST = 0.75  # share of the rows of which picking saves nothing
_READ_OFF = 24  # rows that the limit of a picked part is read off, of many
_FAR = 0.05  # share of the weight in the wrong cluster beyond which prices are sought on a sample first
_GAIN = 0.5  # what the next attempt must leave at most of the weight in the wrong cluster; else more rows are picked
_ROUGH = 0.01  # and the share that is near enough there
_NEAR = 0.01  # and before rows are picked


@dataclass(frozen=True)
class Bounds:
    """What a cluster may weigh."""

    low: float
    high: float


def bounds(count: int, k: int, weights: Floats | None, tolerance: float) -> Bounds:
    """Bounds of the weight of a cluster: (1 -+ tolerance) x total / k.

    Without weights in whole rows, and never narrower than floor(count / k) to ceil(count / k), which can always be met.

    Raises:
        ClusterError: if the tolerance is negative or NaN, or weights are not [count], positive and finite.
    """
    if not tolerance >= 0:
        raise ClusterError(f"balanced clusters: a tolerance of {tolerance} is not a share of the equal weight; choose 0 or more")
    if weights is None:
        floor, ceil = count // k, -(-count // k)
        low = math.ceil((1 - tolerance) * count / k) if tolerance < 1 else 0
        high = math.floor((1 + tolerance) * count / k) if tolerance < k else count
        return Bounds(float(min(floor, low)), float(max(ceil, high)))
    if weights.shape != (count,):
        raise ClusterError(f"balanced clusters: weights of shape {list(weights.shape)} for {count} rows; give one weight a row")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ClusterError("balanced clusters: a weight is not a positive number; leave out the rows that weigh nothing")
    equal = float(weights.sum()) / k
    return Bounds(max(0.0, 1 - tolerance) * equal, (1 + min(tolerance, float(k))) * equal)


@overload
def balanced_assignment(
    costs: Tensor, prices: Floats | None = None, *, weights: Tensor | NDArray[np.number] | None = None, tolerance: float = 0.0
) -> tuple[Tensor, Floats]: ...
@overload
def balanced_assignment(
    costs: NDArray[np.floating],
    prices: Floats | None = None,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
) -> tuple[NDArray[np.int64], Floats]: ...
def balanced_assignment(
    costs: Tensor | NDArray[np.floating],
    prices: Floats | None = None,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor | NDArray[np.int64], Floats]:
    """The cheapest division of n rows into k clusters of equal size or weight.

    Without `weights` each cluster holds floor(n / k) or ceil(n / k) rows, or with a tolerance t from (1 - t) n / k to (1 + t) n / k of
    them. As far as n x k <= `EXACT_COSTS` no such division is cheaper, up to the rounding of the costs. With weights each cluster weighs
    (1 -+ t) x total / k, give or take less than the heaviest row, and the cost is near the least one.

    Args:
        costs: of a unit of weight of a row in a cluster, [n, k]. n may be less than k.
        prices: of the clusters [k], from a like problem: they save time and change no optimum.
        weights: of the rows [n], positive.
        tolerance: t.

    Returns:
        the cluster of each row, int64 [n], on the device of `costs`; and prices [k], float64 in numpy. Where the optimum is
        exact they prove it: when each cluster's price is added to the costs, no row is cheaper elsewhere.

    Raises:
        ClusterError: if costs are not finite, or tolerance or weights are out of range.
    """
    matrix = costs if isinstance(costs, Tensor) else torch.from_numpy(np.ascontiguousarray(costs))
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if not torch.isfinite(matrix).all():
        raise ClusterError("balanced clusters: a cost is NaN or infinite")
    labels, found = assign(matrix.T.contiguous(), prices, as_weights(weights), tolerance)
    return (labels if isinstance(costs, Tensor) else labels.numpy()), found


def as_weights(weights: Tensor | NDArray[np.number] | None) -> Floats | None:
    """Weights as float64 on the CPU, where sums of them are formed."""
    if weights is None:
        return None
    return np.asarray(weights.cpu() if isinstance(weights, Tensor) else weights, dtype=np.float64)


def assign(costs: Tensor, prices: Floats | None, weights: Floats | None, tolerance: float) -> tuple[Tensor, Floats]:
    """`balanced_assignment` of costs that lie by cluster, [k, n]: labels [n] on their device, prices [k]."""
    k, count = costs.shape
    limits = bounds(count, k, weights, tolerance)
    start = np.zeros(k) if prices is None else np.asarray(prices, dtype=np.float64)
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=costs.device), start
    with _one_thread():
        divided = _divide(Problem(costs, weights, np.zeros(k), limits.low, limits.high), start)
    assert divided is not None, "all rows together always have a division within the bounds"
    return divided


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of short operations of torch: where other processes are at work, waiting for the second thread takes longer than all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _divide(problem: Problem, prices: Floats) -> tuple[Tensor, Floats] | None:
    """Labels [rows] and prices [k]; None where what is settled leaves these rows no division within the bounds."""
    k, count = problem.costs.shape
    if count <= _FEW_ROWS:
        return _divide_few(problem, prices)
    labels, margin = cheapest(problem.costs, prices)
    wrong = problem.wrong(prices, problem.loads(labels)) / (count * problem.mean_weight)
    if wrong > _FAR:
        sample = problem.sample(max(1, count // max(_SAMPLE_ROWS, _SAMPLE_ROWS_A_CLUSTER * k)))
        prices = balance(sample, prices, max(k, _ROUGH * sample.costs.shape[1]) * sample.mean_weight)
    if wrong > _NEAR:
        prices = balance(problem, prices, max(k, _NEAR * count) * problem.mean_weight)
        labels, margin = cheapest(problem.costs, prices)
    proved = problem.weights is None and problem.costs.numel() <= EXACT_COSTS
    picked = max(_FEW_ROWS, count // _PICKED)
    lately = np.inf
    while picked < count:
        rows = _near_to_a_choice(problem, prices, labels, margin, picked)
        if len(rows) > _MOST * count:
            break
        divided = _divide(problem.only(rows, labels), prices)
        if divided is not None:
            found, after = divided
            settled = labels.index_put((rows,), found.to(labels))
            # A settled row stays if its own price rose by less, against the one that rose least, than it was from a choice.
            rise = torch.from_numpy(after - prices - (after - prices).min()).to(margin)
            stays = rise[labels] <= margin
            stays[rows] = True
            if not bool(stays.all()):
                prices = after
                labels, margin = cheapest(problem.costs, prices)
                stays |= labels == settled
            if bool(stays.all()) or (picked * _MORE >= count and not proved):
                return settled, after
        wrong = problem.wrong(prices, problem.loads(labels))
        if wrong > _GAIN * lately or divided is None:
            picked *= _MORE
        lately = wrong
    return _divide_few(problem, prices)


def _divide_few(problem: Problem, prices: Floats) -> tuple[Tensor, Floats] | None:
    """`_divide` of all rows at once, in fp64."""
    device = problem.costs.device
    exact = replace(problem, costs=problem.costs.cpu().double())
    solution = solve(exact, balance(exact, prices, len(exact.costs) * exact.mean_weight))
    return None if solution is None else (torch.from_numpy(solution[0]).to(device), solution[1])


def _near_to_a_choice(problem: Problem, prices: Floats, labels: Tensor, margin: Tensor, picked: int) -> Tensor:
    """About `picked` rows, in order: of each cluster those that are nearest to leave it and those of others that are nearest to enter it,
    twice as many more as it has too much or too little. Clusters that lie apart have none among the nearest of all.
    """
    k, count = problem.costs.shape
    excess = problem.misfit(problem.loads(labels)) / problem.mean_weight
    step = max(1, picked // (2 * k * _READ_OFF))
    least = problem.costs.gather(0, labels[None])[0] + torch.from_numpy(prices).to(margin)[labels]
    wanted = picked / (2 * k) + 2 * np.maximum(0.0, [excess, -excess]) + 1
    leave = torch.stack([_limit(margin[::step][labels[::step] == cluster], wanted[0, cluster] / step) for cluster in range(k)])
    near = margin <= leave[labels]
    for cluster in range(k):
        dearer = problem.costs[cluster] + float(prices[cluster]) - least
        other = labels != cluster
        near |= (dearer <= _limit(dearer[::step][other[::step]], wanted[1, cluster] / step)) & other
    return near.nonzero()[:, 0]


def _limit(values: Tensor, number: float) -> Tensor:
    """The `number`-th smallest value, the largest where there are fewer."""
    if not len(values):
        return torch.tensor(-torch.inf, dtype=values.dtype, device=values.device)
    return values.kthvalue(min(math.ceil(number), len(values))).values
