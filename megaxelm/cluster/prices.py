"""Prices of clusters at which rows choose them freely and are nearly balanced: the dual of the transportation problem.

A price is added to the cost of each row of a cluster. A cluster within its bounds wants the price 0, one at its upper bound a positive
one, one at its lower bound a negative one. The dual is concave but has edges where rows change their mind; made smooth, so that a row
near to a choice is split between its clusters as exp(-offer / warmth), it is climbed by Newton's method (entropic optimal transport;
Peyre and Cuturi, Computational Optimal Transport, 2019, chapter 4). The warmth then falls until the free choices are nearly balanced.

What is left to `megaxelm.cluster.transport` is little, which is all that prices are for: the division is as good from any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Found = TypeVar("Found")

BLOCK_ROWS = 16_384
"""Rows in one pass of a loop over many: of 100 float32 each they are 6.5 MB."""

_BLOCK_COSTS = 1 << 18
"""Costs in one pass of a loop over many: 1 MB in float32, which stays in the cache."""

_BLOCKS_A_THREAD = 2  # fewer are not worth waking one
_MOST_THREADS = 8  # the copies of numbers between operations are Python's, one thread at a time

_LEVELS = 10
_STUCK = 0.95  # share of the wrong weight that a level must leave less of
_NEWTON_STEPS = 8  # at each warmth; from the second on one or two do
_COOLER = 4.0  # the warmth falls by this factor
_HALVINGS = 5  # of a step that does not climb
_LONGEST_STEP = 30.0  # times the warmth: farther away the smooth dual is another one
_NO_SHARE = -60.0  # logarithm of the least share; much smaller ones are denormal, which is slow
_SETTLED = 0.1  # share of the rows in the wrong cluster that the smooth excess falls to before it cools


@dataclass(frozen=True)
class Problem:
    """Rows to divide, and what is settled already."""

    costs: Tensor
    """Cost of a row in a cluster, for a unit of its weight, [k, rows]."""
    weights: Floats | None
    """Weight of each row, [rows]; None: 1 each."""
    settled: Floats
    """Weight in each cluster that stays there, [k]."""
    low: float
    """Least weight of a cluster."""
    high: float
    """Most weight of a cluster."""

    def loads(self, labels: Tensor | Ints) -> Floats:
        """Weight of each cluster, [k]."""
        places = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
        return self.settled + np.bincount(places, self.weights, minlength=len(self.costs))

    def wanted(self, prices: Floats, loads: Floats) -> Floats:
        """What each cluster should weigh at `prices`, [k]: the most at a positive one, the least at a negative one, at 0 what it likes."""
        return np.where(prices > 0, self.high, np.where(prices < 0, self.low, np.clip(loads, self.low, self.high)))

    def wrong(self, prices: Floats, loads: Floats) -> float:
        """Weight above and below what the clusters should weigh."""
        return float(np.abs(loads - self.wanted(prices, loads)).sum())

    def misfit(self, loads: Floats) -> Floats:
        """Weight above (positive) or below (negative) the bounds, [k]."""
        return np.maximum(loads - self.high, 0.0) + np.minimum(loads - self.low, 0.0)

    @property
    def mean_weight(self) -> float:
        """Of the rows."""
        return 1.0 if self.weights is None else float(self.weights.mean())

    def firm(self) -> Problem:
        """Bounds that leave a cluster no choice but of one row are one and the same, in parts of a row."""
        if self.weights is not None or not 0 < self.high - self.low <= 1:
            return self
        share = (float(self.settled.sum()) + self.costs.shape[1]) / len(self.costs)
        return replace(self, low=share, high=share)

    def only(self, rows: Tensor, labels: Tensor) -> Problem:
        """`rows` alone, where all others stay in their cluster of `labels` [rows]."""
        some = None if self.weights is None else self.weights[rows.cpu().numpy()]
        loose = np.bincount(labels[rows].cpu().numpy(), some, minlength=len(self.costs))
        return replace(self, costs=self.costs.index_select(1, rows), weights=some, settled=self.loads(labels) - loose)

    def sample(self, step: int) -> Problem:
        """Each `step`-th row, for prices alone."""
        costs, weights = self.costs[:, ::step].contiguous(), None
        share = costs.shape[1] / self.costs.shape[1]
        if self.weights is not None:
            weights = self.weights[::step]
            share = float(weights.sum() / self.weights.sum())
        return Problem(costs, weights, self.settled * share, self.low * share, self.high * share)


def _each(work: Callable[[slice], Found], costs: Tensor) -> list[Found]:
    """What `work` gives for each block of rows, in their order. On a CPU threads share the blocks: one operation is too short to share."""
    k, count = costs.shape
    rows = max(1, _BLOCK_COSTS // k)
    blocks = [slice(first, first + rows) for first in range(0, count, rows)]
    if costs.device.type != "cpu" or len(blocks) < _BLOCKS_A_THREAD * 2:
        return [work(block) for block in blocks]
    return list(_threads().map(work, blocks))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))))


def cheapest(costs: Tensor, prices: Floats) -> tuple[Tensor, Tensor]:
    """The cluster of least cost plus price for each row of `costs` [k, n]: int64 [n], and how much dearer the next one is [n]."""
    labels = torch.empty(costs.shape[1], dtype=torch.int64, device=costs.device)
    margin = torch.empty(costs.shape[1], dtype=costs.dtype, device=costs.device)
    added = torch.from_numpy(prices).to(costs)[:, None]

    def choose(block: slice) -> None:
        offers = costs[:, block] + added
        least, labels[block] = _least(offers)
        offers.scatter_(0, labels[block][None], torch.inf)
        margin[block] = offers.amin(dim=0) - least

    _each(choose, costs)
    return labels, margin


def _least(offers: Tensor) -> tuple[Tensor, Tensor]:
    """`offers.min(dim=0)`, in half the time where no two offers of a row are equal."""
    least = offers.amin(dim=0)
    found = (offers == least).to(torch.float32)
    if int(torch.count_nonzero(found)) != offers.shape[1]:
        return offers.min(dim=0)
    places = torch.arange(len(offers), dtype=torch.float32, device=offers.device)
    return least, (places @ found).long()


def balance(problem: Problem, prices: Floats, enough: float) -> Floats:
    """Prices [k] at which the free choices of the rows are balanced but for `enough` weight, or as nearly as it goes.

    The search starts at `prices`, as warm as the rows in the wrong cluster are far from a choice.
    """
    firm = problem.firm()
    labels, margin = cheapest(firm.costs, prices)
    wrong = firm.wrong(prices, firm.loads(labels))
    spread = float((firm.costs.max() - firm.costs.min()).double() + np.ptp(prices))
    if wrong <= enough or spread == 0:
        return prices
    best = wrong, prices
    place = int(np.clip(wrong / firm.mean_weight, 1, len(margin)))
    coldest = 4 * torch.finfo(firm.costs.dtype).eps * spread
    warmth = max(float(margin.kthvalue(place).values) / _COOLER, coldest)
    weights = None if firm.weights is None else torch.from_numpy(firm.weights).to(firm.costs)
    lately = np.inf
    for _ in range(_LEVELS):
        here = _Smooth.at(firm, weights, prices, warmth)
        for _ in range(_NEWTON_STEPS):
            if float(np.abs(here.excess).sum()) <= _SETTLED * max(here.wrong, enough):
                break
            there = _climb(firm, weights, here, warmth)
            if there is None:
                break
            here = there
        prices = here.prices
        best = min(best, (here.wrong, prices), key=lambda found: found[0])
        if here.wrong <= enough or warmth <= coldest or here.wrong > _STUCK * lately:
            break
        lately = here.wrong
        warmth = max(warmth / _COOLER, coldest)
    return best[1]


@dataclass(frozen=True)
class _Smooth:
    """The smooth dual at some prices."""

    prices: Floats
    value: float
    excess: Floats
    """Its slope, [k]: weight of each cluster beyond what it should be, where rows are split."""
    curvature: Floats
    """[k, k]; positive semidefinite: minus the second derivative."""
    wrong: float
    """Weight beyond what it should be where each row chooses one cluster."""

    @staticmethod
    def at(problem: Problem, weights: Tensor | None, prices: Floats, warmth: float) -> _Smooth:
        costs, k = problem.costs, len(problem.costs)
        added = torch.from_numpy(prices).to(costs)[:, None]

        def sums_of(block: slice) -> tuple[Tensor, Tensor, Tensor, float]:
            offers = costs[:, block] + added
            least = offers.amin(dim=0)
            cheapest_ones = offers == least
            shares = offers.sub_(least).mul_(-1 / warmth).clamp_(min=_NO_SHARE).exp_()
            sums = shares.sum(dim=0)
            shares /= sums
            weighted = shares if weights is None else shares * weights[block]
            least -= warmth * sums.log()
            # Of equal offers each counts: how much is wrong is a guide, and to look for the first takes as long as all the rest.
            counts = cheapest_ones.sum(dim=1) if weights is None else cheapest_ones.to(weights.dtype) @ weights[block]
            value = float((least if weights is None else least * weights[block]).sum(dtype=torch.float64))
            return weighted.sum(dim=1, dtype=torch.float64), (weighted @ shares.T).double(), counts, value

        loads, overlap = (torch.zeros(size, dtype=torch.float64, device=costs.device) for size in ((k,), (k, k)))
        chosen, value = np.zeros(k), 0.0
        for block_loads, block_overlap, counts, block_value in _each(sums_of, costs):
            loads += block_loads
            overlap += block_overlap
            chosen += counts.cpu().numpy()
            value += block_value
        soft = problem.settled + loads.cpu().numpy()
        bounds = np.where(prices > 0, problem.high, problem.low)
        return _Smooth(
            prices,
            value + float(((problem.settled - bounds) * prices).sum()),
            soft - problem.wanted(prices, soft),
            (torch.diag(loads) - overlap).cpu().numpy() / warmth,
            problem.wrong(prices, problem.settled + chosen),
        )


def _climb(problem: Problem, weights: Tensor | None, here: _Smooth, warmth: float) -> _Smooth | None:
    """A step by Newton's method, shorter where it would not climb; None if no step does."""
    # A cluster at price 0 and within its bounds takes what comes.
    bound = (here.prices != 0) | (here.excess != 0) | (problem.low == problem.high)
    step = _newton(here, bound, warmth)
    if problem.low < problem.high:
        # Nor does one at price 0 stay at a bound that others push it away from.
        while (away := bound & (here.prices == 0) & (step * here.excess < 0)).any():
            bound &= ~away
            step = _newton(here, bound, warmth)
    for _ in range(_HALVINGS):
        prices = here.prices + step
        if problem.low < problem.high:
            prices[prices * here.prices < 0] = 0.0
        there = _Smooth.at(problem, weights, prices, warmth)
        if there.value > here.value or np.abs(there.excess).sum() < np.abs(here.excess).sum():
            return there
        step /= 2
    return None


def _newton(here: _Smooth, bound: NDArray[np.bool_], warmth: float) -> Floats:
    """The step of the prices of clusters `bound` [k] to where their excess is 0 if the curvature stays, [k]; 0 for the others."""
    curvature = here.curvature[np.ix_(bound, bound)]
    # All prices may rise by the same, and clusters that nobody is near to by anything: a little curvature holds them.
    ridge = 1e-7 * max(float(curvature.trace()), float(np.abs(here.excess).sum()) / warmth) * np.eye(len(curvature))
    step = np.zeros(len(bound))
    step[bound] = np.clip(np.linalg.solve(curvature + ridge, here.excess[bound]), -_LONGEST_STEP * warmth, _LONGEST_STEP * warmth)
    return step
