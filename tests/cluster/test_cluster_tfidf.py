"""The TF-IDF partitioner: what it assigns, to whom, and what its settings change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaxelm.cluster import tfidf
from megaxelm.cluster.load import load_partitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.corpus.document import Document, TokenDocument
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig

TOPICS = ["boat sail wave wind harbour rope", "oven flour sugar butter bake cake", "goal ball team match score kick"]


class Words:
    """A stand-in for the tokenizer: a number for each word."""

    fingerprint = "words"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int.from_bytes(word.encode()[:4], "little") % 5000 for word in text.split()] for text in texts]


def topical(topic: int, count: int, words: int = 12, seed: int = 0) -> list[Document]:
    rng = random.Random(f"{topic} {seed}")
    vocabulary = TOPICS[topic].split()
    return [Document(" ".join(rng.choices(vocabulary, k=words)), f"{topic}/{number}", "en") for number in range(count)]


def as_tokens(documents: Sequence[Document]) -> list[TokenDocument]:
    ids = Words().encode([document.text for document in documents])
    return [TokenDocument(document.language, document.key, np.array(row, np.uint16)) for document, row in zip(documents, ids, strict=True)]


def fitted(k: int, documents: Sequence[Document], seed: int = 0, **config: Any) -> TfidfPartitioner:
    partitioner = TfidfPartitioner(k, TfidfConfig(**{"dimensions": 6, **config}), seed, Words())
    partitioner.fit(documents)
    return partitioner


SAMPLE = [document for topic in range(3) for document in topical(topic, 10)]


@pytest.mark.parametrize("analyzer", ["subword", "char", "word"])
def test_topics_are_found_and_new_documents_follow_them(analyzer: str, tmp_path: Path) -> None:
    partitioner = fitted(3, SAMPLE, analyzer=analyzer)
    assert partitioner.reads_text == (analyzer != "subword")
    new = [document for topic in range(3) for document in topical(topic, 5, seed=1)]
    clusters = partitioner.assign(new).reshape(3, 5)
    assert (clusters == clusters[:, :1]).all() and len(set(clusters[:, 0])) == 3
    partitioner.save(tmp_path)
    loaded = load_partitioner(tmp_path, Words())
    assert (loaded.assign(new) == clusters.ravel()).all() and loaded.notes() == partitioner.notes()
    assert loaded.reads_text == partitioner.reads_text


def test_tokens_alone_are_assigned_like_their_text_and_may_be_mixed_with_it(tmp_path: Path) -> None:
    partitioner = fitted(3, SAMPLE)
    new = [document for topic in range(3) for document in topical(topic, 5, seed=2)]
    mixed = [pair[number % 2] for number, pair in enumerate(zip(new, as_tokens(new), strict=True))]
    expected = partitioner.assign(new).tolist()
    assert partitioner.assign(as_tokens(new)).tolist() == partitioner.assign(mixed).tolist() == expected
    assert (partitioner.vectors(mixed) == partitioner.vectors(new)).all()
    partitioner.save(tmp_path)
    assert load_partitioner(tmp_path).assign(as_tokens(new)).tolist() == expected
    assert partitioner.assign([]).shape == (0,)


@pytest.mark.parametrize("analyzer", ["char", "word"])
def test_tokens_alone_are_an_error_where_terms_are_text(analyzer: str) -> None:
    with pytest.raises(ClusterError, match="reads text and not token ids"):
        fitted(2, SAMPLE, analyzer=analyzer).assign(as_tokens(SAMPLE))


def test_a_document_without_a_known_term_goes_to_the_shortest_centre_always() -> None:
    partitioner = fitted(3, SAMPLE)
    shortest = int(np.linalg.norm(partitioner.centres, axis=1).argmin())
    empty = TokenDocument("en", 0, np.zeros(0, np.uint16))
    unknown = TokenDocument("en", 0, np.array([4999, 4998], np.uint16))
    for batch in ([empty], [unknown, *as_tokens(SAMPLE)], [*SAMPLE, Document("zzz yyy", "x", "en"), empty]):
        for document, cluster in zip(batch, partitioner.assign(batch), strict=True):
            if not partitioner.vectors([document]).any():
                assert cluster == shortest


def test_the_same_seed_gives_the_same_and_another_seed_another_start() -> None:
    rng = random.Random(0)
    everything = " ".join(TOPICS).split()
    mixed = [Document(" ".join(rng.choices(everything, k=6)), str(number), "en") for number in range(60)]
    first, again, other = (fitted(5, mixed, seed, starts=1) for seed in (0, 0, 1))
    assert (first.centres == again.centres).all() and (first.space.components == again.space.components).all()
    assert not np.allclose(np.sort(first.centres, axis=0), np.sort(other.centres, axis=0))


def test_clusters_of_the_sample_are_balanced_by_documents_or_by_tokens() -> None:
    # One topic in long documents, two in short ones.
    sample = [*topical(0, 12, words=60), *topical(1, 12, words=10), *topical(2, 12, words=10)]
    by_documents = fitted(2, sample, assign="balanced").assign(sample)
    assert np.bincount(by_documents).tolist() == [18, 18]
    partitioner = fitted(2, sample, assign="balanced", balance="tokens", tolerance=0.05)
    weights = np.array([len(document.text.split()) for document in sample])
    for documents in (sample, as_tokens(sample)):
        tokens = np.bincount(partitioner.assign(documents), weights=weights)
        assert np.abs(tokens - weights.sum() / 2).max() <= 0.05 * weights.sum() / 2 + weights.max()
    assert np.bincount(partitioner.assign(sample)).min() < 12


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_balanced_assignment_divides_every_block_equally_and_nearest_does_not(size: int) -> None:
    block = topical(1, size, seed=3)
    balanced = np.bincount(fitted(3, SAMPLE, assign="balanced").assign(block), minlength=3)
    assert sorted(balanced.tolist()) == sorted(len(part) for part in np.array_split(np.arange(size), 3))
    assert sorted(np.bincount(fitted(3, SAMPLE).assign(block), minlength=3).tolist()) == [0, 0, size]


def test_balanced_assignment_is_the_cheapest_division() -> None:
    from scipy.optimize import linear_sum_assignment

    from megaxelm.cluster.kmeans import squared_distances

    partitioner = fitted(3, SAMPLE, assign="balanced")
    block = [*topical(0, 5, seed=4), *topical(1, 4, seed=4)]
    costs = squared_distances(partitioner.vectors(block), partitioner.centres)
    rows, places = linear_sum_assignment(np.repeat(costs, 3, axis=1))
    chosen = costs[np.arange(9), partitioner.assign(block)].sum()
    assert chosen == pytest.approx(np.repeat(costs, 3, axis=1)[rows, places].sum())


def test_the_recipes_settings_reach_balanced_k_means(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(vectors: np.ndarray, k: int, seed: int, iterations: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        seen.update(options, k=k, seed=seed, iterations=iterations, shape=vectors.shape)
        return vectors[:k], np.zeros(len(vectors), np.int64)

    monkeypatch.setattr(tfidf, "balanced_kmeans", spy)
    fitted(2, SAMPLE, seed=9, iterations=3, starts=4, tolerance=0.2, balance="tokens")
    weights = seen.pop("weights")
    assert seen == {"k": 2, "seed": 9, "iterations": 3, "starts": 4, "tolerance": 0.2, "shape": (30, 6)}
    assert sorted(weights) == [12.0] * 30
    fitted(2, SAMPLE)
    assert seen["weights"] is None and seen["starts"] == 8 and seen["tolerance"] == 0


def test_tokens_cannot_be_balanced_without_a_tokenizer_and_an_empty_text_counts_one() -> None:
    config = TfidfConfig(analyzer="char", balance="tokens")
    with pytest.raises(ClusterError, match="balance = tokens: texts need the run's tokenizer"):
        TfidfPartitioner(2, config, 0).fit(SAMPLE)
    weights = TfidfPartitioner(2, config, 0, Words())._weights([Document("", "x", "en"), *SAMPLE[:2]])
    assert weights is not None and weights.tolist() == [1, 12, 12]


def test_notes_warn_of_the_word_pattern_and_of_balancing_by_blocks() -> None:
    assert fitted(2, SAMPLE).notes() == []
    assert "published pattern" in fitted(2, SAMPLE, analyzer="word").notes()[0]
    assert "file of one language" in fitted(2, SAMPLE, assign="balanced").notes()[0]
