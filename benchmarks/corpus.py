"""Everything that prepares a corpus, beside its peers, in one run.

    python benchmarks/corpus.py [--corpus 'texts/*.jsonl.zst'] [--parts tokenising,kmeans] [--quick] [--output FILE]

Runs the benchmarks of this folder that are named so, one after the other, and sets the ratios against their targets. With --corpus the
text of those files is tokenised and clustered; without it message catalogs and Gaussians serve alone. Each part's own docstring says
what runs against what. Prints the tables, then one JSON line, which --output also appends to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The parts are files beside this one. Each is imported when it runs: worker processes import this file again, and must not wait for torch.
sys.path.insert(0, str(Path(__file__).parent))

Found = dict[str, Any]
_TARGETS = """
tokenising: times faster than Megatron's way         >= 1.5    {tokenising[times_faster]}
index of 10^8 documents, opened, first sample        < 1 s     {opening:.4f} s
random samples, as a share of numpy's time           <= 1.5    {samples:.2f}
balanced k-means: times faster than the peer         >= 10     {kmeans}
balanced k-means: gap of the objective               <= 2 %    {gaps}
router vectors of a text: times faster               >= 100    {router}
"""


def run_tokenising(options: argparse.Namespace) -> Found:
    import tokenising

    megabytes, repeats = (4, 1) if options.quick else (60, 3)
    found = tokenising.measure(options.corpus, None, megabytes, len(os.sched_getaffinity(0)), repeats)
    print(tokenising.table(found))
    found["peak_mb"] = tokenising.measure_memory(options.corpus, None, (megabytes / 4, megabytes))
    print("peak memory of one process:", ", ".join(f"{value:.0f} MB for {size} of text" for size, value in found["peak_mb"].items()))
    return found


def run_token_index(options: argparse.Namespace) -> Found:
    import token_index

    return token_index.measure(quick=options.quick)


def run_kmeans(options: argparse.Namespace) -> Found:
    import kmeans

    count = 5_000 if options.quick else 100_000
    sets = {"gaussians": kmeans.gaussians(count)}
    if options.corpus:
        sets["text"] = kmeans.resampled(kmeans.text_vectors(options.corpus), count)
    found = {name: kmeans.measure(vectors, k=16, iterations=10) for name, vectors in sets.items()}
    for name, item in found.items():
        seconds = item["seconds"]
        print(
            f"{name:<10} ours {seconds['ours']['median']:.2f} s, k-means-constrained {seconds['peer']['median']:.2f} s, "
            f"{item['times_faster']} times faster, gap {item['largest_gap']:.2%}"
        )
    return found


def run_router_vectors(options: argparse.Namespace) -> Found:
    import router_vectors

    results = [router_vectors.measure(name, 256 if options.quick else 2048) for name in ("subword", "char", "word")]
    print(router_vectors.table(results))
    return {"results": results}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "tokenising": run_tokenising,
    "token_index": run_token_index,
    "kmeans": run_kmeans,
    "router_vectors": run_router_vectors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, proves nothing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    unknown = [name for name in options.parts.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    names = ("numpy", "torch", "tokenizers", "sentencepiece", "datatrove", "megatron-core", "k-means-constrained")
    line: Found = {
        "benchmark": "corpus",
        "quick": options.quick,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    line["versions"] = {name: version(name) for name in names}
    for name in options.parts.split(","):
        print(f"\n{name}", flush=True)
        line[name] = PARTS[name](options)
    if set(PARTS) <= set(line):
        print(_against_targets(line))
    print(json.dumps(line))
    if options.output:
        with open(options.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _against_targets(line: Found) -> str:
    return _TARGETS.format(
        tokenising=line["tokenising"],
        opening=line["token_index"]["opening"]["cold_s"],
        samples=line["token_index"]["samples"]["numpy"]["ours_to_this"],
        kmeans={name: item["times_faster"] for name, item in line["kmeans"].items()},
        gaps={name: f"{item['largest_gap']:.2%}" for name, item in line["kmeans"].items()},
        router={item["analyzer"]: item["times_faster"]["whole_text"] for item in line["router_vectors"]["results"]},
    )


if __name__ == "__main__":
    main()
