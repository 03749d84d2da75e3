"""The transportation problem of a few rows: each to one cluster at the least cost, where clusters hold from `low` to `high`.

Each row starts in its cheapest cluster at given prices (`megaxelm.cluster.prices`). What is then too much or too little moves along
shortest paths (successive shortest paths; Ahuja, Magnanti and Orlin, Network Flows, 1993, section 9.7). A graph of k + 1 nodes is all
that takes, since only the cheapest rows to move matter between two clusters; the last node, the sink, takes from each cluster what it
holds. It is exact from any prices where all rows weigh the same; with weights, for which the problem is NP-hard, single moves at the
end bring every cluster within its bounds as far as whole rows can.
"""

from __future__ import annotations

import numpy as np

from megaxelm.cluster.prices import Floats, Ints, Problem

_MOST_MOVES = 20  # for each cluster, where rows have weights and no end is certain


def solve(problem: Problem, prices: Floats) -> tuple[Ints, Floats] | None:
    """Clusters of the rows [rows], and prices [k] that prove it where rows weigh the same. None: these rows cannot meet the bounds."""
    flow = _Flow(problem, prices)
    labels = flow.run()
    if labels is None:
        return None
    return (labels, flow.prices()) if problem.weights is None else (_fit(problem, labels), prices)


class _Flow:
    """Rows in clusters, and what each cluster passes on to the sink (node k): from `low` to `high`.

    A move of a row from cluster a to b is an edge of the residual graph; so is more to the sink or less. A cluster that holds more than it
    passes on has an excess, the sink may have one too. No cycle of edges is ever negative, which is optimality for the present excesses,
    and a shortest path keeps it so.
    """

    def __init__(self, problem: Problem, prices: Floats) -> None:
        self.problem, self.costs, self.k = problem, problem.costs.numpy(), len(problem.costs)
        # Shorter by less is not shorter, or rounding would make a cycle of cost 0 look negative.
        self.hair = 1e-12 * (1.0 + float(np.abs(self.costs).max(initial=0.0)))
        self.labels: Ints = (self.costs + prices[:, None]).argmin(axis=0)
        self._pass_on(prices, problem.loads(self.labels))
        self.edges = np.full((self.k + 1, self.k + 1), np.inf)
        for cluster in range(self.k):
            self._refresh(cluster)

    def _pass_on(self, prices: Floats, loads: Floats) -> None:
        """What each cluster passes on: all it may if it is dearer than the sink, as little as it may if it is cheaper.

        No edge to or from the sink is negative then, whatever the sink's price. It gets the one that leaves the least to move.
        """
        best = np.inf
        for price in np.append(0.0, prices):
            passed = self.problem.wanted(prices - price, loads)
            excess = np.append(loads - passed, passed.sum() - loads.sum())
            if np.abs(excess).sum() < best:
                best, self.passed, self.excess = np.abs(excess).sum(), passed, excess

    def _refresh(self, cluster: int) -> None:
        """The edges of `cluster`: of its cheapest row to each other cluster, and with the sink."""
        rows = np.flatnonzero(self.labels == cluster)
        self.edges[cluster] = np.inf
        if len(rows):
            self.edges[cluster, : self.k] = (self.costs[:, rows] - self.costs[cluster, rows]).min(axis=1)
        self.edges[cluster, cluster] = np.inf
        self.edges[cluster, self.k] = 0.0 if self.passed[cluster] < self.problem.high else np.inf
        self.edges[self.k, cluster] = 0.0 if self.passed[cluster] > self.problem.low else np.inf

    def _movers(self, source: int, target: int, amount: float) -> Ints:
        """Cheapest rows to move from `source` to `target`: more than one only where they cost the same; of them, up to `amount`."""
        rows = np.flatnonzero(self.labels == source)
        extra = self.costs[target, rows] - self.costs[source, rows]
        rows = rows[extra == self.edges[source, target]]
        if self.problem.weights is None:
            return rows[: max(1, int(amount))]
        return rows[: max(1, int(np.searchsorted(self.problem.weights[rows].cumsum(), amount, side="right")))]

    def _shortest(self, start: Floats) -> tuple[Floats, Ints]:
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

    def run(self) -> Ints | None:
        """Move excess to where it lacks until there is none; the clusters of the rows, or None where no path is left.

        With weights a path moves whole rows and can leave as much behind as it mends: the search ends when it no longer gains.
        """
        weighted = self.problem.weights is not None
        heaviest = 0.0 if self.problem.weights is None else float(self.problem.weights.max(initial=0.0))
        left = np.inf
        for number in range(_MOST_MOVES * self.k if weighted else np.iinfo(np.int64).max):
            present = np.abs(self.excess).sum()
            if self.excess.max() <= heaviest and -self.excess.min() <= heaviest or (weighted and number and present >= left):
                break
            left = present
            distance, before = self._shortest(np.where(self.excess > 0, 0.0, np.inf))
            reached = np.where(self.excess < 0, distance, np.inf)
            if not np.isfinite(reached).any():
                return None
            self._move(int(reached.argmin()), before)
        return self.labels

    def _move(self, end: int, before: Ints) -> None:
        """As much along the path to `end` as all of its edges take at their present cost."""
        path = [end]
        while before[path[-1]] >= 0:
            assert len(path) <= self.k, "a path that meets itself is a negative cycle, which cannot be"
            path.append(int(before[path[-1]]))
        edges = list(zip(path[1:], path[:-1], strict=True))
        amount = min(-self.excess[end], self.excess[path[-1]])
        movers: dict[tuple[int, int], Ints] = {}
        for source, target in edges:
            if target == self.k:
                amount = min(amount, self.problem.high - self.passed[source])
            elif source == self.k:
                amount = min(amount, self.passed[target] - self.problem.low)
            else:
                movers[source, target] = self._movers(source, target, amount)
                weights = self.problem.weights
                amount = min(amount, len(movers[source, target]) if weights is None else weights[movers[source, target]].sum())
        for source, target in edges:
            if target == self.k:
                self.passed[source] += amount
            elif source == self.k:
                self.passed[target] -= amount
            else:
                rows = movers[source, target]
                weights = self.problem.weights
                if weights is None:
                    rows = rows[: int(amount)]
                else:
                    rows = rows[: max(1, int(np.searchsorted(weights[rows].cumsum(), amount, side="right")))]
                self.labels[rows] = target
        # Anew from the rows: with weights what moved along two edges may differ.
        loads = self.problem.loads(self.labels)
        self.excess = np.append(loads - self.passed, self.passed.sum() - loads.sum())
        for node in path:
            if node < self.k:
                self._refresh(node)

    def prices(self) -> Floats:
        """Prices [k], relative to the sink's, after which no row is cheaper elsewhere: from shortest distances over the residual graph."""
        distance = self._shortest(np.zeros(self.k + 1))[0]
        return distance[self.k] - distance[: self.k]


