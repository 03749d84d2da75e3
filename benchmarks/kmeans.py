"""Balanced k-means: ours against k-means-constrained, from the same starts, for the same iterations, with clusters of the same sizes.

    python benchmarks/kmeans.py [--vectors vectors.npy | --corpus 'texts/*.jsonl.zst'] [--quick] [--repeats 1]
    python benchmarks/kmeans.py --million

100,000 vectors of 100 numbers into 16 clusters of floor(n / k) or ceil(n / k): 64 Gaussians of unequal size, and vectors of real text
where they are given, drawn again with a little noise up to the number. The peer assigns once more after its last iteration, so ours gets
one iteration more. It also assigns by distances instead of their squares, so the two take different ways from the same start, and either
may end lower. Both run in this process turn by turn. The gap of the objectives is a share of what there is to gain: (ours - peer's)
/ (random balanced clusters - peer's). `--million` divides 1,000,000 x 100 into 64 and measures time and peak memory, of ours alone.
Prints a table, then one JSON line. Needs the package k-means-constrained.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megaxelm.cluster.kmeans import balanced_kmeans, refine

Vectors = NDArray[np.float32]


def gaussians(count: int, dimensions: int = 100, number: int = 64, seed: int = 0) -> Vectors:
    """Vectors [count, dimensions] of Gaussians whose shares differ widely and whose middles are about as far apart as they are wide."""
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.ones(number))
    middles = random.normal(size=(number, dimensions), scale=0.5).astype(np.float32)
    return middles[random.choice(number, size=count, p=shares)] + random.normal(size=(count, dimensions)).astype(np.float32)


def resampled(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """`count` of the vectors, drawn again with noise of a tenth of their spread, so that no two are equal."""
    random = np.random.default_rng(seed)
    drawn = vectors[random.integers(len(vectors), size=count)].astype(np.float32)
    return drawn + random.normal(size=drawn.shape).astype(np.float32) * (0.1 * vectors.std(axis=0)).astype(np.float32)


def text_vectors(pattern: str, documents: int = 20_000) -> Vectors:
    """TF-IDF vectors after SVD of the files' texts, as the partitioner makes them, with character n-grams."""
    from megaxelm.cluster.space import TfidfSpace
    from megaxelm.recipe import TfidfConfig

    texts: list[str] = []
    files = sorted(Path().glob(pattern) if not pattern.startswith("/") else Path("/").glob(pattern[1:]))
    if not files:
        raise SystemExit(f"--corpus {pattern}: no such file; give a glob of .jsonl or .jsonl.zst files with a field `text`")
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".zst":
            import zstandard

            data = zstandard.ZstdDecompressor().stream_reader(data).read()
        texts += [json.loads(line)["text"][:2000] for line in data.decode("utf-8").splitlines()[: -(-documents // len(files))]]
    config = TfidfConfig(analyzer="char")
    return np.asarray(TfidfSpace.fit_transform(texts, config, 0, None)[1], dtype=np.float32)


def objective(vectors: Vectors, labels: NDArray[np.integer]) -> float:
    """Sum of squared distances to the means of the clusters, in fp64."""
    rows = vectors.astype(np.float64)
    return sum(float(((rows[labels == j] - rows[labels == j].mean(axis=0)) ** 2).sum()) for j in np.unique(labels))


def measure(vectors: Vectors, k: int = 16, iterations: int = 5, repeats: int = 1, seed: int = 0) -> dict[str, Any]:
    """Ours and the peer's in turn on `vectors` [n, d]: seconds (median, p10, p90), objectives, ratio of the medians and gap.

    Seconds of the processor next to those of the clock: on a busy machine only they count.
    Each repeat has starts of its own. Raises AssertionError if the clusters of either are not floor(n / k) or ceil(n / k) large.
    """
    from k_means_constrained import KMeansConstrained

    count = len(vectors)
    floor, ceil = count // k, -(-count // k)
    random = np.random.default_rng(seed)
    refine(vectors[: 20 * k], vectors[:k], 1)  # what is slow the first time: imports, threads
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    processor: dict[str, list[float]] = {"ours": [], "peer": []}
    gaps: list[float] = []
    reached: dict[str, list[float]] = {"ours": [], "peer": [], "random": []}
    for _ in range(repeats):
        start = vectors[random.choice(count, k, replace=False)]
        labels: dict[str, NDArray[np.integer]] = {"random": random.permutation(np.arange(count) % k)}
        began, busy = time.perf_counter(), time.process_time()
        labels["ours"] = np.asarray(refine(vectors, start, iterations + 1)[1])
        seconds["ours"].append(time.perf_counter() - began)
        processor["ours"].append(time.process_time() - busy)
        peer = KMeansConstrained(
            k, size_min=floor, size_max=ceil, init=start, n_init=1, max_iter=iterations, tol=0.0, random_state=seed, n_jobs=1
        )
        began, busy = time.perf_counter(), time.process_time()
        labels["peer"] = peer.fit_predict(vectors)
        seconds["peer"].append(time.perf_counter() - began)
        processor["peer"].append(time.process_time() - busy)
        for name in ("ours", "peer"):
            sizes = np.bincount(labels[name], minlength=k)
            assert floor <= sizes.min() and sizes.max() <= ceil, f"{name}: sizes {sizes.min()} to {sizes.max()}, not {floor} to {ceil}"
        for name, found in labels.items():
            reached[name].append(objective(vectors, found))
        gaps.append((reached["ours"][-1] - reached["peer"][-1]) / (reached["random"][-1] - reached["peer"][-1]))
    return {
        "shape": [count, vectors.shape[1]],
        "k": k,
        "iterations": iterations,
        "repeats": repeats,
        "seconds": {name: _quantiles(values) for name, values in seconds.items()},
        "processor_seconds": {name: _quantiles(values) for name, values in processor.items()},
        "objective": {name: round(float(np.median(values)), 3) for name, values in reached.items()},
        "times_faster": round(float(np.median(seconds["peer"]) / np.median(seconds["ours"])), 1),
        "times_less_processor_time": round(float(np.median(processor["peer"]) / np.median(processor["ours"])), 1),
        "largest_gap": round(max(gaps), 5),
    }


def measure_large(count: int = 1_000_000, k: int = 64, iterations: int = 10, starts: int = 1) -> dict[str, Any]:
    """Ours alone on `count` x 100 Gaussian vectors: seconds, and peak memory beyond the vectors in bytes (Linux, on the CPU)."""
    vectors = torch.from_numpy(gaussians(count))
    balanced_kmeans(vectors[: 20 * k], k, 0, 1, starts=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
    before = _status("VmRSS")
    began, busy = time.perf_counter(), time.process_time()
    _, labels = balanced_kmeans(vectors, k, 0, iterations, starts=starts)
    took, busy = time.perf_counter() - began, time.process_time() - busy
    sizes = torch.bincount(labels, minlength=k)
    assert count // k <= sizes.min() and sizes.max() <= -(-count // k)
    extra = _status("VmHWM") - before
    return {
        "shape": [count, 100],
        "k": k,
        "iterations": iterations,
        "starts": starts,
        "seconds": round(took, 1),
        "processor_seconds": round(busy, 1),
        "peak_bytes_beyond_vectors": extra,
        "peak_bytes_a_vector": round(extra / count, 1),
    }


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def _quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90]).tolist()
    return {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", help="NumPy file of vectors of real text, [n, d]")
    parser.add_argument("--corpus", help="glob of .jsonl or .jsonl.zst files to make such vectors from")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="5,000 vectors and 3 iterations")
    parser.add_argument("--million", action="store_true", help="time and memory of 1,000,000 x 100 into 64")
    options = parser.parse_args()
    versions = {name: version(name) for name in ("numpy", "torch", "k-means-constrained", "ortools")}
    results: dict[str, Any] = {
        "benchmark": "kmeans",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if options.million:
        results["million"] = measure_large()
        print("  ".join(f"{key} {value}" for key, value in results["million"].items()))
    else:
        count, iterations = (5000, 3) if options.quick else (options.count, options.iterations)
        data = {"gaussians": gaussians(count)}
        if options.vectors or options.corpus:
            found = np.load(options.vectors) if options.vectors else text_vectors(options.corpus)
            data["text"] = resampled(found, count)
        else:
            print("no --vectors and no --corpus: Gaussians only", file=sys.stderr)
        print(f"{'data':<10} {'ours, s':>9} {'peer, s':>9} {'times faster':>13} {'largest gap':>12}")
        for name, vectors in data.items():
            results[name] = found_here = measure(vectors, options.k, iterations, options.repeats)
            ours, peer = (found_here["seconds"][who]["median"] for who in ("ours", "peer"))
            print(f"{name:<10} {ours:>9} {peer:>9} {found_here['times_faster']:>13} {found_here['largest_gap']:>12.3%}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
