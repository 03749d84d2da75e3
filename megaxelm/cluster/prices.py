"""Prices of clusters at which rows choose them freely and are nearly balanced: the dual of the transportation problem.

A price is added to the cost of each row of a cluster. A cluster within its bounds wants the price 0, one at its upper bound a positive
one, one at its lower bound a negative one. Newton steps where they help: how much weight a price moves between two clusters is read off
the rows that are nearest to a choice between them (as in semi-discrete optimal transport; Kitagawa, Merigot and Thibert, Journal of the
European Mathematical Society 21, 2019). Else coordinate ascent: one cluster after the other gets the price that balances it.

What is left to `megaxelm.cluster.transport` is little, which is all that prices are for: the division is as good from any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_WINDOW = 4  # rows that the slope is read off, for each that is in the wrong cluster
_GAIN = 0.75  # what a Newton step must leave at most, as a share; else coordinate ascent gets its turn


@dataclass
class Problem:
    """Rows to divide, and what is settled already."""

    costs: Floats
    """Cost of a row in a cluster, for a unit of its weight, [k, rows]."""
    weights: Floats | None
    """Weight of each row, [rows]; None: 1 each."""
    settled: Floats
    """Weight in each cluster that stays there, [k]."""
    low: float
    """Least weight of a cluster."""
    high: float
    """Most weight of a cluster."""

    def loads(self, labels: Ints) -> Floats:
        """Weight of each cluster, [k]."""
        return self.settled + np.bincount(labels, self.weights, minlength=len(self.costs))

    def wanted(self, prices: Floats, loads: Floats) -> Floats:
        """What each cluster should weigh at `prices`, [k]: the most at a positive one, the least at a negative one, at 0 what it likes."""
        return np.where(prices > 0, self.high, np.where(prices < 0, self.low, np.clip(loads, self.low, self.high)))

    def misfit(self, loads: Floats) -> Floats:
        """Weight above (positive) or below (negative) the bounds, [k]."""
        return np.maximum(loads - self.high, 0.0) + np.minimum(loads - self.low, 0.0)


def raise_prices(problem: Problem, prices: Floats, enough: float, steps: int = 20) -> Floats:
    """Prices [k] at which the free choices of the rows are balanced but for `enough` weight, or as nearly as `steps` bring it."""
    here = Choices(problem, prices)
    best, lately = here, here.wrong
    for number in range(steps):
        if number % 4 == 3:
            # What gains little is left to the paths.
            if best.wrong > _GAIN * lately:
                break
            lately = best.wrong
        if best.wrong <= enough:
            break
        there = Choices(problem, here.newton())
        if there.wrong > _GAIN * here.wrong:
            halfway = Choices(problem, (here.prices + there.prices) / 2)
            there = min(there, halfway, key=lambda choices: choices.wrong)
        if there.wrong > _GAIN * here.wrong:
            there = Choices(problem, _sweep(problem, here.prices))
        here = there
        best = min(best, here, key=lambda choices: choices.wrong)
    return best.prices


class Choices:
    """Which clusters the rows choose at some prices."""

    def __init__(self, problem: Problem, prices: Floats) -> None:
        self.problem, self.prices = problem, prices
        self.labels, least, self.seconds, next_least = _two_least(problem.costs + prices[:, None])
        self.margins = next_least - least
        loads = problem.loads(self.labels)
        self.excess = loads - problem.wanted(prices, loads)
        """Weight above (positive) or below (negative) what each cluster should have, [k]."""
        self.wrong = float(np.abs(self.excess).sum())

    def newton(self) -> Floats:
        """Prices [k] that are right if the weight at the borders is spread evenly."""
        problem, k = self.problem, len(self.prices)
        mean = 1.0 if problem.weights is None else float(problem.weights.mean())
        place = int(min(len(self.margins) - 1, _WINDOW * max(self.wrong / mean, k)))
        width = np.partition(self.margins, place)[place]
        if not 0 < width < np.inf:
            return self.prices
        near = self.margins <= width
        weights = None if problem.weights is None else problem.weights[near]
        moved = np.bincount(self.labels[near] * k + self.seconds[near], weights, minlength=k * k).reshape(k, k) / (2 * width)
        moved = moved + moved.T
        slope = np.diag(moved.sum(axis=1)) - moved
        # A cluster at price 0 and within its bounds takes what comes; the others share what is wrong.
        bound = (self.prices != 0) | (self.excess != 0) | (problem.low == problem.high)
        step = np.zeros(k)
        step[bound] = np.linalg.lstsq(slope[np.ix_(bound, bound)], self.excess[bound], rcond=1e-9)[0]
        prices = self.prices + np.clip(step, -2 * width, 2 * width)
        if problem.low < problem.high:
            prices[prices * self.prices < 0] = 0.0
        return prices


def _sweep(problem: Problem, prices: Floats) -> Floats:
    """Coordinate ascent, each cluster once. The two cheapest offers to each row are kept, so a price touches few other numbers."""
    prices, costs = prices.copy(), problem.costs
    offers = costs + prices[:, None]
    labels, least, seconds, next_least = _two_least(offers)
    for cluster in range(len(costs)):
        prices[cluster] = _price(problem, cluster, np.where(labels == cluster, next_least, least) - costs[cluster])
        offers[cluster] = offer = costs[cluster] + prices[cluster]
        again = np.flatnonzero((labels == cluster) | (seconds == cluster))
        better, between = offer < least, (offer >= least) & (offer < next_least)
        seconds[better], next_least[better] = labels[better], least[better]
        labels[better], least[better] = cluster, offer[better]
        seconds[between], next_least[between] = cluster, offer[between]
        labels[again], least[again], seconds[again], next_least[again] = _two_least(offers[:, again])
    return prices


def _two_least(offers: Floats) -> tuple[Ints, Floats, Ints, Floats]:
    """Of `offers` [k, rows] the least and the next: cluster and offer of each, [rows]; infinite where there is no next."""
    offers, every = offers.copy(), np.arange(offers.shape[1])
    labels = offers.argmin(axis=0)
    least = offers[labels, every]
    offers[labels, every] = np.inf
    seconds = offers.argmin(axis=0)
    return labels, least, seconds, offers[seconds, every]


def _price(problem: Problem, cluster: int, advantage: Floats) -> float:
    """The price nearest to 0 at which the rows whose advantage is larger fill the cluster within its bounds."""
    settled = problem.settled[cluster]
    if problem.weights is None:
        # Rows that still fit below the upper bound, and rows needed for the lower one.
        most, least = int(problem.high - settled), int(problem.low - settled)
        places = np.clip([0, most - 1, most, least - 1, least, len(advantage) - 1], 0, len(advantage) - 1)
        order = -np.partition(-advantage, np.unique(places))
    else:
        rows = np.argsort(-advantage, kind="stable")
        order = advantage[rows]
        filled = settled + problem.weights[rows].cumsum()
        most = int(np.searchsorted(filled, problem.high, side="right"))
        least = min(most, int(np.searchsorted(filled, problem.low, side="left")) + 1) if settled < problem.low else 0

    def between(place: int) -> float:
        if place <= 0:
            return float(order[0])
        return float(order[-1] if place >= len(order) else (order[place - 1] + order[place]) / 2)

    least_price = -np.inf if most >= len(order) else between(most)
    most_price = np.inf if least <= 0 else between(least)
    return float(min(max(0.0, least_price), most_price))
