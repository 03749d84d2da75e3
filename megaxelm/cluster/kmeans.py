"""k-means with clusters of equal size (paper, section 3.1).

Each step gives every vector to a centre so that the sum of squared distances is the least possible among all divisions into
clusters of floor(n / k) or ceil(n / k) vectors. This transportation problem is solved exactly: start from the nearest centre less
its price, then move vectors along shortest paths from clusters that are too full to those that are too empty (successive
shortest paths; Ahuja, Magnanti and Orlin, Network Flows, 1993, section 9.7). A graph of k + 1 nodes is all that takes, since
only the cheapest vector to move matters between two clusters. Prices carry over from one step to the next.
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

STARTS = 8
"""Starts of k-means; on real text their objectives differ by up to 10 %."""


def balanced_kmeans(vectors: NDArray[np.floating], k: int, seed: int, iterations: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cut `vectors` [n, d] into k clusters of floor(n / k) or ceil(n / k) vectors each.

    The best of `STARTS` starts: centres by k-means++, means afterwards, until no vector changes its cluster or for `iterations`.
    The same input gives the same result.

    Returns:
        centres [k, d] and the number of each vector's cluster [n].

    Raises:
        ClusterError: if k is not in 1..n, or a vector is not finite.
    """
    from tqdm import tqdm

    count = len(vectors)
    if not 1 <= k <= count:
        raise ClusterError(f"clusters.k = {k}: there are {count} documents to divide; choose 1 to {count}")
    points = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ClusterError("balanced k-means: a document's vector holds NaN or infinity")
    best = (np.inf, points[:k], np.zeros(count, dtype=np.int64))
    seeds = np.random.SeedSequence(seed).generate_state(STARTS)
    for start in tqdm(seeds, desc="balanced k-means, starts", file=sys.stderr, mininterval=0.5, leave=False):
        centres, labels = _from_start(points, k, int(start), iterations)
        objective = float(((points - centres[labels]) ** 2).sum())
        if objective < best[0]:
            best = (objective, centres, labels)
    return best[1].astype(np.float32), best[2]


