"""k-means with clusters of equal size or weight (paper, section 3.1).

Each step gives every vector to a centre so that the sum of squared distances is the least possible among all balanced divisions
(`megaxelm.cluster.assignment`); then each centre moves to the mean of its vectors and, on the way, a little beyond. The prices of one
step start the next.

Works on the device of the vectors. Beyond them it holds one float32 copy, the float32 costs [k, n] and about 100 bytes a vector; blocks
of vectors are what is multiplied, so memory and time are linear in n.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaxelm.cluster.assignment import as_weights, assign, balanced_assignment, bounds
from megaxelm.cluster.prices import BLOCK_ROWS, Floats
from megaxelm.errors import ClusterError

__all__ = ["balanced_assignment", "balanced_kmeans", "refine", "squared_distances"]

STARTS = 8
"""Starts of k-means; on real text their objectives differ by up to 10 %."""

_START_ROWS = 65_536
"""Of more vectors the starts are compared on a random sample of so many (at least 256 a cluster), and the best goes on with all."""

_FARTHER = 0.5
"""Centres go beyond the means by this share of their last move, as moves go on in much the same direction for many steps
(successive over-relaxation); the end is still a step from the means themselves that changes nothing."""


@dataclass(frozen=True)
class _Points:
    """Vectors around their mean, in units of their spread, so that float32 does for costs whatever the numbers were."""

    rows: Tensor  # [n, d] float32
    weights: Floats | None  # [n]
    middle: Tensor  # [d] float64
    spread: float

    @staticmethod
    def of(vectors: Tensor, weights: Floats | None) -> _Points:
        """Raises ClusterError if a vector is not finite."""
        count = len(vectors)
        wide = torch.float64 if vectors.dtype == torch.float64 else torch.float32
        blocks = [slice(first, first + BLOCK_ROWS) for first in range(0, count, BLOCK_ROWS)]
        middle = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
        for block in blocks:
            middle += vectors[block].to(wide).sum(dim=0).double() / count
        if not torch.isfinite(middle).all():
            raise ClusterError("balanced k-means: a document's vector holds NaN or infinity")
        largest = max(float((vectors[block].to(wide) - middle.to(wide)).abs().max()) for block in blocks)
        spread = largest or 1.0
        rows = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
        for block in blocks:
            rows[block] = (vectors[block].to(wide) - middle.to(wide)) / spread
        return _Points(rows, weights, middle.to(wide).double(), spread)

    def some(self, chosen: NDArray[np.int64]) -> _Points:
        """Those of the vectors."""
        rows = self.rows[torch.from_numpy(chosen).to(self.rows.device)]
        return _Points(rows, None if self.weights is None else self.weights[chosen], self.middle, self.spread)


@overload
def balanced_kmeans(
    vectors: Tensor,
    k: int,
    seed: int,
    iterations: int,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
    starts: int = STARTS,
) -> tuple[Tensor, Tensor]: ...
@overload
def balanced_kmeans(
    vectors: NDArray[np.floating],
    k: int,
    seed: int,
    iterations: int,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
    starts: int = STARTS,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...
def balanced_kmeans(
    vectors: Tensor | NDArray[np.floating],
    k: int,
    seed: int,
    iterations: int,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
    starts: int = STARTS,
) -> tuple[Tensor | NDArray[np.float32], Tensor | NDArray[np.int64]]:
    """Cut `vectors` [n, d] into k clusters of equal size, or of equal weight where `weights` [n] are given.

    The best of several starts by k-means++, each until no vector changes its cluster or for `iterations`. Of more than 65,536 vectors
    (or 256 k) the starts are compared on a sample of so many; the best goes on with all. The least sum of (weight times) squared distance
    wins. The same input on the same device gives the same result.

    Args:
        weights: positive, as the tokens of a document.
        tolerance: t; without weights clusters hold floor(n / k) or ceil(n / k) vectors at t = 0, else (1 -+ t) n / k. With weights
            they weigh (1 -+ t) x total / k, give or take less than the heaviest vector. No cluster is empty, whatever t.
        starts: at least 1.

    Returns:
        centres float32 [k, d] and the number of each vector's cluster, int64 [n]: numpy for numpy, else tensors on the same device.

    Raises:
        ClusterError: if k is not in 1..n, a vector is not finite, or weights, tolerance or starts are out of range.
    """
    from tqdm import tqdm

    count = len(vectors)
    if not 1 <= k <= count:
        raise ClusterError(f"clusters.k = {k}: there are {count} documents to divide; choose 1 to {count}")
    if starts < 1:
        raise ClusterError(f"balanced k-means: {starts} starts; choose 1 or more")
    heavy = as_weights(weights)
    bounds(count, k, heavy, tolerance)
    points = _Points.of(vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.ascontiguousarray(vectors)), heavy)
    random = np.random.default_rng(seed)
    compared = max(_START_ROWS, 256 * k)
    sample = points if count <= compared else points.some(np.sort(random.choice(count, compared, replace=False)))
    best = (np.inf, points.rows[:k], torch.zeros(count, dtype=torch.int64))
    for _ in tqdm(range(starts), desc="balanced k-means, starts", file=sys.stderr, mininterval=0.5, leave=False):
        centres, labels = _lloyd(sample, _first_centres(sample, k, random), iterations, tolerance)
        objective = _objective(sample, centres, labels)
        if objective < best[0]:
            best = (objective, centres, labels)
    centres, labels = best[1:] if sample is points else _lloyd(points, best[1], iterations, tolerance)
    return _returned(points, centres, labels, isinstance(vectors, Tensor))


def refine(
    vectors: Tensor | NDArray[np.floating],
    centres: Tensor | NDArray[np.floating],
    iterations: int,
    *,
    weights: Tensor | NDArray[np.number] | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor | NDArray[np.float32], Tensor | NDArray[np.int64]]:
    """`balanced_kmeans` from given `centres` [k, d], for at most `iterations`."""
    tensor = isinstance(vectors, Tensor)
    points = _Points.of(vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.ascontiguousarray(vectors)), as_weights(weights))
    first = (torch.as_tensor(centres).to(points.middle) - points.middle) / points.spread
    return _returned(points, *_lloyd(points, first.float(), iterations, tolerance), tensor)


def _returned(
    points: _Points, centres: Tensor, labels: Tensor, tensor: bool
) -> tuple[Tensor | NDArray[np.float32], Tensor | NDArray[np.int64]]:
    found = (centres.double() * points.spread + points.middle).float()
    return (found, labels) if tensor else (found.numpy(), labels.numpy())


def squared_distances(vectors: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared Euclidean distance of each vector [n, d] to each centre [k, d]: [n, k]."""
    x, c = np.asarray(vectors, dtype=np.float64), np.asarray(centres, dtype=np.float64)
    return np.maximum((x * x).sum(axis=1)[:, None] - 2.0 * (x @ c.T) + (c * c).sum(axis=1)[None, :], 0.0)