def _fit(problem: Problem, labels: Ints) -> Ints:
    """Single moves of rows, each the cheapest for what it mends, until none brings the clusters nearer to their bounds or, past
    `_MOST_MOVES`, each is within the heaviest row of them.

    A cluster above its upper bound by more than its lightest row always has such a move, to the lightest cluster; so has one that is below
    its lower bound by more than the lightest row of the heaviest cluster.
    """
    assert problem.weights is not None
    weights, costs = problem.weights, problem.costs.numpy()
    labels = labels.copy()
    loads = problem.loads(labels)
    heaviest = float(weights.max(initial=0.0))
    moves = 0
    while (misfit := np.abs(problem.misfit(loads))).max() > (0.0 if moves < _MOST_MOVES * len(costs) else heaviest):
        # Only rows that leave a cluster with too much or enter one with too little can mend anything.
        best: tuple[float, int, int] | None = None
        for target in range(len(costs)):
            rows = np.flatnonzero(labels != target if loads[target] < problem.low else (loads > problem.high)[labels] & (labels != target))
            sources = labels[rows]
            after = np.abs(problem.misfit(loads[target] + weights[rows])) + np.abs(problem.misfit(loads[sources] - weights[rows]))
            gain = misfit[target] + misfit[sources] - after
            useful = gain > 1e-12 * problem.high
            if not useful.any():
                continue
            rows, sources = rows[useful], sources[useful]
            price = (costs[target, rows] - costs[sources, rows]) * weights[rows] / gain[useful]
            place = int(price.argmin())
            if best is None or price[place] < best[0]:
                best = float(price[place]), int(rows[place]), target
        if best is None:
            break
        _, row, target = best
        loads[labels[row]] -= weights[row]
        loads[target] += weights[row]
        labels[row] = target
        moves += 1
    return labels