def _from_start(points: NDArray[np.float64], k: int, seed: int, iterations: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.cluster import kmeans_plusplus

    # k-means++ divides by the spread of the points, which is 0 where all are the same.
    centres = kmeans_plusplus(points, k, random_state=seed)[0] if np.ptp(points, axis=0).any() else points[:k].copy()
    labels = np.full(len(points), -1, dtype=np.int64)
    prices = np.zeros(k)
    for _ in range(iterations):
        new, prices = balanced_assignment(squared_distances(points, centres), prices)
        if (new == labels).all():
            break
        labels = new
        for cluster in range(k):
            centres[cluster] = points[labels == cluster].mean(axis=0)
    return centres, labels


def squared_distances(vectors: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared Euclidean distance of each vector [n, d] to each centre [k, d]: [n, k]."""
    x, c = np.asarray(vectors, dtype=np.float64), np.asarray(centres, dtype=np.float64)
    return np.maximum((x * x).sum(axis=1)[:, None] - 2.0 * (x @ c.T) + (c * c).sum(axis=1)[None, :], 0.0)


def balanced_assignment(
    costs: NDArray[np.float64], prices: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The cheapest division of n rows into k clusters of floor(n / k) or ceil(n / k) rows.

    `costs` [n, k]: of putting a row into a cluster. `prices` [k] from a like problem save time and change no optimum.

    Returns:
        the cluster of each row [n], and prices [k] that prove it: no row is cheaper elsewhere when each cluster's price is added.
    """
    count, k = costs.shape
    floor = count // k
    flow = _Flow(costs, _raise_prices(costs, np.zeros(k) if prices is None else prices), floor)
    while flow.step():
        pass
    return flow.labels, -flow.potentials()[:k]


def _raise_prices(costs: NDArray[np.float64], prices: NDArray[np.float64], sweeps: int = 10) -> NDArray[np.float64]:
    """Prices [k] at which the free choices are nearly balanced, by coordinate ascent on the dual problem.

    One cluster after the other gets the price at which just n / k rows choose it. What is left to the flow is little, which is
    all this is for: the flow is exact from any prices.
    """
    count, k = costs.shape
    if k == 1:
        return prices
    wanted = count / k
    prices = prices.copy()
    for _ in range(sweeps):
        sizes = np.bincount((costs + prices).argmin(axis=1), minlength=k)
        if np.abs(sizes - wanted).sum() <= max(k, count / 500):
            break
        for cluster in range(k):
            offers = costs + prices
            offers[:, cluster] = np.inf
            advantage = offers.min(axis=1) - costs[:, cluster]
            place = count - max(1, round(wanted))
            last, first = np.partition(advantage, [max(place - 1, 0), place])[[max(place - 1, 0), place]]
            prices[cluster] = (last + first) / 2
    return prices


class _Flow:
    """Rows in clusters, and what each cluster passes on to the sink (node k): floor or floor + 1 rows.

    A move of a row from cluster a to b is an edge of the residual graph; so is one more row to the sink or one less. A cluster
    that holds more than it passes on has an excess, the sink may have one too. No cycle of edges is ever negative, which is
    optimality for the present excesses, and a shortest path keeps it so.
    """

    def __init__(self, costs: NDArray[np.float64], prices: NDArray[np.float64], floor: int) -> None:
        count, k = costs.shape
        self.costs, self.floor, self.k = costs, floor, k
        # Shorter by less is not shorter, or rounding would make a cycle of cost 0 look negative.
        self.hair = 1e-12 * (1.0 + float(np.abs(costs).max()))
        self.labels = (costs + prices).argmin(axis=1).astype(np.int64)
        sizes = np.bincount(self.labels, minlength=k)
        # The dearest clusters are the wanted ones; the price of the last to get a row more is the sink's, so no edge to it is negative.
        extra = count - floor * k
        order = np.argsort(-prices, kind="stable")
        self.passed = np.full(k, floor, dtype=np.int64)
        self.passed[order[:extra]] += 1
        self.excess = np.append(sizes - self.passed, 0)
        self.edges = np.full((k + 1, k + 1), np.inf)
        self.movers = np.zeros((k, k), dtype=np.int64)
        for cluster in range(k):
            self._refresh(cluster)

    def _refresh(self, cluster: int) -> None:
        """Cheapest row to move from `cluster` to each other one, and its edges with the sink."""
        rows = np.flatnonzero(self.labels == cluster)
        if len(rows):
            extra = self.costs[rows] - self.costs[rows, cluster][:, None]
            best = extra.argmin(axis=0)
            self.movers[cluster] = rows[best]
            self.edges[cluster, : self.k] = extra[best, np.arange(self.k)]
        else:
            self.edges[cluster, : self.k] = np.inf
        self.edges[cluster, cluster] = np.inf
        can_pass_more = self.passed[cluster] == self.floor
        self.edges[cluster, self.k] = 0.0 if can_pass_more else np.inf
        self.edges[self.k, cluster] = np.inf if can_pass_more else 0.0

    def _shortest(self, start: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Bellman-Ford from start costs [k + 1]: distance of each node and the node before it (-1 at a start)."""
        distance = start.copy()
        before = np.full(self.k + 1, -1, dtype=np.int64)
        for _ in range(self.k):
            through = distance[:, None] + self.edges
            best = through.argmin(axis=0)
            shorter = through[best, np.arange(self.k + 1)]
            better = shorter < distance - self.hair
            if not better.any():
                break
            distance = np.where(better, shorter, distance)
            before = np.where(better, best, before)
        return distance, before

    def step(self) -> bool:
        """Move one unit of excess to the cheapest place that lacks one; False where nothing is in excess."""
        sources = self.excess > 0
        if not sources.any():
            return False
        distance, before = self._shortest(np.where(sources, 0.0, np.inf))
        node = int(np.where(self.excess < 0, distance, np.inf).argmin())
        self.excess[node] += 1
        touched = set()
        while before[node] >= 0:
            previous = int(before[node])
            if node == self.k:
                self.passed[previous] += 1
            elif previous == self.k:
                self.passed[node] -= 1
            else:
                self.labels[self.movers[previous, node]] = node
            assert previous not in touched, "a path that meets itself is a negative cycle, which cannot be"
            touched |= {previous, node}
            node = previous
        self.excess[node] -= 1
        for cluster in touched - {self.k}:
            self._refresh(cluster)
        return True

    def potentials(self) -> NDArray[np.float64]:
        """Shortest distances over the residual graph from anywhere, [k + 1]: none of the edges is negative after them."""
        return self._shortest(np.zeros(self.k + 1))[0]
