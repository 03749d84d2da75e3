"""Distances of languages and the clusters made of them, against the values of the published runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaxelm.cluster import linkage, typology, uriel
from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.language_sets import cluster_name, unique_names
from megaxelm.cluster.load import load_partitioner
from megaxelm.cluster.mapping import MappingPartitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.random_clusters import RandomPartitioner
from megaxelm.cluster.typology import TypologyPartitioner
from megaxelm.corpus.document import Document
from megaxelm.errors import ClusterError
from megaxelm.recipe import TypologyConfig

PUBLISHED = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ja", "ko", "ru", "sw", "tr", "ur", "vi", "zh"]
UNSEEN = ["az", "he", "pl", "sv"]
MERGES_AT_8 = {
    "en-es": 0.1586, "de-el": 0.2020, "ja-ko": 0.2022, "hi-ur": 0.2584, "bg-ru": 0.2722, "ar-fr": 0.3042, "tr-zh": 0.4604, "sw-vi": 0.5762
}  # fmt: skip


def documents(codes: list[str]) -> list[Document]:
    return [Document(text=f"text in {code}", id=f"{code}/0", language=code) for code in codes]


def fitted(k: int, codes: list[str] = PUBLISHED, tokens: dict[str, int] | None = None, **config: Any) -> TypologyPartitioner:
    partitioner = TypologyPartitioner(k, TypologyConfig(**config))
    partitioner.fit(documents(codes), tokens)
    return partitioner


def test_published_pairs_and_distances_at_k_8() -> None:
    partitioner = fitted(8)
    assert partitioner.method == "paired"
    assert {"-".join(sorted([*merge.left, *merge.right])): round(merge.distance, 4) for merge in partitioner.merges} == MERGES_AT_8
    assert [merge.distance for merge in partitioner.merges] == sorted(merge.distance for merge in partitioner.merges)
    assert partitioner.names == sorted(MERGES_AT_8)


def test_ninety_seven_features_vary_over_the_published_languages() -> None:
    values = np.nan_to_num(uriel.feature_values(PUBLISHED), nan=-1.0)
    assert values.shape == (16, 103)
    assert (values != values[0]).any(axis=0).sum() == 97


def test_distance_is_the_formula_computed_pair_by_pair() -> None:
    values = uriel.feature_values(PUBLISHED)
    keep = [i for i in range(values.shape[1]) if len({-1.0 if np.isnan(v) else v for v in values[:, i]}) > 1]
    table = uriel.distances(PUBLISHED)
    for a, b in [(4, 5), (11, 14), (12, 15), (0, 6)]:
        x, y = values[a, keep], values[b, keep]
        both = ~np.isnan(x) & ~np.isnan(y)
        expected = 1 - (x[both] * y[both]).sum() / np.sqrt(np.nansum(x * x) * np.nansum(y * y))
        assert table[a, b] == pytest.approx(expected, abs=1e-12) == table[b, a]
    assert np.diagonal(table).tolist() == [0.0] * 16


@pytest.mark.parametrize(
    ("k", "names"),
    [
        (4, ["ar-de-el-fr", "bg-en-es-ru", "hi-sw-ur-vi", "ja-ko-tr-zh"]),
        (2, ["ar-bg-de-el-en-es-fr-ru", "hi-ja-ko-sw-tr-ur-vi-zh"]),
        (16, PUBLISHED),
    ],
)
def test_rounds_lead_from_16_to_k(k: int, names: list[str]) -> None:
    partitioner = fitted(k)
    assert partitioner.method == "paired"
    assert partitioner.names == names
    by_language = dict(zip(PUBLISHED, partitioner.assign(documents(PUBLISHED)), strict=True))
    assert all(by_language[code] == index for index, name in enumerate(names) for code in name.split("-"))


def test_the_order_of_languages_does_not_matter() -> None:
    assert fitted(8, PUBLISHED[::-1]).names == fitted(8).names


def test_only_the_left_over_pairs_are_forced_and_are_named_in_words() -> None:
    partitioner = fitted(8)
    assert ["-".join(sorted(m.left + m.right)) for m in partitioner.merges if m.forced] == ["tr-zh", "sw-vi"]
    notes = partitioner.notes()
    assert len(notes) == 2
    assert notes[0].startswith("tr and zh are a left-over pair, not relatives")


@pytest.mark.parametrize("k", [1, 3, 5, 7, 15])
def test_other_k_is_agglomerative_and_says_so(k: int) -> None:
    codes = PUBLISHED[:15]
    partitioner = fitted(k, codes)
    assert len(partitioner.names) == k
    assert sorted(code for group in partitioner.groups.values() for code in group) == codes
    # 15 languages are odd: no round of pairing is possible, and none is needed for k = 15.
    assert partitioner.describe()["method"] == ("paired" if k == 15 else "agglomerative")
    assert any("agglomerative" in note for note in partitioner.notes()) == (k != 15)


def test_a_method_that_cannot_give_k_is_an_error_and_one_that_was_asked_for_is_taken() -> None:
    with pytest.raises(ClusterError, match=r"clusters\.k = 5.*16, 8, 4, 2, 1 only.*agglomerative"):
        fitted(5, method="paired")
    assert fitted(8, method="paired").names == fitted(8).names
    asked = fitted(8, method="agglomerative")
    assert asked.method == "agglomerative" and len(asked.names) == 8 and asked.names != fitted(8).names
    assert not any("rounds" in note for note in asked.notes())
    assert any("linkage = single has no part" in note for note in fitted(8, linkage="single").notes())


def test_the_tolerance_widens_the_bound() -> None:
    tokens = {"de": 10, "en": 10, "es": 10, "sw": 30}
    tight, wide = (fitted(2, list(tokens), tokens, balance="tokens", tolerance=tolerance) for tolerance in (0.0, 0.5))
    assert tight.tokens == {"de-en-es": 30, "sw": 30} and tight.describe()["tokens_bound"] == 30
    assert wide.describe()["tokens_bound"] == 45
    # The nearest two have 30 tokens together: beyond the bound of 25, within that of 35.
    near = {"en": 15, "es": 15, "de": 5, "sw": 15}
    groups = [fitted(2, list(near), near, balance="tokens", tolerance=tolerance).groups for tolerance in (0.0, 0.4)]
    assert not any({"en", "es"} <= set(group) for group in groups[0].values())
    assert any({"en", "es"} <= set(group) for group in groups[1].values())


def test_a_language_beyond_the_bound_stays_alone_and_is_no_fault() -> None:
    tokens = {code: 10 for code in PUBLISHED} | {"en": 1000}
    partitioner = fitted(4, tokens=tokens, balance="tokens", tolerance=0.5)
    assert ["en"] in partitioner.groups.values() and len(partitioner.names) == 4
    assert partitioner.method == "agglomerative" and partitioner.describe()["tokens"]["en"] == 1000
    assert not any("beyond the bound" in note for note in partitioner.notes())
    assert any("pairing cannot be balanced" in note for note in partitioner.notes())


def test_where_the_bound_cannot_be_met_there_are_k_clusters_and_the_note_names_the_one_beyond() -> None:
    partitioner = fitted(2, ["en", "es", "fr"], {"en": 10, "es": 10, "fr": 10}, balance="tokens", tolerance=0)
    assert len(partitioner.names) == 2
    (name,) = [name for name, tokens in partitioner.tokens.items() if tokens == 20]
    (note,) = [note for note in partitioner.notes() if "beyond the bound" in note]
    assert note.startswith(f"cluster {name}: 20 tokens, 33% beyond the bound of 15")


@pytest.mark.parametrize(
    ("tokens", "config", "message"),
    [
        (None, {}, "not known of en, es"),
        ({"en": 5}, {}, "not known of es"),
        ({"en": 5, "es": 5}, {"method": "paired"}, "cannot be balanced"),
    ],
)
def test_tokens_that_cannot_be_balanced_are_an_error(tokens: dict[str, int] | None, config: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        fitted(1, ["en", "es"], tokens, balance="tokens", **config)


def test_k_above_the_number_of_languages_is_an_error() -> None:
    with pytest.raises(ClusterError, match=r"clusters\.k = 3: more than the 2 languages.*en, sw"):
        fitted(3, ["en", "sw"])


def test_a_document_in_a_language_of_no_cluster_is_an_error() -> None:
    with pytest.raises(ClusterError, match="'pl' belongs to no cluster"):
        fitted(8).assign(documents(["en", "pl"]))


def test_no_documents_is_an_error() -> None:
    with pytest.raises(ClusterError, match="no document"):
        TypologyPartitioner(2).fit([])


def test_donors_are_the_nearest_known_languages() -> None:
    found = dict(typology.donors(UNSEEN, PUBLISHED))
    assert {code: ranked[0][0] for code, ranked in found.items()} == {"az": "tr", "he": "ar", "pl": "ru", "sv": "en"}
    assert all([d for _, d in ranked] == sorted(d for _, d in ranked) and len(ranked) == 16 for ranked in found.values())


def test_a_donor_does_not_depend_on_what_else_is_asked_for() -> None:
    # Among so few languages, features that are constant without Swahili vary with it.
    assert typology.donors(["nl"], ["de", "en"]) == typology.donors(["nl", "sw"], ["de", "en"])[:1]
    assert uriel.distances(["nl", "de"])[0, 1] != uriel.distances(["nl", "de", "sw"])[0, 1]


@pytest.mark.parametrize(
    ("unseen", "known", "message"),
    [
        (["en"], PUBLISHED, "en given both"),
        ([], PUBLISHED, "no unseen"),
        (["az"], [], "no known"),
        (["az", "az"], PUBLISHED, "az given twice"),
        (["az"], ["en", "en"], "en given twice"),
    ],
)
def test_donors_of_lists_that_make_no_sense_are_errors(unseen: list[str], known: list[str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        typology.donors(unseen, known)


def test_the_command_donors_needs_no_recipe_and_prints_a_line_a_language(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from megaxelm.cli import app

    def lines(*arguments: str) -> list[str]:
        app(["cluster", "donors", *arguments], standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    found = lines(*UNSEEN, "--number", "2")
    assert [line.split()[:2] for line in found] == [["az:", "tr"], ["he:", "ar"], ["pl:", "ru"], ["sv:", "en"]]
    assert all(len(line.split()) == 5 for line in found)
    assert lines("xx", "--among", "en, de", "--distances", str(table_file(tmp_path)))[0] == "xx: de 0.1000  en 0.3000"
    assert lines("az", "--features", "fam", "--number", "1")[0].startswith("az: tr")


def table_file(folder: Path, text: str = ",en,de,xx\nen,0,0.5,0.3\nde,0.5,0,.1\nxx,0.3,1e-1,0\n") -> Path:
    path = folder / "distances.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_codes_of_two_and_three_letters_and_regions_are_one_language() -> None:
    for short, long in {"az": "aze", "he": "heb", "sw": "swa", "zh-Hans": "zho", "pt_BR": "por", "no": "nor"}.items():
        assert uriel.iso_639_3(short) == uriel.iso_639_3(long) == long
    three = uriel.iso_639_3
    assert all(three(code) == target for code, target in uriel.ISO_639_3.items())
    assert len(uriel.ISO_639_3) == 184 + 5
    assert uriel.distances(["zh", "zh-Hant", "en"])[0, 1] == 0


@pytest.mark.parametrize(("code", "near"), [("xq", "xh"), ("grman", "deu|ger|gr"), ("", "ISO 639")])
def test_an_unknown_code_is_an_error_that_names_it(code: str, near: str) -> None:
    with pytest.raises(ClusterError, match=rf"language '{code}'.*({near})"):
        uriel.distances(["en", code])


def test_a_language_without_features_is_named() -> None:
    with pytest.raises(ClusterError, match="no value of this set for azj"):
        uriel.distances(["en", "azj"])
    assert uriel.distances(["en", "azj"], "syntax_knn").shape == (2, 2)


@pytest.mark.parametrize("features", ["fam", "geo", "syntax_knn", "phonology_average", "inventory_knn", "syntax_wals"])
def test_every_kind_of_feature_set_gives_distances(features: str) -> None:
    table = uriel.distances(["en", "de", "fr", "tr"], features)
    assert (table == table.T).all() and (table[np.triu_indices(4, 1)] > 0).all()
    if features == "fam":
        assert table[0, 1] < table[0, 2] < table[0, 3] == 1


@pytest.mark.parametrize("features", ["geo_average", "syntax_fam", "syntax", "syntax_wikipedia", "colour_average"])
def test_an_unknown_feature_set_is_an_error(features: str) -> None:
    with pytest.raises(ClusterError, match="clusters.typology.features"):
        uriel.distances(["en", "de"], features)


def test_lang2vec_absent_is_an_error_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise uriel.importlib.metadata.PackageNotFoundError(name)

    uriel._table.cache_clear()
    monkeypatch.setattr(uriel.importlib.metadata, "distribution", absent)
    with pytest.raises(ClusterError, match="pip install lang2vec"):
        uriel.distances(["en", "de"])


def test_a_script_named_like_lang2vec_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lang2vec.py").write_text("raise SystemExit('this is the script')\n")
    monkeypatch.syspath_prepend(tmp_path)
    uriel._table.cache_clear()
    assert uriel.distances(["en", "es"]).shape == (2, 2)


def test_one_language_alone_has_distance_zero_and_no_linkage() -> None:
    assert uriel.distances(["sw"]).tolist() == [[0.0]]
    assert linkage.linkage_tree(uriel.distances(["sw"])).shape == (0, 4)
    assert fitted(1, ["sw"]).names == ["sw"]


def test_long_names_are_short_the_same_and_distinct() -> None:
    codes = [f"l{index:02d}" for index in range(40)]
    name = cluster_name(codes)
    assert len(name) <= 60 and name.startswith("l00-l01-") and name == cluster_name(codes[::-1])
    assert name != cluster_name([*codes[:-1], "zzz"])


@pytest.mark.parametrize("codes", [["seed"], ["dense"], ["../up"], ["a b"], [""], ["-x"]])
def test_names_that_are_taken_or_unsafe_are_errors(codes: list[str]) -> None:
    with pytest.raises(ClusterError):
        cluster_name(codes)


def test_names_that_differ_in_case_only_are_an_error() -> None:
    with pytest.raises(ClusterError, match="two clusters"):
        unique_names([["zh-Hans"], ["zh-hans"]])


@pytest.mark.parametrize(
    "partitioner",
    [
        TypologyPartitioner(3),
        TypologyPartitioner(2),
        TypologyPartitioner(2, TypologyConfig(balance="tokens", linkage="complete", tolerance=0)),
        LanguagePartitioner(),
        MappingPartitioner({"west": ["en", "de"], "Rest": ["zh", "sw"]}),
        RandomPartitioner(3, 5),
    ],
)
def test_what_is_saved_loads_the_same(partitioner: Partitioner, tmp_path: Path) -> None:
    codes = ["de", "en", "sw", "zh"]
    partitioner.fit(documents(codes), {"de": 4, "en": 9, "sw": 1, "zh": 3})
    assert not partitioner.reads_text
    partitioner.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["partitioner.json"]
    loaded = load_partitioner(tmp_path)
    assert (loaded.names, loaded.languages(), loaded.describe()) == (partitioner.names, partitioner.languages(), partitioner.describe())
    assert loaded.notes() == partitioner.notes()
    assert loaded.assign(documents(codes)).tolist() == partitioner.assign(documents(codes)).tolist()


def test_language_partitioner_wants_k_to_be_the_number_of_languages() -> None:
    partitioner = LanguagePartitioner(2)
    with pytest.raises(ClusterError, match=r"clusters\.k = 2.*3 languages"):
        partitioner.fit(documents(["de", "en", "sw"]))
    partitioner.fit(documents(["sw", "de"]))
    assert partitioner.names == ["de", "sw"]
    assert partitioner.assign(documents(["sw", "de", "sw"])).tolist() == [1, 0, 1]


def test_every_cut_of_the_file_is_a_cluster_error(tmp_path: Path) -> None:
    fitted(2, ["de", "en", "sw", "zh"]).save(tmp_path)
    path = tmp_path / "partitioner.json"
    whole = path.read_bytes()
    for length in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ClusterError, match="partitioner.json"):
            load_partitioner(tmp_path)


def test_every_missing_or_strange_entry_is_a_cluster_error(tmp_path: Path) -> None:
    fitted(2, ["de", "en", "sw", "zh"]).save(tmp_path)
    path = tmp_path / "partitioner.json"
    stored = json.loads(path.read_text())
    for key in stored:
        for damaged in ({name: value for name, value in stored.items() if name != key}, stored | {key: None}, stored | {key: [7]}):
            path.write_text(json.dumps(damaged))
            with pytest.raises(ClusterError, match="damaged"):
                load_partitioner(tmp_path)
    path.unlink()
    with pytest.raises(ClusterError, match="no such file"):
        load_partitioner(tmp_path)