def _first_centres(points: _Points, k: int, random: np.random.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007), greedy: of 2 + log k vectors drawn by squared distance the one that lowers it most."""
    rows, count = points.rows, len(points.rows)
    norms = rows.square().sum(dim=1)
    weights = np.ones(count) if points.weights is None else points.weights
    on_device = torch.from_numpy(weights).to(rows.device)
    chosen = [int(_draw(weights, 1, random)[0])]
    nearest = _distances_to(rows, norms, chosen)[0]
    for _ in range(1, k):
        chances = (nearest.double() * on_device).cpu().numpy()
        if chances.sum() <= 0:
            # Fewer different vectors than clusters: any will do.
            chances = weights.copy()
            chances[chosen] = 0.0
        drawn = _draw(chances, 2 + int(np.log(k)), random)
        reached = torch.minimum(_distances_to(rows, norms, drawn.tolist()), nearest)
        left = [float((row.double() * on_device).sum()) for row in reached]
        best = int(np.argmin(left))
        chosen.append(int(drawn[best]))
        nearest = reached[best]
    return rows[chosen].clone()


def _draw(chances: Floats, number: int, random: np.random.Generator) -> NDArray[np.int64]:
    sums = chances.cumsum()
    return np.minimum(np.searchsorted(sums, random.random(number) * sums[-1], side="right"), len(sums) - 1)


def _distances_to(rows: Tensor, norms: Tensor, chosen: list[int]) -> Tensor:
    """Squared distances to some of the rows, [chosen, n]; 0 to themselves, which rounding could miss."""
    distances = (norms - 2.0 * (rows[chosen] @ rows.T) + norms[chosen][:, None]).clamp_(min=0.0)
    distances[torch.arange(len(chosen)), chosen] = 0.0
    return distances


def _lloyd(points: _Points, centres: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Centres [k, d] that are the means of their vectors, and labels [n]."""
    rows, k = points.rows, len(centres)
    labels = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    costs = torch.empty(k, len(rows), dtype=torch.float32, device=rows.device)
    prices: Floats | None = None
    farther = 0.0
    for number in range(iterations):
        # Squared distances less the square of the vector, which no choice changes.
        squares = centres.double().square().sum(dim=1).float()[:, None]
        for first in range(0, len(rows), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            torch.addmm(squares, centres, rows[block].T, alpha=-2.0, out=costs[:, block])
        before = labels
        labels, prices = assign(costs, prices, points.weights, tolerance)
        _fill_empty(points, centres, costs, labels)
        means = _means(points, labels, k)
        same = torch.equal(labels, before)
        if number == iterations - 1 or (same and not farther):
            return means, labels
        # The first move is no trend yet; and whether it is the end, only the means themselves can tell.
        farther = 0.0 if number == 0 or same else _FARTHER
        centres = means + farther * (means - centres)
    raise AssertionError("at least 1 iteration")


def _means(points: _Points, labels: Tensor, k: int) -> Tensor:
    """Means of the clusters, [k, d]."""
    sums = torch.zeros(k, points.rows.shape[1], dtype=torch.float64, device=labels.device)
    masses = torch.zeros(k, dtype=torch.float64, device=labels.device)
    mean = 1.0 if points.weights is None else float(points.weights.mean())
    for first in range(0, len(labels), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        member = torch.zeros(k, len(labels[block]), dtype=torch.float32, device=labels.device)
        shares = torch.ones(1) if points.weights is None else torch.from_numpy(points.weights[block] / mean)
        member.scatter_(0, labels[block][None], shares.to(member).expand(len(labels[block]))[None])
        sums += (member @ points.rows[block]).double()
        masses += member.sum(dim=1, dtype=torch.float64)
    return (sums / masses[:, None]).float()


def _objective(points: _Points, centres: Tensor, labels: Tensor) -> float:
    """Sum of (weight times) squared distance of the vectors to their centre."""
    total = 0.0
    for first in range(0, len(labels), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        squares = (points.rows[block] - centres[labels[block]]).double().square().sum(dim=1)
        total += float((squares if points.weights is None else squares * torch.from_numpy(points.weights[block]).to(squares.device)).sum())
    return total


def _fill_empty(points: _Points, centres: Tensor, costs: Tensor, labels: Tensor) -> None:
    """Give each empty cluster the vector farthest from its own centre, of a cluster that has others.

    Only a tolerance of 1 or more, or vectors heavier than a cluster should be, let one be empty.
    """
    sizes = torch.bincount(labels, minlength=len(centres))
    for cluster in (sizes == 0).nonzero()[:, 0].tolist():
        far = costs.gather(0, labels[None])[0] + points.rows.square().sum(dim=1)
        far[sizes[labels] < 2] = -torch.inf
        row = int(far.argmax())
        sizes[labels[row]] -= 1
        sizes[cluster] += 1
        labels[row] = cluster
