"""Merging of languages by their distances: rounds of pairing, agglomerative clustering, and the balance of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.cluster import linkage, uriel
from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.corpus.document import Document
from megaxelm.recipe import TypologyConfig

PUBLISHED = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"]
# Two near groups of three around which everything else is far.
SIX = ["aa", "ab", "ac", "ba", "bb", "bc"]


def documents(codes: list[str]) -> list[Document]:
    return [Document(text=f"text in {code}", id=f"{code}/0", language=code) for code in codes]


def fitted(k: int, **config: str) -> TypologyPartitioner:
    partitioner = TypologyPartitioner(k, TypologyConfig.model_validate(config))
    partitioner.fit(documents(PUBLISHED))
    return partitioner


def test_later_rounds_go_by_the_smallest_distance_of_members() -> None:
    second = [round(merge.distance, 4) for merge in fitted(4).merges if merge.round == 2]
    table = uriel.distances(PUBLISHED)
    for merge, distance in zip(fitted(4).merges[8:], second, strict=True):
        between = table[np.ix_([PUBLISHED.index(a) for a in merge.left], [PUBLISHED.index(b) for b in merge.right])]
        assert distance == round(float(between.min()), 4)
    # By the mean, 0-1 would go with 4-5: their members are equally far; by the smallest, 1 draws 0 to 2-3.
    near = np.full((8, 8), 0.9)
    for a, b, distance in [(0, 1, 0.1), (2, 3, 0.1), (4, 5, 0.1), (6, 7, 0.1), (1, 2, 0.3), (5, 6, 0.8)]:
        near[a, b] = near[b, a] = distance
    for a in (0, 1):
        for b in (4, 5):
            near[a, b] = near[b, a] = 0.5
    np.fill_diagonal(near, 0)
    groups, _ = linkage.pair_languages(list("abcdefgh"), near, 2)
    assert sorted("".join(sorted(group)) for group in groups) == ["abcd", "efgh"]


def test_a_distant_language_with_its_nearest_neighbour_is_not_forced() -> None:
    table = np.full((5, 5), 0.1)
    table[4, :] = table[:, 4] = 0.6
    table[4, 0] = table[0, 4] = 0.5
    np.fill_diagonal(table, 0)
    assert not linkage.is_forced(0.5, [0], [4], table)
    assert linkage.is_forced(0.6, [1], [4], table)
    assert not linkage.is_forced(0.1, [1], [2], table)


@pytest.mark.parametrize("method", ["single", "average", "complete"])
def test_agglomerative_clusters_and_distances_are_those_of_scipy(method: linkage.Linkage) -> None:
    from scipy.cluster.hierarchy import cut_tree

    tree = linkage.linkage_tree(uriel.distances(PUBLISHED), method)
    assert tree.shape == (15, 4)
    for k in range(1, 17):
        partitioner = fitted(k, method="agglomerative", linkage=method)
        expected = cut_tree(tree, n_clusters=k)[:, 0]
        labels = partitioner.assign(documents(PUBLISHED))
        assert len(set(labels)) == len(set(zip(expected, labels, strict=True))) == k
        assert [merge.distance for merge in partitioner.merges] == pytest.approx(tree[: 16 - k, 2])
        assert partitioner.describe()["linkage"] == method


def two_groups() -> np.ndarray:
    table = np.full((6, 6), 0.9)
    table[:3, :3] = table[3:, 3:] = 0.2
    np.fill_diagonal(table, 0)
    return table


def test_balanced_merging_stays_within_the_bound() -> None:
    free, _ = linkage.agglomerate_languages(SIX, two_groups(), 3)
    assert ["aa", "ab", "ac"] in free
    balance = linkage.Balance([10] * 6, 20)
    groups, _ = linkage.agglomerate_languages(SIX, two_groups(), 3, "average", balance)
    assert [len(group) for group in groups] == [2, 2, 2]


def test_where_nothing_fits_the_smallest_two_are_merged() -> None:
    near = np.array([[0, 0.1, 0.5], [0.1, 0, 0.5], [0.5, 0.5, 0]])
    groups, _ = linkage.agglomerate_languages(["aa", "bb", "cc"], near, 2, "average", linkage.Balance([50, 30, 20], 40))
    assert sorted(groups) == [["aa"], ["bb", "cc"]]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_balanced_merging_gives_k_clusters_and_exceeds_the_bound_only_where_every_merge_does(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, count))
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    tolerance = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = rng.random((count, count))
    table = np.triu(table, 1) + np.triu(table, 1).T
    bound = (1 + tolerance) * sum(tokens) / k
    languages = [f"l{index}" for index in range(count)]
    groups, merges = linkage.agglomerate_languages(languages, table, k, "average", linkage.Balance(tokens, bound))
    assert sorted(code for group in groups for code in group) == languages and len(groups) == k
    size = dict(zip(languages, tokens, strict=True))
    clusters = [[code] for code in languages]
    for merge in merges:
        sums = sorted(sum(size[code] for code in cluster) for cluster in clusters)
        joint = sum(size[code] for code in [*merge.left, *merge.right])
        assert joint <= bound or joint == sums[0] + sums[1]
        clusters.remove(merge.left)
        clusters.remove(merge.right)
        clusters.append([*merge.left, *merge.right])
    assert sorted(map(sorted, clusters)) == sorted(map(sorted, groups))
