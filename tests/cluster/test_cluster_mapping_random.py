"""Clusters that the user names, and clusters at random."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.cluster.load import load_partitioner
from megaxelm.cluster.make import make_partitioner
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.random_clusters import RandomPartitioner
from megaxelm.corpus.document import Document, TokenDocument
from megaxelm.errors import ClusterError
from megaxelm.recipe import ClustersConfig


def documents(*codes: str) -> list[Document]:
    return [Document(text=f"text in {code}", id=f"{code}/0", language=code) for code in codes]


def random_partitioner(k: int, seed: int = 0) -> RandomPartitioner:
    partitioner = RandomPartitioner(k, seed)
    partitioner.fit(documents(*["en"] * k))
    return partitioner


def test_mapping_gives_the_clusters_named_in_their_order() -> None:
    partitioner = MappingPartitioner({"slavic": ["ru", "bg"], "rest": ["en", "de"]})
    partitioner.fit(documents("bg", "de", "en", "ru", "en"))
    assert partitioner.names == ["slavic", "rest"]
    assert partitioner.languages() == {"slavic": ["ru", "bg"], "rest": ["en", "de"]}
    assert partitioner.assign(documents("de", "bg", "ru", "en")).tolist() == [1, 0, 0, 1]
    assert partitioner.assign([TokenDocument("bg", 1, np.array([2]))]).tolist() == [0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "is empty"),
        ({"a": []}, "clusters.mapping.a: no language"),
        ({"a": ["en"], "b": ["de", "en"]}, "en is in a and in b"),
        ({"a": ["en", "en"]}, "en is twice in a"),
        ({"a": ["en"], "A": ["de"]}, "A and a differ in letter case only"),
        ({"seed": ["en"]}, "'seed'.*choose another"),
        ({"Dense": ["en"]}, "'Dense'.*choose another"),
        ({"../up": ["en"]}, "letters"),
        ({"a b": ["en"]}, "letters"),
        ({"": ["en"]}, "letters"),
        ({"-x": ["en"]}, "letters"),
        ({"славянские": ["ru"]}, "letters"),
        ({"a" * 61: ["en"]}, "at most 60"),
    ],
)
def test_a_mapping_that_makes_no_clusters_is_an_error(mapping: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        MappingPartitioner(mapping)


def test_languages_of_corpus_and_mapping_have_to_agree() -> None:
    partitioner = MappingPartitioner({"a": ["en"], "b": ["de", "sv"]})
    with pytest.raises(ClusterError, match="sw of the corpus in no cluster"):
        partitioner.fit(documents("en", "de", "sv", "sw"))
    with pytest.raises(ClusterError, match="the corpus has no sv; its languages are de, en"):
        partitioner.fit(documents("en", "de"))
    with pytest.raises(ClusterError, match="no document"):
        partitioner.fit([])


def test_a_damaged_mapping_on_disk_is_a_cluster_error(tmp_path: Path) -> None:
    partitioner = MappingPartitioner({"a": ["en"], "b": ["de"]})
    partitioner.fit(documents("en", "de"))
    partitioner.save(tmp_path)
    path = tmp_path / "partitioner.json"
    stored = json.loads(path.read_text())
    for damaged in ({"languages": {"a": ["en"], "b": ["en"]}}, {"languages": {"a": ["en"], "seed": ["de"]}}, {"names": ["a"]}):
        path.write_text(json.dumps(stored | damaged))
        with pytest.raises(ClusterError, match="partitioner.json: damaged"):
            load_partitioner(tmp_path)


def test_a_damaged_random_partitioner_on_disk_is_a_cluster_error(tmp_path: Path) -> None:
    random_partitioner(3).save(tmp_path)
    path = tmp_path / "partitioner.json"
    stored = json.loads(path.read_text())
    for damaged in ({"k": 4}, {"k": 0}, {"seed": -1}, {"seed": "x"}, {"names": []}):
        path.write_text(json.dumps(stored | damaged))
        with pytest.raises(ClusterError, match="partitioner.json: damaged"):
            load_partitioner(tmp_path)


@settings(max_examples=50)
@given(st.lists(st.text(max_size=8), max_size=20), st.integers(1, 7), st.integers(0, 2**32 - 1), st.randoms())
def test_random_clusters_know_neither_order_nor_portion_nor_language(texts: list[str], k: int, seed: int, rng: random.Random) -> None:
    partitioner = RandomPartitioner(k, seed)
    whole = partitioner.assign([Document(text, str(number), "en") for number, text in enumerate(texts)])
    order = list(range(len(texts)))
    rng.shuffle(order)
    for number in order:
        as_text, as_tokens = (
            Document(texts[number], "other", "zh-Hant"),
            TokenDocument("de", Document(texts[number], "", "").key, np.zeros(1, int)),
        )
        assert partitioner.assign([as_text]).tolist() == partitioner.assign([as_tokens]).tolist() == [whole[number]]
    for a in range(len(texts)):
        assert all(whole[a] == whole[b] for b in range(a) if texts[a] == texts[b])


@pytest.mark.parametrize("k", [2, 3, 8])
def test_random_clusters_have_the_sizes_of_a_fair_draw(k: int) -> None:
    count = 20_000
    new = [TokenDocument("en", Document(f"document {number}", "", "en").key, np.zeros(1, int)) for number in range(count)]
    sizes = np.bincount(random_partitioner(k).assign(new), minlength=k)
    # Beyond 5 standard deviations a fair draw comes once in two million.
    assert np.abs(sizes - count / k).max() < 5 * np.sqrt(count / k * (1 - 1 / k))


def test_another_seed_draws_independently() -> None:
    new = [TokenDocument("en", Document(f"document {number}", "", "en").key, np.zeros(1, int)) for number in range(20_000)]
    table = np.zeros((4, 4))
    np.add.at(table, (random_partitioner(4, 1).assign(new), random_partitioner(4, 2).assign(new)), 1)
    assert np.abs(table - 1250).max() < 5 * np.sqrt(1250)


def test_random_clusters_need_as_many_documents() -> None:
    with pytest.raises(ClusterError, match=r"clusters\.k = 4: more than the 3 documents"):
        RandomPartitioner(4, 0).fit(documents("en", "en", "en"))
    assert random_partitioner(3).names == ["c00", "c01", "c02"] and random_partitioner(3).languages() is None


@pytest.mark.parametrize(
    "config",
    [
        {"partitioner": "typology", "k": 2},
        {"partitioner": "tfidf", "k": 2},
        {"partitioner": "language"},
        {"partitioner": "mapping", "mapping": {"a": ["en"], "b": ["de"]}},
        {"partitioner": "random", "k": 2},
    ],
)
def test_every_partitioner_of_a_recipe_is_made(config: dict[str, object]) -> None:
    assert make_partitioner(ClustersConfig.model_validate(config), None).kind == config["partitioner"]
