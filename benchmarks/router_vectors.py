"""Weights of the tfidf router before every token of a document: by updates, against vectorising each prefix again.

    python benchmarks/router_vectors.py [--tokens 2048] [--analyzers subword,char,word] [--repeats 3]

The document is drawn from a Zipf distribution over 20,000 words, two tokens each; the space has 100 dimensions, and there are 16 experts.
The updates come in two forms: of a whole text, as in scoring, and one by one, as in generation. All start from the same token ids (subword)
or pieces of text (char, word), run in turn on one core, and give one vector a token; the weights are computed of these vectors. Vectorising
again is done for every prefix, none is left out, and weights are compared.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megaxelm.cluster.space import TfidfSpace
from megaxelm.ensemble.routers import TfidfRouter
from megaxelm.recipe import TfidfConfig

_WORDS, _EXPERTS, _DOCUMENTS = 20_000, 16, 400
_BOUND = 1e-5
_ROUNDS = 20
"""The short way is timed so many times in a row, and the mean taken: alone it is over in milliseconds."""


class _Halves:
    """A tokenizer for words of six letters: two tokens a word, the space with the first."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def pieces(self, text: str) -> list[str]:
        return [piece for word in text.split() for piece in (f" {word[:3]}", word[3:])]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.numbers.setdefault(piece, len(self.numbers)) for piece in self.pieces(text)] for text in texts]


def _texts(count: int, words: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.random.default_rng(0).integers(0, 26, (_WORDS, 6)) + ord("a")
    vocabulary = np.array(["".join(map(chr, row)) for row in letters])
    shares = 1.0 / np.arange(1, _WORDS + 1)
    return [" ".join(vocabulary[rng.choice(_WORDS, words, p=shares / shares.sum())]) for _ in range(count)]


def measure(analyzer: str = "subword", tokens: int = 2048, repeats: int = 3) -> dict[str, Any]:
    """Time both ways on one document of `tokens` tokens, `repeats` times in turn, and compare their weights.

    Raises:
        AssertionError: if a vector or a weight differs by more than 1e-5.
    """
    tokenizer = _Halves()
    space = TfidfSpace.fit(_texts(_DOCUMENTS, 500, 1), TfidfConfig(analyzer=analyzer, dimensions=100), 0, tokenizer)
    centres = space.transform(_texts(_EXPERTS, 500, 2))
    router = TfidfRouter(space, torch.from_numpy(centres), temperature=0.1)
    text = _texts(1, (tokens + 1) // 2, 3)[0]
    pieces = tokenizer.pieces(text)[:tokens]
    ids = [tokenizer.numbers.setdefault(piece, len(tokenizer.numbers)) for piece in pieces]
    parts: Sequence[Any] = pieces if space.reads_text else ids
    ways = {"whole_text": (_whole_text, _ROUNDS), "one_by_one": (_one_by_one, _ROUNDS), "again": (_again, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(repeats):
        for name, (way, rounds) in ways.items():
            began = time.perf_counter()
            for _ in range(rounds):
                found[name] = way(space, parts)
            seconds[name].append((time.perf_counter() - began) / rounds)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    weights = {name: router.of_vectors(torch.from_numpy(vectors)).exp().numpy() for name, vectors in found.items()}
    vector_gap, weight_gap = (
        max(float(np.abs(values[name] - values["again"]).max()) for name in ("whole_text", "one_by_one")) for values in (found, weights)
    )
    assert vector_gap <= _BOUND and weight_gap <= _BOUND, f"{analyzer}: vectors differ by {vector_gap:.1e}, weights by {weight_gap:.1e}"
    return {
        "analyzer": analyzer,
        "tokens": tokens,
        "terms": len(space.codes),
        "dimensions": space.dimensions,
        "repeats": repeats,
        "seconds": {name: _spread(values) for name, values in seconds.items()},
        "times_faster": {name: round(medians["again"] / medians[name], 1) for name in ("whole_text", "one_by_one")},
        "vector_difference": vector_gap,
        "weight_difference": weight_gap,
    }


def _whole_text(space: TfidfSpace, parts: Sequence[Any]) -> np.ndarray:
    """Vectors before each part, [parts, dimensions], as the router asks for them when a whole text is scored."""
    return space.prefixes(space.start(), parts)


def _one_by_one(space: TfidfSpace, parts: Sequence[Any]) -> np.ndarray:
    """The same, as the router asks for them while text is generated."""
    state, vectors = space.start(), []
    for part in parts:
        vectors.append(space.vector(state))
        space.push(state, part)
    return np.stack(vectors)


def _again(space: TfidfSpace, parts: Sequence[Any]) -> np.ndarray:
    """The same, every prefix from its beginning."""
    if space.reads_text:
        return np.concatenate([space.transform(["".join(parts[:end])]) for end in range(len(parts))])
    return np.concatenate([space.transform_tokens([parts[:end]]) for end in range(len(parts))])


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(seconds, [10, 50, 90]).round(5).tolist()
    return {"median": median, "p10": low, "p90": high}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The measurements as lines of text."""
    lines = [
        f"{'analyzer':<10} {'whole text':>14} {'one by one':>14} {'every prefix again':>20} {'times faster':>16} {'weights differ by':>19}"
    ]
    for result in results:
        times = [result["seconds"][name]["median"] * 1e3 for name in ("whole_text", "one_by_one", "again")]
        faster = " / ".join(f"{value:.0f}" for value in result["times_faster"].values())
        shown = f"{times[0]:>11.1f} ms {times[1]:>11.1f} ms {times[2]:>17.1f} ms {faster:>16} {result['weight_difference']:>19.1e}"
        lines.append(f"{result['analyzer']:<10} {shown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--analyzers", default="subword,char,word")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(analyzer, options.tokens, options.repeats) for analyzer in options.analyzers.split(",")]
    print(table(results))
    print(json.dumps({"benchmark": "router_vectors", "numpy": np.__version__, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
