"""Rows into clusters of bounded weight at the least cost, for any number of rows.

At the right prices, one a cluster, nearly every row simply takes the cheapest cluster (its cost there plus the price), and all but a
few rows are far from a choice. So: rough prices from every m-th row, one pass over all rows, then the transportation problem of the few
rows that are near to a choice, in which the others are settled (`megaxelm.cluster.transport`). Another pass at the prices that came out
proves that the settled rows would stay; otherwise those that would not are taken too, in the end all. So the result is exact whatever
rows were picked; beyond `EXACT_COSTS`, and with weights, the proof is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaxelm.cluster.prices import Floats, Problem, raise_prices
from megaxelm.cluster.transport import solve
from megaxelm.errors import ClusterError

BLOCK_ROWS = 16_384
"""Rows in one pass of a loop over many: of 100 float32 each they are 6.5 MB."""

EXACT_COSTS = 1 << 24
"""Costs, n x k, up to which the optimum is proved. Of more, the picked rows are divided as well as they can be and the rest is settled."""

_FEW_ROWS = 4096
"""So many are solved at once; also the least that are picked of more."""

_ROUGH_ROWS = 8192
_ROUGH_ROWS_A_CLUSTER = 512
_ROUGH = 0.1  # share of the weight beyond the bounds from which prices are first found on some of the rows
_FINE = 0.002  # and the share at which the exact search starts
_NEAR = 0.01  # and the share that is near enough on the way to the last division
_NEWTON_STEPS = 8
_PICKED_FOR_WRONG = 4  # rows picked for each that is beyond the bounds: those that must move, and those they have to pass


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


def assign(costs: Tensor, prices: Floats | None, weights: Floats | None, tolerance: float, nearly: bool = False) -> tuple[Tensor, Floats]:
    """`balanced_assignment` of costs that lie by cluster, [k, n]: labels [n] on their device, prices [k].

    `nearly`: of many rows, what is cheapest at prices that about balance it, within bounds or not.
    """
    k, count = costs.shape
    limits = bounds(count, k, weights, tolerance)
    prices = np.zeros(k) if prices is None else np.asarray(prices, dtype=np.float64)
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=costs.device), prices
    total = float(count if weights is None else weights.sum())
    heaviest = 0.0 if weights is None else float(weights.max())
    labels, margin = cheapest(costs, prices)
    if count > _FEW_ROWS:
        near = _NEAR if nearly else _FINE
        prices, labels, margin = _better_prices(costs, prices, weights, limits, tolerance, labels, margin, near)
        if nearly:
            return labels, prices
    exact = weights is None and costs.numel() <= EXACT_COSTS
    picked = max(_FEW_ROWS, round(_PICKED_FOR_WRONG * count * _wrong(labels, k, weights, limits) / total))
    kept = torch.zeros(0, dtype=torch.int64, device=costs.device)
    attempts = 0
    while True:
        excess = _excess(labels, k, weights, limits) * count / total
        rows = _nearest_to_a_choice(costs, prices, labels, margin, picked, excess)
        rows = torch.cat([rows, kept]).unique()
        problem, settled = _problem(costs, weights, limits, labels, rows)
        before = prices
        solution = solve(problem, raise_prices(problem, prices, enough=k * (1.0 if weights is None else heaviest)))
        if solution is not None:
            found, prices = solution
            labels[rows] = torch.from_numpy(found).to(labels.device)
            fits = _loads(labels, k, weights)
            misfit = np.maximum(fits - limits.high, limits.low - fits).max()
            if len(rows) == count or (misfit <= heaviest and (not exact or _would_stay(costs, before, prices, margin, settled))):
                return labels, prices
        # At better prices, and with the rows that would not have stayed, as many may do; if not, more are needed.
        labels, margin = cheapest(costs, prices)
        kept = torch.cat([rows, ((labels != settled) & (settled < k)).nonzero()[:, 0]])
        attempts += 1
        picked *= 2 if attempts % 4 == 0 or solution is None else 1


def _problem(costs: Tensor, weights: Floats | None, limits: Bounds, labels: Tensor, rows: Tensor) -> tuple[Problem, Tensor]:
    """The division of `rows` where all others stay in their cluster of `labels`; and where those are settled [n], k for `rows`."""
    k = len(costs)
    settled = labels.clone()
    settled[rows] = k
    some = None if weights is None else weights[rows.cpu().numpy()]
    loads = _loads(settled, k + 1, weights)[:k]
    return Problem(costs[:, rows].cpu().numpy().astype(np.float64), some, loads, limits.low, limits.high), settled


def _better_prices(
    costs: Tensor,
    prices: Floats,
    weights: Floats | None,
    limits: Bounds,
    tolerance: float,
    labels: Tensor,
    margin: Tensor,
    near: float,
) -> tuple[Floats, Tensor, Tensor]:
    """Prices at which at most the share `near` of the weight is in the wrong cluster, if that goes fast, and what is cheapest at them.

    Those of a sample where the present ones are far off, then Newton steps.
    """
    k, count = costs.shape
    total = float(count if weights is None else weights.sum())
    wrong = _wrong(labels, k, weights, limits) / total
    if wrong > _ROUGH:
        rough = _rough_prices(costs, prices, weights, tolerance)
        rough_labels, rough_margin = cheapest(costs, rough)
        rough_wrong = _wrong(rough_labels, k, weights, limits) / total
        if rough_wrong < wrong:
            prices, labels, margin, wrong = rough, rough_labels, rough_margin, rough_wrong
    for _ in range(_NEWTON_STEPS):
        if wrong <= near:
            break
        picked = min(max(_FEW_ROWS, round(_PICKED_FOR_WRONG * count * wrong)), max(_FEW_ROWS, count // 16))
        excess = _excess(labels, k, weights, limits) * count / total
        rows = _nearest_to_a_choice(costs, prices, labels, margin, picked, excess)
        problem, _ = _problem(costs, weights, limits, labels, rows)
        trial = raise_prices(problem, prices, enough=0.5 * near * total, steps=2)
        trial_labels, trial_margin = cheapest(costs, trial)
        left = _wrong(trial_labels, k, weights, limits) / total
        if left >= wrong:
            break
        slow = left > 0.7 * wrong
        prices, labels, margin, wrong = trial, trial_labels, trial_margin, left
        if slow:
            break
    return prices, labels, margin


def cheapest(costs: Tensor, prices: Floats) -> tuple[Tensor, Tensor]:
    """The cluster of least cost plus price for each row of `costs` [k, n]: int64 [n], and how much dearer the next one is [n]."""
    k, count = costs.shape
    labels = torch.zeros(count, dtype=torch.int64, device=costs.device)
    margin = torch.full((count,), torch.inf, dtype=costs.dtype, device=costs.device)
    for first in range(0, count, BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        best = costs[0, block] + float(prices[0])
        second, label = margin[block], labels[block]
        for cluster in range(1, k):
            offer = costs[cluster, block] + float(prices[cluster])
            label.masked_fill_(offer < best, cluster)
            torch.minimum(second, torch.maximum(best, offer), out=second)
            torch.minimum(best, offer, out=best)
        second -= best
    return labels, margin


def _loads(labels: Tensor, k: int, weights: Floats | None) -> Floats:
    """Weight of each cluster, [k]."""
    return np.bincount(labels.cpu().numpy(), weights, minlength=k).astype(np.float64)


def _excess(labels: Tensor, k: int, weights: Floats | None, limits: Bounds) -> Floats:
    """Weight of each cluster above (positive) or below (negative) its bounds, [k]."""
    loads = _loads(labels, k, weights)
    return np.maximum(loads - limits.high, 0.0) + np.minimum(loads - limits.low, 0.0)


def _wrong(labels: Tensor, k: int, weights: Floats | None, limits: Bounds) -> float:
    """Weight beyond the bounds of the clusters."""
    return float(np.abs(_excess(labels, k, weights, limits)).sum())


def _rough_prices(costs: Tensor, prices: Floats, weights: Floats | None, tolerance: float) -> Floats:
    """Prices that balance every m-th row."""
    k, count = costs.shape
    step = max(1, count // max(_ROUGH_ROWS, _ROUGH_ROWS_A_CLUSTER * k))
    some = costs[:, ::step].cpu().numpy().astype(np.float64)
    shares = None if weights is None else weights[::step]
    limits = bounds(some.shape[1], k, shares, tolerance)
    total = some.shape[1] if shares is None else float(shares.sum())
    return raise_prices(Problem(some, shares, np.zeros(k), limits.low, limits.high), prices, enough=0.01 * total)


def _nearest_to_a_choice(costs: Tensor, prices: Floats, labels: Tensor, margin: Tensor, picked: int, excess: Floats) -> Tensor:
    """The `picked` rows of the smallest margin; and for each cluster with too much or too little (`excess` in rows) those that mend it.

    Those are its own rows of the smallest margin, or the rows of others to which it is the least dear: clusters that lie apart have none
    among the smallest margins of all.
    """
    count, k = len(margin), len(costs)
    if picked >= count:
        return torch.arange(count, device=margin.device)
    chosen = torch.zeros(count, dtype=torch.bool, device=margin.device)
    chosen[_smallest(margin, picked)] = True
    least = costs.gather(0, labels[None])[0] + torch.from_numpy(prices).to(costs)[labels]
    for cluster in np.flatnonzero(excess).tolist():
        wanted = picked // k + int(2 * abs(excess[cluster]))
        if excess[cluster] > 0:
            own = (labels == cluster).nonzero()[:, 0]
            chosen[own[_smallest(margin[own], wanted)]] = True
        else:
            dearer = costs[cluster] + float(prices[cluster]) - least
            dearer.masked_fill_(labels == cluster, torch.inf)
            chosen[_smallest(dearer, wanted)] = True
    return chosen.nonzero()[:, 0]


def _smallest(values: Tensor, number: int) -> Tensor:
    """Places of the `number` smallest values; of equal ones the first."""
    if number >= len(values):
        return torch.arange(len(values), device=values.device)
    limit = values.kthvalue(number).values
    below, equal = (values < limit).nonzero()[:, 0], (values == limit).nonzero()[:, 0]
    return torch.cat([below, equal[: number - len(below)]])


def _would_stay(costs: Tensor, before: Floats, prices: Floats, margin: Tensor, settled: Tensor) -> bool:
    """Whether at `prices` every row is cheapest in its cluster `settled` [n], up to rounding; k marks the rows that do not count.

    At the prices `before` they were, by `margin` [n].
    """
    change = float(np.ptp(prices - before))
    if change < float(margin[settled < len(costs)].min()):
        return True
    labels, _ = cheapest(costs, prices)
    doubtful = ((labels != settled) & (settled < len(costs))).nonzero()[:, 0]
    if not len(doubtful):
        return True
    offers = costs[:, doubtful] + torch.from_numpy(prices).to(costs)[:, None]
    lost = offers.gather(0, settled[doubtful][None])[0] - offers.min(dim=0).values
    return bool((lost <= 4 * torch.finfo(costs.dtype).eps * offers.abs().max()).all())
