"""The tree above the clusters: nested divisions, those of the flat runs, and what cannot be put in a tree."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.levels import Tree, build_tree
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.random_clusters import RandomPartitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.corpus.document import Document
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig, TypologyConfig

PUBLISHED = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"]
PAIRS = ["ar-fr", "bg-ru", "de-el", "en-es", "hi-ur", "ja-ko", "sw-vi", "tr-zh"]
FOURS = ["ar-de-el-fr", "bg-en-es-ru", "hi-sw-ur-vi", "ja-ko-tr-zh"]
TOKENS = {code: 100 + 37 * place for place, code in enumerate(PUBLISHED)}


def documents(codes: list[str]) -> list[Document]:
    return [Document(text=f"text in {code}", id=f"{code}/0", language=code) for code in codes]


def fit(partitioner: Partitioner, codes: list[str] = PUBLISHED) -> Partitioner:
    partitioner.fit(documents(codes), TOKENS)
    return partitioner


def typology_tree(counts: list[int], codes: list[str] = PUBLISHED, **config: Any) -> Tree:
    made = TypologyConfig(**config)
    return build_tree(fit(TypologyPartitioner(counts[-1], made), codes), counts, made, TOKENS)


def names(tree: Tree) -> list[list[str]]:
    return [[name.removeprefix(f"round{number}-") for name in level] for number, level in enumerate(tree.levels, 1)]


def test_rounds_of_16_languages_are_the_published_pairs_and_their_pairs() -> None:
    tree = typology_tree([4, 8, 16])
    assert tree.method == "paired" and names(tree) == [FOURS, PAIRS]
    assert list(tree.levels[0]) == [f"round1-{name}" for name in FOURS], "names say their round"
    assert tree.levels[0]["round1-ar-de-el-fr"] == ["ar", "de", "el", "fr"] and tree.levels[1]["round2-tr-zh"] == ["tr", "zh"]
    at_eight = {"-".join(sorted([*merge.left, *merge.right])): round(merge.distance, 4) for merge in tree.merges[:8]}
    assert at_eight["en-es"] == 0.1586 and at_eight["sw-vi"] == 0.5762 and list(at_eight)[-1] == "sw-vi"
    assert [len(merge.left) for merge in tree.merges] == [1] * 8 + [2] * 4


def test_the_clusters_of_the_last_round_are_those_under_the_tree() -> None:
    tree = typology_tree([2, 4, 8])
    assert names(tree) == [["ar-bg-de-el-en-es-fr-ru", "hi-ja-ko-sw-tr-ur-vi-zh"], FOURS]
    assert tree.levels[1]["round2-hi-sw-ur-vi"] == ["hi-ur", "sw-vi"]
    assert tree.levels[0]["round1-ar-bg-de-el-en-es-fr-ru"] == ["ar-fr", "bg-ru", "de-el", "en-es"]


def test_left_over_clusters_are_named_with_their_round() -> None:
    notes = typology_tree([4, 8, 16]).notes
    assert [note.split(" are left over")[0] for note in notes] == [
        "round 2: tr and zh", "round 2: sw and vi", "round 1: hi + ur and sw + vi"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"method": "agglomerative"},
        {"method": "agglomerative", "linkage": "single"},
        {"method": "agglomerative", "linkage": "complete"},
    ],
)
def test_agglomerative_rounds_are_the_flat_clusters_of_each_k(config: dict[str, Any]) -> None:
    tree = typology_tree([3, 7, 12], **config)
    assert tree.method == "agglomerative"
    for count, level in zip((3, 7), names(tree), strict=True):
        assert level == fit(TypologyPartitioner(count, TypologyConfig(**config))).names


def test_rounds_that_pairing_does_not_give_are_agglomerative_and_say_so() -> None:
    tree = typology_tree([3, 8])
    assert tree.method == "agglomerative" and len(tree.levels[0]) == 3
    assert "lead from 8 clusters to k = 8, 4, 2, 1, not to 3" in tree.notes[0]
    assert sorted(cluster for held in tree.levels[0].values() for cluster in held) == PAIRS, "the pairs stay whole"
    with pytest.raises(ClusterError, match="rounds: k = 3: rounds of pairing lead from 8 clusters to k = 8, 4, 2, 1 only"):
        typology_tree([3, 8], method="paired")


def test_balanced_rounds_are_nested_and_keep_to_the_bound_of_their_k() -> None:
    tree = typology_tree([4, 8, 16], balance="tokens", tolerance=0.25)
    for level, finer in zip(tree.levels, [*tree.levels[1:], {code: [code] for code in PUBLISHED}], strict=True):
        for held in finer.values():
            assert sum(set(held) <= set(parent) for parent in level.values()) == 1
        sizes = [sum(TOKENS[code] for code in held) for held in level.values()]
        assert max(sizes) <= 1.25 * sum(sizes) / len(level)
    plain = typology_tree([4, 8, 16], method="agglomerative")
    assert names(tree) != names(plain), "the balance has a part in it"


def test_languages_and_named_clusters_have_a_tree_too() -> None:
    languages = build_tree(fit(LanguagePartitioner()), [4, 8, 16], TypologyConfig(), TOKENS)
    assert names(languages) == [FOURS, PAIRS]
    groups = {"slavic": ["bg", "ru"], "romance": ["es", "fr"], "indic": ["hi", "ur"], "east": ["ja", "ko"]}
    codes = sorted(code for held in groups.values() for code in held)
    mapped = build_tree(fit(MappingPartitioner(groups), codes), [2, 4], TypologyConfig(), TOKENS)
    assert mapped.levels == [{"round1-east-indic": ["indic", "east"], "round1-romance-slavic": ["slavic", "romance"]}]


def test_clusters_of_documents_are_merged_by_their_centres() -> None:
    partitioner = TfidfPartitioner(4, TfidfConfig(), 0, None)
    partitioner.names = ["c00", "c01", "c02", "c03"]
    partitioner._centres = np.array([[0, 1], [1, 0], [0.9, 0.1], [0.1, 0.9]], dtype=np.float32)
    tree = build_tree(partitioner, [2, 4], TypologyConfig(method="agglomerative", linkage="single"), {})
    assert tree.method == "paired" and tree.levels == [{"round1-c00-c03": ["c00", "c03"], "round1-c01-c02": ["c01", "c02"]}]
    assert build_tree(partitioner, [3, 4], TypologyConfig(), {}).method == "agglomerative"


def test_what_has_no_tree_is_refused() -> None:
    random = RandomPartitioner(4, 0)
    random.fit(documents(PUBLISHED))
    with pytest.raises(ClusterError, match="random partitioner have no tree"):
        build_tree(random, [2, 4], TypologyConfig(), {})
    with pytest.raises(ClusterError, match="the last has k = 8, and the language partitioner makes 16 clusters"):
        build_tree(fit(LanguagePartitioner()), [4, 8], TypologyConfig(), {})
    groups = {"a": ["bg", "ru"], "b": ["es", "fr"], "round1-A-b": ["hi"]}
    with pytest.raises(ClusterError, match="would be named round1-a-b, which is taken"):
        build_tree(fit(MappingPartitioner(groups), ["bg", "es", "fr", "hi", "ru"]), [2, 3], TypologyConfig(), {})


def test_the_report_has_plain_values() -> None:
    tree = typology_tree([4, 8, 16])
    found = tree.to_json()
    assert found["method"] == "paired" and found["levels"] == tree.levels
    assert found["merges"][0] == dataclasses.asdict(tree.merges[0])
