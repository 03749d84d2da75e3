"""Numbers about clusters: agreement, balance, stability, what is typical, and the picture."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn.metrics import homogeneity_score, normalized_mutual_info_score

from megaxelm.cluster.diagnostics import agreement_of, diagnose
from megaxelm.cluster.terms import read_terms, terms_of, typical_terms
from megaxelm.corpus.document import Document

LANGUAGES = {"en": "the dog and house with garden a", "fr": "le chien et la maison avec jardin"}
TOPICS = {"law": "lex court judge", "food": "pasta risotto tomato"}


def documents(number: int, domain: bool = True) -> list[Document]:
    """`number` documents of each language and topic, each with words of both."""
    rng = random.Random(5)
    return [
        Document(
            " ".join(rng.sample(LANGUAGES[code].split(), 5) + rng.sample(TOPICS[topic].split(), 2)),
            f"{code}/{topic}/{index}",
            code,
            {"domain": topic} if domain else {},
        )
        for code in LANGUAGES
        for topic in TOPICS
        for index in range(number)
    ]


def vectors_of(sample: Sequence[Document]) -> NDArray[np.float32]:
    """Two directions for the languages, two for the topics, and a little noise."""
    rng = np.random.default_rng(1)
    rows = [[d.language == "en", d.language == "fr", "law" in d.id, "food" in d.id] for d in sample]
    return (np.array(rows, dtype=np.float32) + rng.normal(0, 0.05, (len(rows), 4))).astype(np.float32)


def report(sample: Sequence[Document], labels: Sequence[int], names: Sequence[str] = ("c0", "c1"), **given: Any) -> dict[str, Any]:
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in names}
    for document, label in zip(sample, labels, strict=True):
        row = counts[names[label]].setdefault(document.language, {"documents": 0, "bytes": 0, "tokens": 0})
        row["documents"] += 1
        row["bytes"] += document.num_bytes
        row["tokens"] += len(document.text.split())
    sets = given.pop("sets", None)
    partitioner: Any = SimpleNamespace(names=list(names), kind="tfidf", languages=lambda: sets)
    options: dict[str, Any] = {"vectors": vectors_of(sample), "domain_field": "domain", "refit": None, "seed": 0} | given
    found = diagnose(partitioner, sample, np.array(labels, dtype=np.int64), options.pop("counts", counts), **options)
    json.dumps(found, allow_nan=False)
    return found


@settings(max_examples=60, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 9)))
def test_agreement_from_counts_is_that_of_sklearn_on_labels(table: NDArray[np.int64]) -> None:
    found = agreement_of(table)
    rows, columns = (np.repeat(index.ravel(), table.ravel()) for index in np.indices(table.shape))
    if len(rows) == 0:
        assert set(found.values()) == {None}
        return
    several = len(np.unique(rows)) > 1, len(np.unique(columns)) > 1
    assert found["nmi"] == (pytest.approx(normalized_mutual_info_score(rows, columns), abs=1e-4) if any(several) else None)
    assert found["explained"] == (pytest.approx(homogeneity_score(rows, columns), abs=1e-4) if several[0] else None)
    largest = sum(max(np.sum((rows == row) & (columns == column)) for column in columns) for row in np.unique(rows))
    assert found["purity"] == pytest.approx(largest / len(rows), abs=1e-4)


def test_balance_goes_over_all_clusters_and_not_only_those_with_documents() -> None:
    sizes = {"a": 30, "b": 10, "c": 0}
    counts = {name: {"en": {"documents": size, "bytes": 2 * size, "tokens": 3 * size}} for name, size in sizes.items() if size}
    sample = documents(5)
    found = report(sample, [0] * len(sample), names=["a", "b", "c"], counts=counts)["balance"]["tokens"]
    assert found["total"] == 120 and found["largest_to_mean"] == 2.25 and found["smallest_to_mean"] == 0
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert found["entropy_bits"] == pytest.approx(entropy, abs=1e-4)
    assert found["effective_clusters"] == pytest.approx(2**entropy, abs=0.01)


def test_the_name_follows_what_the_clusters_are_made_of() -> None:
    sample = documents(40)
    by_language = [int(document.language == "fr") for document in sample]
    by_topic = [int(document.meta["domain"] == "food") for document in sample]
    both = [2 * language + topic for language, topic in zip(by_language, by_topic, strict=True)]
    dealt = np.random.default_rng(0).integers(0, 2, len(sample)).tolist()
    found = report(sample, by_language)
    assert found["kind"] == "languages" and "tells 100%" in found["sentence"] and "(NMI 1.00), its domain 0%" in found["sentence"]
    found = report(sample, by_topic)
    assert found["kind"] == "topics" and "its domain 100%" in found["sentence"] and "(NMI 1.00), over the 160" in found["sentence"]
    assert report(sample, both, names=["a", "b", "c", "d"])["kind"] == "mixed"
    assert report(sample, dealt)["kind"] == "neither"


def test_chance_is_taken_off_so_that_many_domains_do_not_make_topics() -> None:
    sample = [Document(d.text, d.id, d.language, {"domain": f"d{number // 2}"}) for number, d in enumerate(documents(10))]
    labels = np.random.default_rng(4).integers(0, 2, len(sample)).tolist()
    found = report(sample, labels)
    assert found["agreement"]["domain"]["explained"] > 0.3 and found["agreement"]["domain"]["chance"] > 0.3
    assert found["kind"] == "neither"


def test_without_domains_topics_are_not_judged() -> None:
    sample = documents(10, domain=False)
    by_topic = [int("food" in document.id) for document in sample]
    found = report(sample, by_topic)
    assert found["kind"] == "unknown" and "not languages" in found["sentence"] and "corpus.fields.domain" in found["sentence"]
    assert found["agreement"]["domain"] is None and found["domains"] is None
    by_language = [int(document.language == "fr") for document in sample]
    assert report(sample, by_language)["kind"] == "languages"


def test_only_documents_that_name_a_domain_are_compared_with_domains() -> None:
    sample = documents(20)
    mixed = [Document(d.text, d.id, d.language, d.meta if number % 2 else {"domain": ""}) for number, d in enumerate(sample)]
    found = report(mixed, [int(document.language == "fr") for document in mixed])
    assert found["agreement"]["domain"]["documents"] == 40 and found["agreement"]["sample"] == 80
    assert np.sum(found["domains"]["documents"]) == 40


def test_rare_domains_are_added_up() -> None:
    sample = [Document(f"text {number}", str(number), "en", {"domain": f"d{number % 30:02d}"}) for number in range(90)]
    found = report(sample, [number % 2 for number in range(90)])["domains"]
    assert len(found["names"]) == 24 and found["other_names"] == 6
    assert np.sum(found["documents"]) + sum(found["other_documents"]) == 90 and sum(found["other_documents"]) == 18


def test_stability_is_the_rand_index_of_three_seeds() -> None:
    sample = documents(10)
    labels = [int(document.language == "fr") for document in sample]
    asked = []

    def refit(seed: int) -> NDArray[np.int64]:
        asked.append(seed)
        # The same clusters under other numbers; or clusters that have nothing to do with them.
        return np.array([1 - label for label in labels] if seed == 8 else [int("food" in document.id) for document in sample])

    found = report(sample, labels, refit=refit, seed=7)["stability"]
    assert asked == [8, 9] and found["seeds"] == [7, 8, 9]
    assert found["adjusted_rand"][0][1] == 1 and found["adjusted_rand"][0][2] == pytest.approx(0, abs=0.05)
    assert found["least"] == min(found["adjusted_rand"][0][2], found["adjusted_rand"][1][2])
    assert found["mean"] == pytest.approx((1 + 2 * found["adjusted_rand"][0][2]) / 3, abs=1e-3)


def test_without_chance_stability_is_not_applicable_and_says_so() -> None:
    sample = documents(5)
    found = report(sample, [0] * len(sample), names=["all"])
    assert found["stability"]["adjusted_rand"] is None and "every seed" in found["stability"]["reason"]
    found = report(sample, [0] * len(sample), names=["all"], refit=lambda seed: np.zeros(len(sample), dtype=np.int64))
    assert found["stability"]["adjusted_rand"] is None and "one cluster" in found["stability"]["reason"]
    assert found["kind"] == "unknown" and "in one cluster" in found["sentence"]


def test_terms_tell_what_a_cluster_is_and_what_it_is_beyond_its_languages() -> None:
    sample = documents(30)
    # Food of both languages and law in English; law in French.
    labels = [int(document.language == "fr" and "law" in document.id) for document in sample]
    found = report(sample, labels)["typical_terms"]
    overall, within = ([{item["term"] for item in rows} for rows in found[key]] for key in ("overall", "within_languages"))
    assert overall[0] >= {"the", "pasta"} and overall[1] >= {"le", "court", "chien"}
    assert within[1] == {"lex", "court", "judge"} and within[0] == {"pasta", "risotto", "tomato"}


def test_clusters_dealt_at_random_have_no_typical_terms() -> None:
    words = np.array([first + second for first in "abcdefghijklmnopqrst" for second in "abcdefghij"])
    listed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        texts = [" ".join(rng.choice(words, 20)) for _ in range(200)]
        found = typical_terms(read_terms(texts), rng.integers(0, 4, 200), rng.integers(0, 2, 200), 4, 12)
        listed += any(found)
    # Promised: below 5 % of the times; 4 or more of 20 would have a chance of 1.6 % then.
    assert listed < 4


def test_shares_of_terms_are_counted_in_documents() -> None:
    texts = ["bread bread bread"] * 30 + ["milk"] * 10 + ["milk"] * 40
    found = typical_terms(read_terms(texts), np.array([0] * 40 + [1] * 40), np.zeros(80, dtype=np.int64), 3, 5)
    assert found[2] == []
    assert (found[0][0]["term"], found[0][0]["share"], found[0][0]["expected"]) == ("bread", 0.75, 0.375)
    # Mantel-Haenszel by hand: 30 - 15 - 1/2 over the root of 40 * 40 * 30 * 50 / (80^2 * 79).
    assert found[0][0]["z"] == pytest.approx(14.5 / np.sqrt(40 * 40 * 30 * 50 / (80**2 * 79)), abs=0.01)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Don't stop, 42 l’été!", {"don't", "stop", "l’été"}),
        ("बिल्ली और घर", {"बिल्ली", "और", "घर"}),
        ("中文很好，我", {"中文", "文很", "很好", "我"}),
        ("ฉันรัก", {"ฉัน", "นรั", "รัก"}),
        ("한국어 텍스트", {"한국어", "텍스트"}),
        ("מה לא", {"מה", "לא"}),
        ("日本abc", {"日本", "abc"}),
        ("... 123", set()),
        ("e\u0301te\u0301", {"été"}),
    ],
)
def test_terms_are_words_or_pairs_of_characters(text: str, terms: set[str]) -> None:
    assert terms_of(text) == terms


def test_typical_documents_are_the_nearest_to_the_mean_and_differ() -> None:
    sample = [Document(text, f"{number}", "en", {}) for number, text in enumerate(["far", "near", "near", "nearer\n\nstill", "x" * 300])]
    vectors = np.array([[9, 0], [1, 0], [1, 0], [1.9, 0], [-3, 0]], dtype=np.float32)
    found = report(sample, [0] * 5, vectors=vectors, domain_field="domain")["typical_documents"]
    assert [row["text"] for row in found[0][:2]] == ["nearer still", "near"] and len(found[0]) == 3
    assert found[0][2]["text"] == "x" * 200 + "…" and found[1] == []
    assert found[0][0]["id"] == "3" and found[0][0]["domain"] is None and found[0][0]["distance"] == pytest.approx(0.08, abs=1e-3)


def test_typical_documents_are_near_the_mean_of_their_own_cluster() -> None:
    sample = [Document(f"text {number}", f"{number}", "en", {}) for number in range(8)]
    vectors = np.array([[0], [1], [5], [4], [100], [101], [105], [109]], dtype=np.float32)
    found = report(sample, [0] * 4 + [1] * 4, vectors=vectors)["typical_documents"]
    assert [[row["id"] for row in rows] for rows in found] == [["1", "3", "0"], ["6", "5", "4"]]


def test_the_picture_keeps_like_with_like_and_is_the_same_again() -> None:
    sample = documents(15)
    labels = [int(document.language == "fr") for document in sample]
    picture = report(sample, labels)["picture"]
    assert picture == report(sample, labels)["picture"] and picture["method"] == "t-SNE"
    assert picture["documents"] == len(picture["x"]) == len(picture["cluster"]) == 60
    places = np.column_stack([picture["x"], picture["y"]])
    assert places.min() == 0 and places.max() == 1
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(60)
    groups = np.array([document.id.rsplit("/", 1)[0] for document in sample])
    assert np.mean(groups[distances.argmin(axis=1)] == groups) > 0.95
    assert [picture["languages"][number] for number in picture["language"]] == [document.language for document in sample]
    assert picture["cluster"] == labels


def test_the_picture_of_a_large_sample_is_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaxelm.cluster.diagnostics._PICTURE_DOCUMENTS", 16)
    sample = documents(10)
    labels = [int(document.language == "fr") for document in sample]
    picture = report(sample, labels)["picture"]
    assert picture == report(sample, labels)["picture"]
    assert picture["documents"] == 16 and picture["sample"] == 40 and picture["method"] == "PCA"
    assert {number for number in picture["cluster"]} == {0, 1}


@pytest.mark.parametrize("number", [1, 2, 3, 30])
def test_few_or_equal_documents_make_a_picture_without_warnings(number: int) -> None:
    sample = [Document("same", str(index), "en", {}) for index in range(number)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(sample, [0] * number, vectors=np.ones((number, 3), dtype=np.float32))
    assert found["picture"]["method"] == "PCA" and np.isfinite(found["picture"]["x"]).all()


def test_without_vectors_there_is_neither_picture_nor_typical_document() -> None:
    sample = documents(5)
    found = report(sample, [0] * len(sample), vectors=None)
    assert found["picture"] is None and found["typical_documents"] is None and found["typical_terms"]["overall"]


def test_labels_that_are_not_of_the_sample_are_refused() -> None:
    sample = documents(5)
    partitioner: Any = SimpleNamespace(names=["a"], kind="tfidf", languages=lambda: None)
    options: dict[str, Any] = {"vectors": None, "domain_field": "domain", "refit": None, "seed": 0}
    for labels in ([0], [1] * len(sample)):
        with pytest.raises(ValueError, match="labels"):
            diagnose(partitioner, sample, np.array(labels), {}, **options)
